"""The Fourier mathematics: amplitude and phase of patch features and of pictures. Pure functions, no state.

Every transform is two-dimensional, real to half spectrum, and orthonormal (energy is kept). Patch features
(B, H, W, C) are transformed over the patch grid, axes (1, 2); pictures (B, 3, h, w) over their pixels, axes (2, 3).
The half spectrum keeps the columns 0 ... W // 2 of the last transformed axis; the rest follows by symmetry.

A phase is a point of the circle: -pi and pi are the same. Where an image's channel has no amplitude but rounding
(`is_empty`) its phase would be chance, and another on each processor: there it is 0 and passes on no gradient.
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
LARGEST_GRID = 128  # patches along an axis up to which the transform is a product with matrices
NOTHING = 1e-6  # of a channel's largest amplitude: what float32 rounds; at and below it there is no phase
OPPOSED = 1e-3  # length below which the mean of two phases has no direction


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

    Where the amplitude is nothing (`is_empty`) the phase is 0, and so are the gradients through both.
    x: 4-D, real. Returns two half spectra, float32 for half precision. Raises ValueError if x is not 4-D.
    Source: SET, Sec. 3.1.
    """
    return Spectrum(*_Split.apply(_checked(x), axes))


def join_spectrum(spectrum: Spectrum, size: tuple[int, int], axes: tuple[int, int] = GRID) -> Tensor:
    """The inverse of `split_spectrum`; size: length of the two axes. Source: SET, Sec. 3.1."""
    return _Join.apply(*map(_checked, spectrum), size, axes)


def _checked(x: Tensor) -> Tensor:
    """x in float32 or float64. Raises ValueError if it is not 4-D."""
    if x.ndim != 4:
        raise ValueError(f"Expected a 4-D tensor (a batch of feature maps or pictures), got shape {tuple(x.shape)}.")
    return x if x.dtype == torch.float64 else x.float()


class _Split(torch.autograd.Function):
    """x -> amplitude and phase; only these two are kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: tuple[int, int]) -> tuple[Tensor, Tensor]:
        real, imaginary = to_parts(x, axes).add_(0.0).unbind(1)  # -0 becomes 0, lest a phase of pi become -pi
        amplitude, phase = real.square().addcmul_(imaginary, imaginary).sqrt_(), torch.atan2(imaginary, real)
        phase.masked_fill_(is_empty(amplitude, axes), 0)
        ctx.save_for_backward(amplitude, phase)
        ctx.size, ctx.axes = (x.shape[axes[0]], x.shape[axes[1]]), axes
        return amplitude, phase

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        amplitude, phase = ctx.saved_tensors
        parts = _turn_back(amplitude, phase, *gradients, is_empty(amplitude, ctx.axes))
        return from_parts(parts, ctx.size, ctx.axes, transposed=True), None


class _Join(torch.autograd.Function):
    """Amplitude and phase -> x; the inverse of `_Split`. Works in place, to need little memory beside what it keeps."""

    @staticmethod
    def forward(ctx: Any, amplitude: Tensor, phase: Tensor, size: tuple[int, int], axes: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(amplitude, phase)
        ctx.axes = axes
        return from_parts(_from_polar(amplitude, phase), size, axes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        amplitude, phase = ctx.saved_tensors
        real, imaginary = to_parts(gradient, ctx.axes, transposed=True).unbind(1)
        along, sin = phase.cos().mul_(real), phase.sin()
        along.addcmul_(imaginary, sin)
        real.mul_(sin)
        around = torch.cos(phase, out=sin).mul_(imaginary).sub_(real).mul_(amplitude)
        return along, around, None, None


def _from_polar(amplitude: Tensor, phase: Tensor) -> Tensor:
    """Real and imaginary part, (B, 2, ...), of amplitude and phase, (B, ...) each."""
    parts = amplitude.new_empty(len(amplitude), 2, *amplitude.shape[1:])
    torch.cos(phase, out=parts[:, 0]).mul_(amplitude)
    torch.sin(phase, out=parts[:, 1]).mul_(amplitude)
    return parts


def _turn_back(amplitude: Tensor, phase: Tensor, along: Tensor, around: Tensor, empty: Tensor) -> Tensor:
    """Gradients along the amplitude and around the phase -> those of real and imaginary part; 0 where it is empty."""
    inverse = amplitude.reciprocal().masked_fill_(empty, 0)
    cos = phase.cos().masked_fill_(empty, 0)  # as the sine is
    around = inverse.mul_(around)
    parts = amplitude.new_empty(len(amplitude), 2, *amplitude.shape[1:])
    real, imaginary = parts.unbind(1)
    sin = torch.sin(phase, out=real)
    torch.mul(sin, along, out=imaginary).addcmul_(cos, around)
    torch.sub(cos.mul_(along), sin.mul_(around), out=real)
    return parts


def to_parts(x: Tensor, axes: tuple[int, int] = GRID, transposed: bool = False) -> Tensor:
    """`transform` without complex numbers: real and imaginary part of the half spectrum, stacked as axis 1.

    x: 4-D; over GRID (B, H, W, C) -> (B, 2, H, W // 2 + 1, C). Over grids of patches two products with small matrices
    take less than half the FFT's time, which must first bring each channel's patches together.
    transposed: the transpose of `from_parts`, which is its gradient: columns that stand for two count twice.
    """
    if axes != GRID or max(x.shape[1:3]) > LARGEST_GRID:
        spectrum = transform(x, axes)
        parts = torch.stack([spectrum.real, spectrum.imag], 1)
        imaginary = parts.movedim([axis + 1 for axis in axes], (2, 3))[:, 1]  # (B, H, V, C)
        imaginary[:, _own_partners(x.shape[axes[0]]), _own_partners(x.shape[axes[1]])] = 0  # but for rounding
        return parts.mul_(_column_counts(x.shape[axes[1]], axes).to(parts)) if transposed else parts
    b, h, w, c = x.shape
    with torch.autocast(x.device.type, enabled=False):
        rows, back, columns = _dft_matrices(h, w, x.dtype, x.device)
        parts = torch.matmul(back.T if transposed else rows, x)  # (B, H, 2V, C), V = W // 2 + 1
        parts = torch.matmul(columns, parts.view(b, 2 * h, -1))  # (B, 2H, VC)
    return parts.view(b, 2, h, -1, c)


def from_parts(parts: Tensor, size: tuple[int, int], axes: tuple[int, int] = GRID, transposed: bool = False) -> Tensor:
    """The inverse of `to_parts`, or its transpose; size: length of the two axes."""
    if axes != GRID or max(size) > LARGEST_GRID:
        parts = parts / _column_counts(size[1], axes).to(parts) if transposed else parts
        return invert(torch.complex(*parts.unbind(1)), size, axes)
    b, _, h, v, c = parts.shape
    with torch.autocast(parts.device.type, enabled=False):
        rows, back, columns = _dft_matrices(*size, parts.dtype, parts.device)
        parts = torch.matmul(columns.T, parts.reshape(b, 2 * h, v * c))  # (B, 2H, VC)
        return torch.matmul(rows.T if transposed else back, parts.view(b, h, 2 * v, c))  # (B, H, W, C)


@lru_cache(maxsize=32)
def _dft_matrices(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The orthonormal transform over a patch grid as real matrices: rows, rows back, columns.

    rows: (2V, W) to the real and imaginary parts of the V = W // 2 + 1 half-spectrum columns; rows back: (W, 2V), which
    counts the columns that stand for two twice; columns: (2H, 2H), (h, part) to (part, u), orthogonal.
    """
    cos, sin = _waves(width, width // 2 + 1)
    rows = torch.cat([cos, -sin])
    back = (rows * _column_counts(width).repeat(2, 1)).T
    cos, sin = _waves(height, height)
    columns = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)])  # (part, u, h, part)
    matrices = (rows, back, columns.reshape(2 * height, 2 * height))
    return tuple(m.to(device, dtype).contiguous() for m in matrices)


