"""Linear readings of frozen features: what a head would say after each layer, and what tells two domains apart.

Everything is ridge regression in closed form, so that a reading is exact, quick and has no seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from setlib.analysis.factorial import band_products, interval, resampled
from setlib.analysis.survey import evenly
from setlib.backbone import FrozenBackbone
from setlib.data.augment import fit, resize, to_tensor
from setlib.data.domains import Domain
from setlib.data.labels import CITYSCAPES, IGNORE
from setlib.tokens import Refiner

RIDGE = 1e-2  # in units of the features' variance
PRESENT, OFTEN = 0.01, (0.1, 0.9)  # a class is in a picture with this share of its pixels; in how many pictures it is


class Lens(NamedTuple):
    """A linear head on the features after one layer. mean, scale: (C,); weights: (C, K); bias: (K,)."""

    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Scores (B, K, H, W) of features (B, H, W, C)."""
        return (((features - self.mean) / self.scale) @ self.weights + self.bias).permute(0, 3, 1, 2)


def fit_lens(features: Tensor, labels: Tensor, num_classes: int = len(CITYSCAPES)) -> Lens:
    """The ridge regression of patch features (N, H, W, C) on their classes (N, H, W), 255 ignored.

    Classes count by the root of their frequency, so that rare ones are not lost.
    """
    kept = labels.flatten() != IGNORE
    x, y = features.flatten(0, 2)[kept].double(), F.one_hot(labels.flatten()[kept].long(), num_classes).double()
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / scale
    weight = (y / y.sum(0).clamp(min=1).sqrt()).sum(1, keepdim=True)  # of each patch
    x_mean, y_mean = ((weight * z).sum(0) / weight.sum() for z in (x, y))
    x, y = x - x_mean, y - y_mean
    inner = x.T @ (weight * x) / weight.sum()
    weights = torch.linalg.solve(inner + RIDGE * torch.eye(len(inner)), x.T @ (weight * y) / weight.sum())
    return Lens(mean.float(), scale.float(), weights.float(), (y_mean - x_mean @ weights).float())


@torch.no_grad()
def fit_lenses(
    backbone: FrozenBackbone,
    domain: Domain,
    layers: Sequence[int],
    pictures: int = 24,
    refiner: Refiner | None = None,
) -> dict[int, Lens]:
    """A lens for each layer, fitted to a labelled domain of the 19 train classes: {layer: Lens}; behind a refiner."""
    maps, labels = [], []
    for _, sample in domain.samples(evenly(len(domain), pictures)):
        found = backbone(to_tensor(sample.image).to(backbone.mean.device), refiner, layers=layers)
        maps.append({layer: features.cpu().float() for layer, features in found.items()})
        labels.append(at_patches(domain.ids.to_train[sample.label], backbone.patch_size))
    return {layer: fit_lens(torch.cat([one[layer] for one in maps]), torch.stack(labels)) for layer in layers}


def at_patches(label: np.ndarray, patch: int) -> Tensor:
    """The label (h, w) at the middle of each patch, (H, W) uint8; padding is ignored."""
    label = np.pad(label, [(0, -side % patch) for side in label.shape], constant_values=IGNORE)
    return torch.from_numpy(label[patch // 2 :: patch, patch // 2 :: patch].copy())
