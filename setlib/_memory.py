"""Private: what saves memory: large pictures are labelled in strips, what a step frees is kept for the next one."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

STRIP_PIXELS = 2**21  # rows of the output are scored in strips of at most so many pixels
MALLOC = {-1: 2**31 - 1, -2: 2**28, -3: 2**25}  # bytes; from malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Lets the C library keep what a step on the CPU frees for the next one; given back, it would come zeroed anew."""
    if not torch.cuda.is_available() and sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library than GNU's
            for option, value in MALLOC.items():
                ctypes.CDLL(None).mallopt(option, value)


def label_map(scores: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Class of the highest score at every pixel of `size`, (h, w) uint8; scores: (K, h', w'), bilinearly resized.

    Rows are done in strips, so that a picture of 100 megapixels needs no K x 100 megapixels of memory.
    """
    h, w = size
    if size == scores.shape[1:]:
        return scores.max(0).indices.byte().numpy()
    rows = ((torch.arange(h) + 0.5) * scores.shape[1] / h - 0.5).clamp(0, scores.shape[1] - 1)
    above = rows.long()
    below = (above + 1).clamp(max=scores.shape[1] - 1)
    share = (rows - above)[None, :, None]
    labels = np.empty(size, np.uint8)
    for strip in torch.arange(h).split(max(1, STRIP_PIXELS // w)):
        mixed = torch.lerp(scores[:, above[strip]], scores[:, below[strip]], share[:, strip])
        wide = F.interpolate(mixed[None], size=(len(strip), w), mode="bilinear", align_corners=False)[0]
        labels[strip.numpy()] = wide.max(0).indices.numpy()
    return labels
