"""What tokens do, in numbers: where they attend, over the spectrum and over the picture, and what they change.

Also the shapes of a batch on its way past them. Everything here measures; drawing is in the room `plots`, the refiners
are in `tokens.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from setlib import _kernels
from setlib.analysis.spectra import PARTS, compare
from setlib.data.augment import to_image
from setlib.inference import cut_picture
from setlib.mixing import Wrapped
from setlib.segmenter import Segmenter
from setlib.tokens import Refiner, TokenBranch

BANDS = ("low", "high")  # branches of tokens that read wavelets


class Intervened(Wrapped):
    """A refiner with something else done behind one layer: `change(features, layer)` in place of its own call."""

    def __init__(self, refiner: Refiner, layer: int, change: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__(refiner, layer)
        self.layer, self.change = layer, change

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.change(features, layer) if layer == self.layer else super().forward(features, layer)


class Attention(NamedTuple):
    """What one branch of a refiner attends to after one layer.

    spectrum: share of each token at each position of the half spectrum, (H, W // 2 + 1, M), for a branch that reads
    amplitude or phase, else None. picture: (H, W, M), the share at each patch for a branch that reads patches or
    wavelets; for the others `over_picture`. influence: (M,) mean share times the length of what a token adds; token 0
    adds nothing.
    """

    layer: int
    branch: str
    spectrum: np.ndarray | None
    picture: np.ndarray
    influence: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """The attention itself: sums to 1 over the tokens."""
        return self.picture if self.spectrum is None else self.spectrum


class Reading(NamedTuple):
    """`read_tokens`: the window (h, w, 3) uint8 that was read, attention by branch and layer, change by layer."""

    picture: np.ndarray
    attention: list[Attention]
    changes: list[dict]


@torch.no_grad()
def read_tokens(model: Segmenter, image: np.ndarray | Tensor) -> Reading:
    """What the tokens attend to and change on one picture, caught while the model runs.

    image: (h, w, 3) uint8, of which the middle window is read; a tensor (1, 3, h, w) in [0, 1] is read as it is.
    changes: per refined layer, `compare` of the features before and after the refiner. Without tokens (refiner none)
    attention and changes are empty.
    """
    if not isinstance(image, Tensor):
        windows = cut_picture(model, image)[0].images
        image = windows[len(windows) // 2][None]
    inputs, attention, changes = {}, [], []

    def read(refiner: Refiner, given: tuple[Tensor, int], refined: Tensor) -> None:
        features, layer = given
        changes.append({"layer": layer, **compare(features, refined)})
        for name, branch in refiner.branches().items():
            attention.append(_attention(branch, name, layer, features, *inputs[branch]))

    with ExitStack() as hooks:
        for branch in model.refiner.branches().values():
            hooks.enter_context(branch.register_forward_pre_hook(inputs.__setitem__))
        hooks.enter_context(model.refiner.register_forward_hook(read))
        model.backbone(image.to(model.device), model.refiner)
    return Reading(to_image(image), attention, changes)


def _attention(branch: TokenBranch, name: str, layer: int, features: Tensor, x: Tensor, index: int) -> Attention:
    """One branch on its own input x, for the features (1, H, W, C) of a layer, the branch's number `index`."""
    share, (height, width) = branch.attention(x, index), features.shape[1:3]
    if name in BANDS:  # of wavelets, (1 or 3, H'W', M): the mean over the bands, at the patches of each square
        share = share.mean(0).unflatten(0, (-(-height // 2), -1)).repeat_interleave(2, 0).repeat_interleave(2, 1)
        share = share[:height, :width]
    else:
        share = share.flatten(0, 1).unflatten(0, (height, -1))
    added = branch.token_map(branch.tokens.of_layer(index)) @ branch.delta_map.weight.T  # (M, C)
    influence = (share.mean((0, 1)) * added.norm(dim=1)).cpu().numpy()
    influence[0] = 0
    spectrum, picture = None, share
    if name in PARTS and len(x) == 1 and share.shape[1] == width // 2 + 1:  # else read patch by patch
        spectrum, picture = share.cpu().numpy(), over_picture(features, share)
    return Attention(layer, name, spectrum, picture.cpu().numpy(), influence)


def over_picture(features: Tensor, share: Tensor) -> Tensor:
    """Attention over the spectrum, mapped back over the picture: (H, W, M).

    The spectrum of features (1, H, W, C) is weighted with each token's share (H, W // 2 + 1, M) and transformed back;
    these parts of the features sum to the features. Returned is the length of a token's part of a patch's feature, in
    units of the feature's length: where in the picture the frequencies lie that a token attends to.
    """
    parts, size = _kernels.to_parts(features), features.shape[1:3]
    own = [_kernels.from_parts(parts * one[..., None], size)[0].norm(dim=-1) for one in share.unbind(-1)]
    return torch.stack(own, -1) / features[0].norm(dim=-1, keepdim=True).clamp(min=1e-12)


def attention_table(reading: Reading, top: int = 3) -> list[dict]:
    """Per layer and branch: entropy (1 = spread evenly over all tokens), share of token 0, most influential tokens."""
    return [
        {
            "layer": one.layer,
            "branch": one.branch,
            "entropy": float(stats.entropy(one.share, base=one.share.shape[-1], axis=-1).mean()),
            "token 0 (%)": 100 * one.share[..., 0].mean(),
            "top tokens": [int(i) for i in np.argsort(-one.influence, kind="stable")[:top] if one.influence[i] > 0],
        }
        for one in reading.attention
    ]


@torch.no_grad()
def shape_trace(model: Segmenter, images: Tensor) -> list[dict]:
    """What each stage hands to the next: rows of stage, axes and shape, in the order in which they are made.

    images: (B, 3, h, w) in [0, 1]. Of the refined layers the first is followed inside.
    """
    rows: list[dict] = []

    def note(stage: str, axes: str, _: object, given: tuple, answer: Tensor | None = None) -> None:
        shape = (given[0] if answer is None else answer).shape
        rows.append({"stage": stage, "axes": axes, "shape": " x ".join(map(str, shape))})

    note("images", "B, 3, h, w", None, (images,))
    parts = {f"the {name} tokens": ("B, positions, C", branch) for name, branch in model.refiner.branches().items()}
    parts["the refiner"] = ("B, H, W, C", model.refiner)
    with ExitStack() as hooks:
        for name, (axes, module) in parts.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(note, f"into {name}", axes)))
            hooks.enter_context(module.register_forward_hook(partial(note, f"out of {name}", axes)))
        maps = model.backbone(images.to(model.device), model.refiner, model.feature_layers)
    del rows[1 + 2 * len(parts) :]  # what the other layers do is the same
    for layer, found in maps.items():
        note(f"features after layer {layer}, to the head", "B, H, W, C", None, (found,))
    output = model.head(list(maps.values()), model.refiner.queries())
    note("class probabilities", "B, K, h, w", None, (model.pixel_probabilities(output, tuple(images.shape[-2:])),))
    return rows