def _column_counts(width: int, axes: tuple[int, int] = GRID) -> Tensor:
    """How many columns of the full spectrum a half-spectrum column stands for, 1 or 2; (V, 1), or (V,) for pixels."""
    column = torch.arange(width // 2 + 1)
    counts = torch.where((2 * column) % width == 0, 1.0, 2.0).double()
    return counts[:, None] if axes == GRID else counts


def _waves(length: int, count: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the first `count` frequencies, (count, length), orthonormal; zeros are exact."""
    angle = 2 * math.pi / length * (torch.arange(count)[:, None] * torch.arange(length) % length).double()
    cos, sin = (wave.masked_fill(wave.abs() < 1e-12, 0) / math.sqrt(length) for wave in (angle.cos(), angle.sin()))
    return cos, sin


def is_empty(amplitude: Tensor, axes: tuple[int, int] = GRID) -> Tensor:
    """Where an amplitude is nothing but rounding: at most NOTHING of the largest of its image and channel."""
    return amplitude <= NOTHING * amplitude.amax(axes, keepdim=True)


def unit_phasor(spectrum: Tensor, axes: tuple[int, int] = GRID) -> Tensor:
    """exp(j phase) of a complex half spectrum; 1 with zero gradient where the amplitude is nothing (`is_empty`)."""
    amplitude = spectrum.abs()
    empty = is_empty(amplitude.detach(), axes)
    return torch.where(empty, 1, spectrum) / torch.where(empty, 1, amplitude)


def phase_picture(x: Tensor) -> Tensor:
    """Phase (radians, -pi to pi) of the full spectra of (B, h, w), zero frequency in the middle; NaN where `is_empty`.

    To be drawn on cyclic colours, on which -pi and pi look the same.
    """
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(1, 2))
    return spectrum.angle().masked_fill(is_empty(spectrum.abs(), (1, 2)), math.nan)


def mirror_rows(half: Tensor, rows: int = 1) -> Tensor:
    """half with frequency u replaced by -u along axis `rows`; bin 0 stays."""
    return half.flip(rows).roll(1, rows)


def change_phase(phase: Tensor, change: Tensor, width: int) -> Tensor:
    """phase + change, the change made odd so that the half spectrum stays that of a real signal.

    A real signal's phase is odd: rho(-u, -v) = -rho(u, v). The columns v = 0 and, for even widths, v = W / 2 hold both
    partners; there the odd part of the change is taken (so nothing turns at the bins that are their own partners).
    phase, change: (B, H, W // 2 + 1, C), radians; width: W. Same shape comes back, not wrapped.
    """
    return _ChangePhase.apply(phase, change, _own_partners(width))


def _own_partners(length: int) -> slice:
    """The frequencies of an axis that are their own partners: 0 and, for an even length, the highest."""
    return slice(None, None, length // 2 if length % 2 == 0 else length)


class _ChangePhase(torch.autograd.Function):
    """Adds the change; in the columns that hold both partners, its odd part (a projection, its own transpose)."""

    @staticmethod
    def forward(ctx: Any, phase: Tensor, change: Tensor, both: slice) -> Tensor:
        ctx.both = both
        changed = phase + change
        changed[:, :, both] = phase[:, :, both] + _odd(change[:, :, both])
        return changed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        change = gradient.clone()
        change[:, :, ctx.both] = _odd(gradient[:, :, ctx.both])
        return gradient, change, None


def _odd(columns: Tensor) -> Tensor:
    """The odd part of columns over their rows, axis 1."""
    return (columns - mirror_rows(columns)).mul_(0.5)


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
    return invert(mixed * unit_phasor(one, axes), size, axes).to(content.dtype)


def mix_phase(
    content: Tensor,
    style: Tensor,
    weight: float = 1.0,
    low: float = 0.0,
    high: float = 1.5,
    axes: tuple[int, int] = GRID,
) -> Tensor:
    """Content with its phase turned towards the style's by `weight` within a band; its amplitude is kept.

    The counterpart of `mix_amplitude`. Phases are mixed as points of the unit circle: pi and -pi are neighbours; half
    way between opposed ones there is no direction: the content's stays.
    Source: APR (Chen, ICCV 2021) at weight 1.
    """
    one, other, mask, size = _pair(content, style, weight, low, high, axes)
    own = unit_phasor(one, axes)
    mean = torch.lerp(own, unit_phasor(other, axes), mask.to(one))
    turned = torch.where(mean.abs() < OPPOSED, own, mean)
    return invert(one.abs() * turned / turned.abs(), size, axes).to(content.dtype)


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


def split_haar(x: Tensor) -> Tensor:
    """One step of the Haar wavelet transform over the patch grid, orthonormal: four bands at half the resolution.

    x: (B, H, W, C); odd sides are lengthened by repeating their last patches. Returns (4, B, H', W', C), H' and W' half
    of H and W, rounded up: the mean of each 2 x 2 square (doubled), then its differences along W, along H and across.
    """
    x = _checked(x)
    x = torch.cat([x, x[:, -1:]], 1) if x.shape[1] % 2 else x
    x = torch.cat([x, x[:, :, -1:]], 2) if x.shape[2] % 2 else x
    return _haar(x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(2, 4, 0, 1, 3, 5))


def join_haar(bands: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `split_haar`; size: (H, W), which tells odd sides from even ones."""
    squares = _haar(bands.unflatten(0, (2, 2))).unflatten(0, (2, 2))  # (2, 2, B, H', W', C)
    return squares.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]


def _haar(squares: Tensor) -> Tensor:
    """Sums and differences over the first two axes, (2, 2, ...) -> (4, ...); its own inverse."""
    (one, right), (below, across) = squares
    top, bottom, top_step, bottom_step = one + right, below + across, one - right, below - across
    return torch.stack([top + bottom, top_step + bottom_step, top - bottom, top_step - bottom_step]) / 2


def log_amplitude_picture(x: Tensor, axes: tuple[int, int] = PIXELS) -> Tensor:
    """log(1 + amplitude) of the full spectrum, zero frequency in the middle, averaged over channels; (B, h, w)."""
    amplitude = torch.fft.fft2(x.float(), dim=axes, norm="ortho").abs()
    return torch.fft.fftshift(amplitude, dim=axes).log1p().mean(6 - sum(axes))


def radial_profile(x: Tensor, bins: int = 32, axes: tuple[int, int] = PIXELS) -> tuple[Tensor, Tensor]:
    """Mean log amplitude by frequency radius: radii (bins,) and profile (B, bins), averaged over channels."""
    size = (x.shape[axes[0]], x.shape[axes[1]])
    amplitude = transform(x, axes).abs().log1p().mean(6 - sum(axes))  # (B, H, W // 2 + 1)
    radius = frequency_radius(size).flatten()
    index = (radius / radius.max().clamp(min=1e-9) * bins).long().clamp(max=bins - 1)
    total = torch.zeros(len(x), bins, dtype=amplitude.dtype).index_add_(1, index, amplitude.flatten(1))
    count = torch.bincount(index, minlength=bins)
    return (torch.arange(bins) + 0.5) / bins * radius.max(), total / count.clamp(min=1)
