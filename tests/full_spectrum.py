"""The whole of a half spectrum, by its own formula: what tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from setlib import spectral


def full_spectrum(half: Tensor, width: int) -> Tensor:
    """The full complex spectrum (B, H, W, C) of a half one (B, H, W // 2 + 1, C), by Hermitian symmetry."""
    rest = half[:, :, 1 : (width + 1) // 2].conj().resolve_conj()
    return torch.cat([half, spectral.mirror_rows(rest).flip(2)], dim=2)
