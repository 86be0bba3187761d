"""Predict, then reveal: a guess before an experiment, by slider; under papermill its value as it is given."""

from __future__ import annotations

import os
from collections.abc import Mapping

import ipywidgets
from IPython.display import Markdown, display

from setlib.files import STATIC


class Guess:
    """A question that is answered in percent before the answer is shown.

    name: of the guess among `given`, a notebook's parameter; 50 where it is not given.
    """

    def __init__(self, question: str, name: str, given: Mapping[str, float], low: float = 0, high: float = 100) -> None:
        self.question = question
        whole = ipywidgets.Layout(width="480px")
        value = min(max(float(given.get(name, 50)), low), high)
        self.slider = ipywidgets.FloatSlider(value, min=low, max=high, step=1, description="my guess (%)", layout=whole)

    @property
    def value(self) -> float:
        """What is guessed by now, percent."""
        return self.slider.value

    def _ipython_display_(self) -> None:
        if os.environ.get(STATIC):
            display(Markdown(f"{self.question} **Guess: {self.value:.0f} %**"))
        else:
            display(ipywidgets.VBox([ipywidgets.HTML(self.question), self.slider]))
