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

from setlib.analysis.factorial import ALL, PARTS, band_products
from setlib.analysis.survey import evenly
from setlib.backbone import FrozenBackbone
from setlib.data.augment import fit, resize, to_tensor
from setlib.data.domains import Domain
from setlib.data.labels import CITYSCAPES, IGNORE
from setlib.tokens import Refiner

RIDGE = 1e-2  # in units of the variance of the features
PRESENT = 0.01  # a class is in a picture that shows it on this share of the pixels
SHUFFLES = 20


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
    backbone: FrozenBackbone, domain: Domain, layers: Sequence[int], pictures: int = 16, refiner: Refiner | None = None
) -> dict[int, Lens]:
    """A lens for each layer, fitted to a labelled domain of the 19 train classes: {layer: Lens}.

    Pictures are as large as they are predicted. refiner: the features are those that it leaves.
    """
    maps, labels = [], []
    for _, sample in domain.samples(evenly(len(domain), pictures)):
        image, label = to_tensor(sample.image), torch.from_numpy(domain.ids.to_train[sample.label])
        size = fit(image, domain.data.long_edge)
        found = backbone(resize(image, size).to(backbone.mean.device), refiner, layers=layers)
        maps.append({layer: features.cpu().float() for layer, features in found.items()})
        label = F.interpolate(label[None, None].float(), size=size, mode="nearest-exact")[0, 0].byte()
        labels.append(at_patches(label.numpy(), backbone.patch_size))
    return {layer: fit_lens(torch.cat([one[layer] for one in maps]), torch.stack(labels)) for layer in layers}


