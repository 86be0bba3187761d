"""Explorers with sliders for notebooks: thin widgets over a pure `render`; the mathematics is in `spectral.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ipywidgets
import numpy as np
import torch
from IPython.display import display
from torch import Tensor

from setlib import plots, spectral
from setlib.analysis import PARTS, as_picture, as_tensor, feature_pictures
from setlib.backbone import FrozenBackbone
from setlib.domains import Domain
from setlib.model import Segmenter
from setlib.transforms import fit, resize

HIGHEST = 1.5  # of the band slider; the corner of the spectrum lies at sqrt(2)


def swap(content: Tensor, style: Tensor, part: str, low: float, high: float, weight: float, axes: tuple) -> Tensor:
    """Content with one part of its spectrum moved towards the style's, by `weight` within the band low ... high.

    content, style: 4-D of one shape; part: "amplitude" or "phase". Raises ValueError for another part.
    """
    if part not in PARTS:
        raise ValueError(f"Unknown part '{part}': expected one of {', '.join(PARTS)}.")
    mix = spectral.mix_amplitude if part == "amplitude" else spectral.mix_phase
    return mix(content, style, weight, low, high, axes)


class SwapExplorer:
    """Moves amplitude or phase of one picture towards another's, in its pixels or after a layer of a backbone.

    domains: to choose from, by the name shown. model: a Segmenter or a backbone with layers to choose, or None.
    `render` is pure; `show` displays the widgets, which draw again on every change.
    """

    def __init__(
        self,
        domains: Mapping[str, Domain],
        model: Segmenter | FrozenBackbone | None = None,
        long_edge: int = 448,
    ) -> None:
        self.domains, self.long_edge = dict(domains), long_edge
        self.backbone: FrozenBackbone | None = getattr(model, "backbone", model)
        depth = self.backbone.num_layers if self.backbone is not None else 0
        layers = getattr(model, "feature_layers", sorted({depth * k // 4 for k in (1, 2, 3, 4)} - {0}))
        self.spaces = ("pixels", *(f"layer {layer}" for layer in layers))
        self._build_widgets()

    def pair(self, content: str, content_index: int, style: str, style_index: int) -> tuple[Tensor, Tensor]:
        """The two pictures, (1, 3, h, w) in [0, 1] each, at one size; the style's is cut to the content's proportions.

        Raises ValueError for an unknown domain or a picture that is not there.
        """
        images = []
        for name, index in ((content, content_index), (style, style_index)):
            if name not in self.domains:
                raise ValueError(f"Unknown domain '{name}': expected one of {', '.join(self.domains)}.")
            if not 0 <= index < len(self.domains[name]):
                raise ValueError(f"{name} has the pictures 0 to {len(self.domains[name]) - 1}, not {index}.")
            images.append(as_tensor(self.domains[name].sample(index).image))
        patch = self.backbone.patch_size if self.backbone is not None else 2
        size = tuple(max(patch, side // patch * patch) for side in fit(images[0], self.long_edge))
        return tuple(_cover(image, size) for image in images)

    @torch.no_grad()
    def render(
        self,
        content: str,
        content_index: int,
        style: str,
        style_index: int,
        part: str = "amplitude",
        low: float = 0.0,
        high: float = HIGHEST,
        weight: float = 1.0,
        space: str | int = "pixels",
    ) -> plots.Figure:
        """Content, style and the mixture, with their log amplitudes (pixels) or as features in common colours (layer).

        low, high: the band of frequencies that moves, 1 = the highest along an axis; weight: how far, 0 to 1.
        space: "pixels", or a layer as "layer 9" or 9. Raises ValueError for what does not exist.
        """
        space = f"layer {space}" if isinstance(space, int) else space
        if space not in self.spaces:
            raise ValueError(f"Unknown space '{space}': expected one of {', '.join(self.spaces)}.")
        images = self.pair(content, content_index, style, style_index)
        columns = [f"content: {content} {content_index}", f"style: {style} {style_index}"]
        share = "" if weight == 1 else f"{100 * weight:.0f} % of "
        band = "" if (low, high) == (0.0, HIGHEST) else f"\nfrequencies {low:.2f} to {high:.2f}"
        columns.append(f"mixed: {share}the style's {part}{band}")
        if space == "pixels":
            shown = [*images, swap(*images, part, low, high, weight, spectral.PIXELS)]
            amplitudes = [spectral.log_amplitude_picture(255 * x)[0].numpy() for x in shown]
            return plots.spectra([as_picture(x) for x in shown], {"log(1 + amplitude)": amplitudes}, columns)
        layer = int(space.removeprefix("layer "))
        maps = [self.backbone(image, layers=(layer,))[layer] for image in images]
        mixed = swap(*maps, part, low, high, weight, spectral.GRID)
        pictures = [*(as_picture(image) for image in images), None]
        titles = [[*columns[:2], ""], [f"{space}: content", f"{space}: style", columns[2]]]
        return plots.sheet([pictures, feature_pictures([*maps, mixed])], titles=titles)

    def show(self) -> None:
        """Displays the widgets and draws for the first time. A problem is shown as a sentence above the picture."""
        self.update()
        display(self.box)

    def update(self, change: Any = None) -> None:
        """Draws what the widgets say."""
        for chosen, index in ((self.content, self.content_index), (self.style, self.style_index)):
            index.max = len(self.domains[chosen.value]) - 1
        try:
            low, high = self.band.value
            figure = self.render(
                self.content.value,
                self.content_index.value,
                self.style.value,
                self.style_index.value,
                self.part.value,
                low,
                high,
                self.weight.value,
                self.space.value,
            )
            self.view.value, self.message.value = figure.png(), ""
        except Exception as problem:  # a widget's callback has nowhere else to say it
            self.message.value = f"{type(problem).__name__ * (not isinstance(problem, ValueError))} {problem}".strip()

    def _build_widgets(self) -> None:
        names = list(self.domains)
        wide = {"style": {"description_width": "110px"}, "layout": {"width": "420px"}, "continuous_update": False}
        choice = {key: value for key, value in wide.items() if key != "continuous_update"}
        self.content = ipywidgets.Dropdown(options=names, value=names[0], description="content", **choice)
        self.style = ipywidgets.Dropdown(options=names, value=names[-1], description="style", **choice)
        self.content_index = ipywidgets.IntSlider(0, 0, 0, description="picture", **wide)
        self.style_index = ipywidgets.IntSlider(0, 0, 0, description="picture", **wide)
        self.part = ipywidgets.Dropdown(options=PARTS, description="part that moves", **choice)
        self.space = ipywidgets.Dropdown(options=self.spaces, description="space", **choice)
        self.band = ipywidgets.FloatRangeSlider(
            value=(0, HIGHEST), min=0, max=HIGHEST, step=0.01, description="frequencies", **wide
        )
        self.weight = ipywidgets.FloatSlider(1, min=0, max=1, step=0.05, description="weight", **wide)
        self.view = ipywidgets.Image(format="png")
        self.message = ipywidgets.Label()
        self.controls = (
            *(self.content, self.style, self.content_index, self.style_index),
            *(self.part, self.space, self.band, self.weight),
        )
        for name, domain in ((self.content_index, names[0]), (self.style_index, names[-1])):
            name.max = len(self.domains[domain]) - 1
        for widget in self.controls:
            widget.observe(self.update, names="value")
        pairs = [ipywidgets.HBox(self.controls[i : i + 2]) for i in range(0, len(self.controls), 2)]
        self.box = ipywidgets.VBox([*pairs, self.message, self.view])


def _cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, 3, h, w) resized to cover `size` and cut to it around the middle."""
    h, w = image.shape[-2:]
    factor = max(size[0] / h, size[1] / w)
    image = resize(image, (max(size[0], round(h * factor)), max(size[1], round(w * factor))))
    top, left = (int(np.floor((side - kept) / 2)) for side, kept in zip(image.shape[-2:], size, strict=True))
    return image[..., top : top + size[0], left : left + size[1]]
