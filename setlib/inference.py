"""Whole pictures: cut into windows at every scale, scored, put together again, and the class of every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from setlib._memory import label_map
from setlib.data.augment import attenuate, fit, resize, to_tensor
from setlib.data.decode import read_picture
from setlib.features import FrozenFeatures
from setlib.segmenter import Segmenter


class Windows(NamedTuple):
    """A picture at inference size cut into windows: (n, 3, h, w), their corners, and the picture's (h, w).

    flipped: whether the picture was mirrored before.
    """

    images: Tensor
    corners: list[tuple[int, int]]
    size: tuple[int, int]
    flipped: bool = False


def cut(pixels: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Windows:
    """Windows (h, w) of a picture (3, H, W), from the upper left in steps of `stride`; the last ones end with it.

    Where the picture is smaller than a window its last pixels are repeated. Source: the field's sliding window, as in
    the released configurations.
    """
    size = pixels.shape[1:]
    below, right = (max(0, w - s) for w, s in zip(window, size, strict=True))
    padded = F.pad(pixels[None], (0, right, 0, below), mode="replicate")[0]
    rows, columns = (
        [*range(0, length - side, step), length - side]
        for length, side, step in zip(padded.shape[1:], window, stride, strict=True)
    )
    corners = [(y, x) for y in rows for x in columns]
    cuts = [padded[:, y : y + window[0], x : x + window[1]] for y, x in corners]
    return Windows(torch.stack(cuts), corners, (size[0], size[1]))


def blend(scores: Tensor, windows: Windows) -> Tensor:
    """Scores of windows (n, K, h, w) as those of their picture, (K, H, W): the mean where windows overlap."""
    h, w = scores.shape[-2:]
    extent = [max(corner[i] for corner in windows.corners) + side for i, side in enumerate((h, w))]
    total, count = scores.new_zeros(scores.shape[1], *extent), scores.new_zeros(extent)
    for score, (y, x) in zip(scores, windows.corners, strict=True):
        total[:, y : y + h, x : x + w] += score
        count[y : y + h, x : x + w] += 1
    blended = (total / count)[:, : windows.size[0], : windows.size[1]]
    return blended.flip(-1) if windows.flipped else blended


def predict(model: Segmenter, image: Any) -> np.ndarray:
    """Train ids (h, w) uint8 of one picture, at the picture's own size.

    image: a path, a PIL picture of any mode, or an (h, w, 3) uint8 array. EXIF rotation is applied.
    Raises ValueError if it is no picture.
    """
    pixels = read_picture(image)
    return label_map(class_probabilities(model, cut_picture(model, pixels)), pixels.shape[:2])


def cut_picture(model: Segmenter, image: np.ndarray, long_edge: int = 0) -> list[Windows]:
    """A picture (h, w, 3) uint8 at every scale of the experiment, and mirrored if it says so, cut into windows.

    long_edge: of the picture at scale 1, pixels; 0 = data.long_edge.
    """
    data, settings = model.experiment.data, model.experiment.inference
    pixels = to_tensor(image)
    found = []
    for scale in settings.scales:
        size = fit(pixels, long_edge or data.long_edge, scale)
        resized, padded = attenuate(resize(pixels, size), data)[0], model.padded_size(size)
        window = padded if settings.whole else (min(data.height, padded[0]), min(data.width, padded[1]))
        stride = (max(1, round(window[0] * settings.stride)), max(1, round(window[1] * settings.stride)))
        found.append(cut(resized, window, stride))
        if settings.flip:
            found.append(cut(resized.flip(-1), window, stride)._replace(flipped=True))
    return found


@torch.no_grad()
def class_probabilities(
    model: Segmenter, passes: Sequence[Windows], frozen: Sequence[FrozenFeatures | None] = ()
) -> Tensor:
    """Class probabilities of a picture at its first pass's size, (19, h, w): the mean over windows and passes.

    passes: of `cut_picture`, one a scale and mirroring. frozen: features of each pass's windows.
    """
    blended = []
    for windows, kept in zip(passes, frozen or [None] * len(passes), strict=True):
        scores, (h, w) = [], windows.images.shape[-2:]
        for part in torch.arange(len(windows.images)).split(model.experiment.inference.windows):
            output = model(windows.images[part].to(model.device), kept and kept[part])
            scores.append(model.pixel_probabilities(output, (h, w)).cpu())
        whole = blend(torch.cat(scores), windows)
        if whole.shape[1:] != passes[0].size:
            whole = F.interpolate(whole[None], passes[0].size, mode="bilinear", align_corners=False)[0]
        blended.append(whole)
    return sum(blended[1:], start=blended[0]) / len(passes)