def at_patches(label: np.ndarray, patch: int) -> Tensor:
    """The label (h, w) at the middle of each patch, (H, W) uint8; padding is ignored."""
    label = np.pad(label, [(0, -side % patch) for side in label.shape], constant_values=IGNORE)
    return torch.from_numpy(label[patch // 2 :: patch, patch // 2 :: patch].copy())


@torch.no_grad()
def tell_apart(
    backbone: FrozenBackbone,
    domains: Sequence[Domain],
    layers: Sequence[int],
    long_edge: int,
    pictures: int = 40,
    blocks: int = 4,
    seed: int = 0,
) -> list[dict]:
    """How well a linear reading of amplitude alone, or of phase alone, tells two domains apart, and knows the classes.

    Pictures of both, evenly spaced and resized to one size; cross-validated over `blocks` of neighbours, so that frames
    of one stretch of a video are never on both sides. Rows with layer (0: pixels), part, band, and accuracies in
    percent, 50 is chance: domain, its worst and its best block (domain low, domain high), shuffled (domain labels
    shuffled, mean), and classes: whether a class is in a picture, mean over the classes that some pictures have and
    some have not. All accuracies are balanced.
    """
    images, present, owner, block = [], [], [], []
    for number, domain in enumerate(domains):
        chosen = evenly(len(domain), pictures)
        for place, (_, sample) in enumerate(domain.samples(chosen)):
            image = to_tensor(sample.image)
            images.append(resize(image, images[0].shape[-2:] if images else fit(image, long_edge)))
            label = domain.ids.to_train[sample.label] if sample.label is not None else np.full(1, IGNORE)
            present.append(np.bincount(label.ravel(), minlength=256)[: len(CITYSCAPES)] >= PRESENT * label.size)
            owner.append(number)
            block.append(place * blocks // len(chosen))
    present, owner, block = np.array(present), np.array(owner), np.array(block)
    seen = present.mean(0)
    targets = np.concatenate([owner[:, None] == 1, present[:, (seen > 0.1) & (seen < 0.9)]], 1)
    order = np.random.default_rng(seed)
    shuffled = [order.permutation(targets[:, 0]) for _ in range(SHUFFLES)]
    count, targets = targets.shape[1], np.column_stack([targets, *shuffled])
    maps = [backbone(image, layers=layers) for image in images]
    rows = []
    for layer in (0, *layers):
        x = torch.cat([one[layer] for one in maps]) if layer else torch.cat(images).permute(0, 2, 3, 1)
        for part in PARTS:
            for band, products in band_products(x, part).items():
                right = cross_validated(products, targets, block)
                accuracy = balanced(right, targets)
                folds = [balanced(right[block == b], targets[block == b])[0] for b in range(blocks)]
                row = {"layer": layer, "part": part, "band": band, "domain": accuracy[0]}
                row |= {"domain low": min(folds), "domain high": max(folds), "shuffled": accuracy[count:].mean()}
                rows.append(row | {"classes": accuracy[1:count].mean() if count > 1 else None})
    return rows


def cross_validated(products: np.ndarray, targets: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Which pictures are read rightly, (N, T) bool, by ridge regression on all blocks but their own.

    products: (N, N) inner products of what is read; targets: (N, T) bool; block: (N,).
    """
    right = np.zeros(targets.shape, bool)
    for one in np.unique(block):
        known, asked = block != one, block == one
        inner, y = products[np.ix_(known, known)], 2.0 * targets[known] - 1
        mean = inner.mean(0)
        inner = inner - mean - mean[:, None] + mean.mean()
        outer = products[np.ix_(asked, known)]
        outer = outer - outer.mean(1, keepdims=True) - mean + mean.mean()
        ridge = 0.1 * max(np.trace(inner) / len(inner), 1e-12)
        weights = np.linalg.solve(inner + ridge * np.eye(len(inner)), y - y.mean(0))
        right[asked] = (outer @ weights + y.mean(0) > 0) == targets[asked]
    return right


def balanced(right: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean of the shares of yes and of no that are read rightly, (T,) percent."""
    shares = [np.where(side, right, 0).sum(0) / np.maximum(side.sum(0), 1) for side in (targets, ~targets)]
    return 50 * (shares[0] + shares[1])


def reveal_phase(rows: Sequence[dict]) -> dict:
    """What `plots.reveal` shows of phases alone after the last layer: how well they tell the domains apart."""
    own = next(r for r in rows[::-1] if (r["part"], r["band"]) == ("phase", ALL))
    ends = own["domain low"], own["domain high"]
    label = f"balanced accuracy of phases alone after layer {own['layer']} (%); bar: worst to best stretch"
    return {"claim": 50, "result": own["domain"], "placebo": own["shuffled"], "ends": ends, "label": label}


def say_apart(rows: Sequence[dict], names: Sequence[str]) -> str:
    """What `tell_apart` found of two domains, as Markdown sentences."""
    lines = [f"Of **{names[0]}** and **{names[1]}**, balanced accuracies, 50 % is chance:", ""]
    if all(name.startswith("scenes:") for name in names):
        lines[0] = "A rehearsal: both are rendered, and the same streets. " + lines[0]
    for layer in dict.fromkeys(row["layer"] for row in rows):
        whole = {row["part"]: row for row in rows if (row["layer"], row["band"]) == (layer, ALL)}
        best = {
            part: max((row for row in rows if (row["layer"], row["part"]) == (layer, part)), key=lambda r: r["domain"])
            for part in PARTS
        }
        told = " and ".join(
            f"{part} alone with {row['domain']:.0f} % (best band: {best[part]['band']}, {best[part]['domain']:.0f} %)"
            for part, row in whole.items()
        )
        known = [row["classes"] for row in whole.values()]
        classes = "" if None in known else f"; the classes in a picture, with {known[0]:.0f} % and {known[1]:.0f} %"
        where = f"after layer {layer}" if layer else "in the pixels"
        lines.append(f"- {where} the domain is told by {told}{classes}.")
    shuffled = [row["shuffled"] for row in rows]
    return "\n".join([*lines, f"- With shuffled domain labels: {min(shuffled):.0f} to {max(shuffled):.0f} %."])
