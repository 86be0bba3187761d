"""Fast forms of two functions of `spectral.py` over the patch grid, equal to it to 1e-6 in values and gradients.

SET's layers call these. The same two names imported from `spectral` instead do the same, in more time and memory:
the FFT must first bring each channel's patches together, where two products with small matrices take less than half its
time; and the gradients here are written out, in place, and need only amplitude and phase. `to_parts` and `from_parts`
are the transform alone, which `analysis/tokens.py` takes a hundred times a picture.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from setlib import spectral
from setlib.spectral import Spectrum, is_empty, own_partners


def split_spectrum(x: Tensor) -> Spectrum:
    """`spectral.split_spectrum` of features (B, H, W, C)."""
    return Spectrum(*_Split.apply(spectral._checked(x)))


def join_spectrum(spectrum: Spectrum, size: tuple[int, int]) -> Tensor:
    """`spectral.join_spectrum` to features (B, H, W, C); size: (H, W)."""
    return _Join.apply(*map(spectral._checked, spectrum), size)


class _Split(torch.autograd.Function):
    """x -> amplitude and phase; only these two are kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = to_parts(x).add_(0.0).unbind(1)  # -0 becomes 0, lest a phase of pi become -pi
        amplitude, phase = real.square().addcmul_(imaginary, imaginary).sqrt_(), torch.atan2(imaginary, real)
        phase.masked_fill_(is_empty(amplitude), 0)
        ctx.save_for_backward(amplitude, phase)
        ctx.size = x.shape[1:3]
        return amplitude, phase

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor, around: Tensor) -> Tensor:
        amplitude, phase = ctx.saved_tensors
        return from_parts(_turn_back(amplitude, phase, along, around), ctx.size, transposed=True)


def _turn_back(amplitude: Tensor, phase: Tensor, along: Tensor, around: Tensor) -> Tensor:
    """Gradients along the amplitude and around the phase -> those of real and imaginary part; 0 where it is empty.

    A function of its own, so that what it needs on the way is freed before these are transformed.
    """
    empty = is_empty(amplitude)
    around = amplitude.reciprocal().masked_fill_(empty, 0).mul_(around)
    parts = amplitude.new_empty(len(amplitude), 2, *amplitude.shape[1:])
    real, imaginary = parts.unbind(1)
    cos, sin = phase.cos().masked_fill_(empty, 0), torch.sin(phase, out=real)  # the sine is 0 there
    torch.mul(sin, along, out=imaginary).addcmul_(cos, around)
    torch.sub(cos.mul_(along), sin.mul_(around), out=real)
    return parts


class _Join(torch.autograd.Function):
    """Amplitude and phase -> x; the inverse of `_Split`."""

    @staticmethod
    def forward(ctx: Any, amplitude: Tensor, phase: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(amplitude, phase)
        parts = amplitude.new_empty(len(amplitude), 2, *amplitude.shape[1:])
        torch.cos(phase, out=parts[:, 0]).mul_(amplitude)
        torch.sin(phase, out=parts[:, 1]).mul_(amplitude)
        return from_parts(parts, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        amplitude, phase = ctx.saved_tensors
        real, imaginary = to_parts(gradient, transposed=True).unbind(1)
        along, sin = phase.cos().mul_(real), phase.sin()
        along.addcmul_(imaginary, sin)
        real.mul_(sin)
        around = torch.cos(phase, out=sin).mul_(imaginary).sub_(real).mul_(amplitude)
        return along, around, None


def to_parts(x: Tensor, transposed: bool = False) -> Tensor:
    """`spectral.transform` without complex numbers: real and imaginary part, (B, H, W, C) -> (B, 2, H, W // 2 + 1, C).

    transposed: the transpose of `from_parts`, which is its gradient: columns that stand for two count twice.
    """
    b, h, w, c = x.shape
    with torch.autocast(x.device.type, enabled=False):
        rows, back, columns = _dft_matrices(h, w, x.dtype, x.device)
        parts = torch.matmul(back.T if transposed else rows, x)  # (B, H, 2V, C), V = W // 2 + 1
        parts = torch.matmul(columns, parts.view(b, 2 * h, -1))  # (B, 2H, VC)
    return parts.view(b, 2, h, -1, c)


def from_parts(parts: Tensor, size: tuple[int, int], transposed: bool = False) -> Tensor:
    """The inverse of `to_parts`, (B, 2, H, W // 2 + 1, C) -> (B, H, W, C), or its transpose; size: (H, W)."""
    b, _, h, v, c = parts.shape
    with torch.autocast(parts.device.type, enabled=False):
        rows, back, columns = _dft_matrices(*size, parts.dtype, parts.device)
        parts = torch.matmul(columns.T, parts.reshape(b, 2 * h, v * c))  # (B, 2H, VC)
        return torch.matmul(rows.T if transposed else back, parts.view(b, h, 2 * v, c))  # (B, H, W, C)


@lru_cache(maxsize=32)
def _dft_matrices(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The orthonormal transform over a patch grid as real matrices: rows, rows back, columns.

    rows: (2V, W) to the real and imaginary parts of the V = W // 2 + 1 half-spectrum columns; rows back: (W, 2V), which
    counts the columns that stand for two twice; columns: (2H, 2H), (h, part) to (part, u), orthogonal.
    """
    cos, sin = _waves(width, width // 2 + 1)
    rows = torch.cat([cos, -sin])
    counts = torch.where(own_partners(width)[: width // 2 + 1], 1.0, 2.0)
    back = (rows * counts.repeat(2)[:, None]).T
    cos, sin = _waves(height, height)
    columns = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)])  # (part, u, h, part)
    columns = columns.reshape(2 * height, 2 * height)
    return tuple(matrix.to(device, dtype).contiguous() for matrix in (rows, back, columns))


def _waves(length: int, count: int) -> tuple[Tensor, ...]:
    """Cosine and sine of the first `count` frequencies, (count, length), orthonormal; zeros are exact."""
    angle = 2 * math.pi / length * (torch.arange(count)[:, None] * torch.arange(length) % length).double()
    return tuple(wave.masked_fill(wave.abs() < 1e-12, 0) / math.sqrt(length) for wave in (angle.cos(), angle.sin()))
