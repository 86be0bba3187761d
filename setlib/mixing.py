"""Amplitudes of features mixed between the pictures of a step, in training alone (those of pixels: `data/crops.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from setlib.data.crops import mix_weight
from setlib.features import FrozenFeatures
from setlib.mask2former import Masks
from setlib.segmenter import Segmenter
from setlib.spectral import mix_amplitude
from setlib.tokens import Refiner


class Wrapped(Refiner):
    """Another refiner, with its style and prompts, called behind some more `layers` too: there it does nothing."""

    def __init__(self, refiner: Refiner, *layers: int) -> None:
        super().__init__(sorted({*refiner.layers, *layers}))
        self.refiner: Any = refiner
        self.style = refiner.style
        if refiner.prompts is not None:
            self.prompts = self._prompts

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.refiner(features, layer) if layer in self.refiner.layers else features

    def frozen_until(self, depth: int) -> int:
        """Number of first layers, of `depth`, whose own output nothing here can change."""
        return min((self.refiner.frozen_until(depth), *self.layers))

    def _prompts(self, layer: int) -> Tensor:
        known = layer in self.refiner.layers
        return self.refiner.prompts(layer) if known else self.refiner.prompts(self.refiner.layers[0])[:0]


class MixedAmplitudes(Wrapped):
    """A refiner that finds the features behind `layer` with amplitudes mixed between neighbours; phases are kept.

    weights: how far each picture of whole pairs moves, 0 to 1. high: largest radius. The neighbour gets no gradient.
    Source: AmpMix of FACT (Xu, CVPR 2021), here of features, whose mean and deviation MixStyle (Zhou, ICLR 2021) mixes.
    """

    def __init__(self, refiner: Refiner, layer: int, weights: Sequence[float], high: float) -> None:
        super().__init__(refiner, layer)
        self.layer, self.weights, self.high = layer, tuple(weights), high

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if layer == self.layer:
            mates = features.detach()[[i ^ 1 for i in range(len(features))]]  # the neighbour of each
            pairs = zip(features.split(1), mates.split(1), self.weights, strict=True)
            features = torch.cat([mix_amplitude(own, mate, w, high=self.high) if w else own for own, mate, w in pairs])
        return super().forward(features, layer)


def mix_weights(model: Segmenter, step: int) -> list[float]:
    """How far each crop of a step moves behind train.mix_layer, whatever process it is on; all 0 for the pixels."""
    train, size = model.experiment.train, model.experiment.train.batch_size
    share = train.mix if train.mix_layer else 0.0
    return [mix_weight(share, model.experiment.seed, i) for i in range(step * size, (step + 1) * size)]


def disagreement(model: Segmenter, output: Tensor | Masks, images: Tensor, frozen: FrozenFeatures | None) -> Tensor:
    """How far predictions of mixed crops are from those of the same crops as they are, which get no gradient.

    Kullback-Leibler divergence of class probabilities, mean over the patch grid, summed over the crops. Source: the
    consistency loss of FACT (Xu, CVPR 2021); departure: one way, and without a second network that follows the first.
    """
    size = model.backbone.grid(images.shape[2:])
    with torch.no_grad():
        wanted = model.head.probabilities(model(images, frozen), size)  # (B, K, H, W)
    found = model.head.probabilities(output, size).clamp(min=1e-6).log()
    return F.kl_div(found, wanted, reduction="none").sum(1).mean((1, 2)).sum()


def mixing(model: Segmenter, weights: Sequence[float]) -> Refiner:
    """What a step calls in place of the model's refiner for crops with these weights: itself where none is mixed."""
    train = model.experiment.train
    return MixedAmplitudes(model.refiner, train.mix_layer, weights, train.mix_high) if any(weights) else model.refiner
