"""The Fourier mathematics: amplitude and phase of patch features and of pictures. Pure functions, no state.

Every transform is two-dimensional, real to half spectrum, and orthonormal (energy is kept). Patch features
(B, H, W, C) are transformed over the patch grid, axes (1, 2); pictures (B, 3, h, w) over their pixels, axes (2, 3).
The half spectrum keeps the columns 0 ... W // 2 of the last transformed axis; the rest follows by symmetry.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

GRID = (1, 2)
PIXELS = (2, 3)


class Spectrum(NamedTuple):
    """Amplitude >= 0 (feature or pixel units) and phase (radians, -pi to pi), both half spectra of one shape."""

    amplitude: Tensor
    phase: Tensor


def transform(x: Tensor, axes: tuple[int, int] = GRID) -> Tensor:
    """Complex half spectrum of a real 4-D tensor over two of its axes; half precision is computed in float32.

    Raises ValueError if x is not 4-D. Source: SET, Sec. 3.1.
    """
    return torch.fft.rfft2(_checked(x), dim=axes, norm="ortho")


def invert(spectrum: Tensor, size: tuple[int, int], axes: tuple[int, int] = GRID) -> Tensor:
    """The real tensor of a complex half spectrum; size: length of the two axes (it tells W = 2n from W = 2n + 1)."""
    return torch.fft.irfft2(spectrum, s=size, dim=axes, norm="ortho")


def split_spectrum(x: Tensor, axes: tuple[int, int] = GRID) -> Spectrum:
    """Amplitude and phase; only the two axes are transformed, so images of a batch and channels never mix.

    Where the amplitude vanishes the phase is 0, and so are the gradients through both (0 has no phase).
    x: 4-D, real. Returns two half spectra, float32 for half precision. Raises ValueError if x is not 4-D.
    Source: SET, Sec. 3.1.
    """
    x = _checked(x)
    if axes == GRID and x.device.type == "cpu":
        return Spectrum(*_ToPolar.apply(*_grid_parts(x)))
    spectrum = transform(x, axes)
    return Spectrum(*_ToPolar.apply(spectrum.real, spectrum.imag))


def join_spectrum(spectrum: Spectrum, size: tuple[int, int], axes: tuple[int, int] = GRID) -> Tensor:
    """The inverse of `split_spectrum`; size: length of the two axes. Source: SET, Sec. 3.1."""
    parts = _FromPolar.apply(*map(_checked, spectrum))
    if axes == GRID and parts.device.type == "cpu":
        return _grid_signal(parts, size[1])
    return invert(torch.complex(*parts.unbind(1)), size, axes)


def _checked(x: Tensor) -> Tensor:
    """x in float32 or float64. Raises ValueError if it is not 4-D."""
    if x.ndim != 4:
        raise ValueError(f"Expected a 4-D tensor (a batch of feature maps or pictures), got shape {tuple(x.shape)}.")
    return x if x.dtype == torch.float64 else x.float()


def _is_empty(amplitude: Tensor) -> Tensor:
    """Where an amplitude is too small for its square to be a number: there is no phase."""
    return amplitude <= torch.finfo(amplitude.dtype).tiny ** 0.5


class _ToPolar(torch.autograd.Function):
    """Real and imaginary part -> amplitude and phase; only these two are kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        amplitude = torch.hypot(real, imaginary)
        phase = torch.atan2(imaginary, real).masked_fill_(_is_empty(amplitude), 0)
        ctx.save_for_backward(amplitude, phase)
        return amplitude, phase

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor, around: Tensor) -> tuple[Tensor, Tensor]:
        amplitude, phase = ctx.saved_tensors
        empty = _is_empty(amplitude)
        along, around = along.masked_fill(empty, 0), (around / amplitude).masked_fill_(empty, 0)
        cos, sin = phase.cos(), phase.sin()
        return (along * cos).addcmul_(around, sin, value=-1), (along * sin).addcmul_(around, cos)


