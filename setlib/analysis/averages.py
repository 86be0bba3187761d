"""Averages of trained models: of several that differ in their seed, and of one with the frozen features it refines."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from setlib.experiment import Ablation
from setlib.mixing import Wrapped
from setlib.segmenter import Segmenter


@torch.no_grad()
def soup(models: Sequence[Segmenter]) -> Segmenter:
    """The mean of all that learns, and of a style of the source. Source: Model soups (Wortsman, ICML 2022), uniform.

    Departure: seeds draw the first values of heads and tokens too, where the source's models begin with the same.
    Raises ValueError unless the models differ in their seed alone.
    """
    alike = {"seed": 0, "ablation": Ablation()}
    kinds = {(replace(model.experiment, **alike), model.backbone.fingerprint) for model in models}
    if len(kinds) != 1:
        raise ValueError(f"A soup is of models that differ in their seed alone, these are of {len(kinds)} kinds.")
    made, states = copy.deepcopy(models[0]), [model.trainable_state() for model in models]
    for name, value in made.trainable_state().items():
        if value.is_floating_point():
            value.copy_(torch.stack([state[name] for state in states]).mean(0))
    return made.eval()


def wise(model: Segmenter, share: float) -> Segmenter:
    """The model with features f + share * (refiner(f) - f): 0 = no refiner, 1 = the model. A style stays whole.

    For scoring: what is saved of it cannot be loaded. Raises ValueError for a refiner that works inside its layers.
    Source: WiSE-FT (Wortsman, CVPR 2022). Departure: there weights are averaged, here features.
    """
    if model.refiner.inside:
        raise ValueError(f"Refiner {model.experiment.model.refiner} works inside its layers: it cannot be scaled.")
    parts = model.head, model.feature_layers, model.precision
    return Segmenter(model.experiment, model.backbone, Scaled(model, share), *parts).eval()


class Scaled(Wrapped):
    """A share of what another refiner changes; its queries are whole."""

    def __init__(self, model: Segmenter, share: float) -> None:
        super().__init__(model.refiner)
        self.share = share

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); exact at the shares 0 and 1."""
        return torch.lerp(features, super().forward(features, layer).to(features.dtype), self.share)

    def queries(self) -> Tensor | None:
        """Those of the other."""
        return self.refiner.queries()
