"""Private: what the C library does with the memory that a step on the CPU frees."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import torch

MALLOC = {-1: 2**31 - 1, -2: 2**28, -3: 2**25}  # bytes; from malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Lets the C library keep what a step on the CPU frees for the next one; given back, it would come zeroed anew."""
    if not torch.cuda.is_available() and sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library than GNU's
            for option, value in MALLOC.items():
                ctypes.CDLL(None).mallopt(option, value)