class _FromPolar(torch.autograd.Function):
    """Amplitude and phase, (B, ...) each -> real and imaginary part, (B, 2, ...); the inverse of `_ToPolar`."""

    @staticmethod
    def forward(ctx: Any, amplitude: Tensor, phase: Tensor) -> Tensor:
        ctx.save_for_backward(amplitude, phase)
        parts = torch.stack([phase.cos(), phase.sin()], 1)
        return parts.mul_(amplitude.unsqueeze(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, parts: Tensor) -> tuple[Tensor, Tensor]:
        amplitude, phase = ctx.saved_tensors
        (real, imaginary), cos, sin = parts.unbind(1), phase.cos(), phase.sin()
        along = (real * cos).addcmul_(imaginary, sin)
        return along, (imaginary * cos).addcmul_(real, sin, value=-1).mul_(amplitude)


@lru_cache(maxsize=32)
def _dft_matrices(height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The orthonormal transform over a patch grid as real matrices: rows, rows back, columns.

    rows: (2V, W) to the real and imaginary parts of the V = W // 2 + 1 half-spectrum columns; rows back: (W, 2V), which
    counts the columns that stand for two twice; columns: (2H, 2H), (h, part) to (part, u), orthogonal.
    """
    angle = 2 * math.pi / width * (torch.arange(width // 2 + 1)[:, None] * torch.arange(width) % width).double()
    rows = torch.cat([angle.cos(), -angle.sin()]) / math.sqrt(width)
    twice = 2 - _is_own_partner(width).double()
    angle = 2 * math.pi / height * (torch.arange(height)[:, None] * torch.arange(height) % height).double()
    cos, sin = angle.cos() / math.sqrt(height), angle.sin() / math.sqrt(height)
    columns = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)])  # (part, u, h, part)
    back = (rows * twice.repeat(2)[:, None]).T
    return tuple(m.to(dtype).contiguous() for m in (rows, back, columns.reshape(2 * height, 2 * height)))


def _grid_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary half spectrum, (B, H, W // 2 + 1, C) each, of x (B, H, W, C).

    Two products with small matrices: for grids of patches they take a quarter of the FFT's time, which must first bring
    each channel's patches together; the channels stay where the tokens want them.
    """
    b, h, w, c = x.shape
    with torch.autocast(x.device.type, enabled=False):
        rows, _, columns = _dft_matrices(h, w, x.dtype)
        parts = torch.bmm(rows.expand(b * h, -1, -1), x.reshape(b * h, w, c))  # (BH, 2V, C)
        parts = torch.bmm(columns.expand(b, -1, -1), parts.view(b, 2 * h, -1))  # (B, 2H, VC)
    return parts.view(b, 2, h, -1, c).unbind(1)


def _grid_signal(parts: Tensor, width: int) -> Tensor:
    """The inverse of `_grid_parts`: (B, 2, H, W // 2 + 1, C) -> (B, H, W, C)."""
    b, _, h, v, c = parts.shape
    with torch.autocast(parts.device.type, enabled=False):
        _, back, columns = _dft_matrices(h, width, parts.dtype)
        x = torch.bmm(columns.T.expand(b, -1, -1), parts.reshape(b, 2 * h, v * c))  # (B, 2H, VC)
        x = torch.bmm(back.expand(b * h, -1, -1), x.view(b * h, 2 * v, c))  # (BH, W, C)
    return x.view(b, h, width, c)


def unit_phasor(spectrum: Tensor) -> Tensor:
    """exp(j phase) of a complex tensor; 1 with zero gradient where the amplitude vanishes (0 has no phase)."""
    amplitude = spectrum.abs()
    empty = _is_empty(amplitude)
    return torch.where(empty, torch.ones_like(spectrum), spectrum) / torch.where(empty, 1, amplitude)


def _is_own_partner(width: int) -> Tensor:
    """Which half-spectrum columns, (W // 2 + 1,), hold both partners of each pair: 0 and, for even widths, W / 2."""
    column = torch.arange(width // 2 + 1)
    return (2 * column) % width == 0


def mirror_rows(half: Tensor, rows: int = 1) -> Tensor:
    """half with frequency u replaced by -u along axis `rows`; bin 0 stays."""
    return half.flip(rows).roll(1, rows)


def make_phase_change_odd(change: Tensor, width: int) -> Tensor:
    """A change of phase that keeps a half spectrum that of a real signal.

    A real signal's phase is odd: rho(-u, -v) = -rho(u, v). The columns v = 0 and, for even widths, v = W / 2 hold both
    partners; there the odd part of the change is taken (so nothing turns at the bins that are their own partners).
    change: (B, H, W // 2 + 1, C), radians; width: W. Same shape comes back.
    """
    last = change.shape[2] - (width % 2 == 0)
    ends = [(column - mirror_rows(column)) / 2 for column in (change[:, :, :1], change[:, :, max(last, 1) :])]
    return torch.cat([ends[0], change[:, :, 1:last], ends[1]], dim=2)


def full_spectrum(half: Tensor, width: int) -> Tensor:
    """The full complex spectrum (B, H, W, C) of a half one (B, H, W // 2 + 1, C), by Hermitian symmetry."""
    rest = half[:, :, 1 : (width + 1) // 2].conj().resolve_conj()
    return torch.cat([half, mirror_rows(rest).flip(2)], dim=2)


def frequency_radius(size: tuple[int, int]) -> Tensor:
    """Distance from zero frequency of every half-spectrum bin, (H, W // 2 + 1).

    0 is the mean, 1 the highest frequency along an axis (Nyquist), up to sqrt(2) in the corners.
    """
    u, v = torch.fft.fftfreq(size[0]), torch.fft.rfftfreq(size[1])
    return 2 * torch.hypot(u[:, None], v[None, :])


def band_mask(size: tuple[int, int], low: float = 0.0, high: float = 1.5) -> Tensor:
    """1 where low <= frequency radius <= high, else 0; (H, W // 2 + 1) float32."""
    radius = frequency_radius(size)
    return ((radius >= low) & (radius <= high)).float()


def mix_amplitude(
    content: Tensor,
    style: Tensor,
    weight: float = 1.0,
    low: float = 0.0,
    high: float = 1.5,
    axes: tuple[int, int] = GRID,
) -> Tensor:
    """Content with its amplitude moved towards the style's by `weight` within a band; its phase is kept.

    Weight 1 over all frequencies is the full swap, over a low band FDA, weight < 1 AmpMix; with content and style
    exchanged it swaps the phase (APR). content, style: 4-D of one shape. Returns content's shape and type.
    Raises ValueError if the shapes differ. Source: FDA (Yang, CVPR 2020), FACT/AmpMix (Xu, CVPR 2021).
    """
    one, other, mask, size = _pair(content, style, weight, low, high, axes)
    mixed = torch.lerp(one.abs(), other.abs(), mask)
    return invert(mixed * unit_phasor(one), size, axes).to(content.dtype)


def mix_phase(
    content: Tensor,
    style: Tensor,
    weight: float = 1.0,
    low: float = 0.0,
    high: float = 1.5,
    axes: tuple[int, int] = GRID,
) -> Tensor:
    """Content with its phase turned towards the style's by `weight` within a band; its amplitude is kept.

    The counterpart of `mix_amplitude`. Phases are mixed as points of the unit circle: pi and -pi are neighbours.
    Source: APR (Chen, ICCV 2021) at weight 1.
    """
    one, other, mask, size = _pair(content, style, weight, low, high, axes)
    turned = unit_phasor(torch.lerp(unit_phasor(one), unit_phasor(other), mask.to(one)))
    return invert(one.abs() * turned, size, axes).to(content.dtype)


def _pair(
    content: Tensor, style: Tensor, weight: float, low: float, high: float, axes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Both spectra, how far to go at each frequency, and the size of the two axes."""
    if content.shape != style.shape:
        raise ValueError(
            f"Content {tuple(content.shape)} and style {tuple(style.shape)} differ in shape: resize one to the other."
        )
    size = (content.shape[axes[0]], content.shape[axes[1]])
    one, other = transform(content, axes), transform(style, axes)
    mask = weight * band_mask(size, low, high).to(one.real)
    mask = mask[:, :, None] if axes == GRID else mask
    return one, other, mask.expand_as(one), size


def log_amplitude_picture(x: Tensor, axes: tuple[int, int] = PIXELS) -> Tensor:
    """log(1 + amplitude) of the full spectrum, zero frequency in the middle, averaged over channels; (B, h, w)."""
    amplitude = torch.fft.fft2(x.float(), dim=axes, norm="ortho").abs()
    return torch.fft.fftshift(amplitude, dim=axes).log1p().mean(6 - sum(axes))


def radial_profile(x: Tensor, bins: int = 32, axes: tuple[int, int] = PIXELS) -> tuple[Tensor, Tensor]:
    """Mean log amplitude by frequency radius: radii (bins,) and profile (B, bins), averaged over channels."""
    size = (x.shape[axes[0]], x.shape[axes[1]])
    amplitude = transform(x, axes).abs().log1p().mean(6 - sum(axes))  # (B, H, W // 2 + 1)
    radius = frequency_radius(size).flatten()
    index = (radius / radius.max() * bins).long().clamp(max=bins - 1)
    total = torch.zeros(len(x), bins, dtype=amplitude.dtype).index_add_(1, index, amplitude.flatten(1))
    count = torch.bincount(index, minlength=bins)
    return (torch.arange(bins) + 0.5) / bins * radius.max(), total / count.clamp(min=1)
