"""The Fourier mathematics: amplitude and phase of patch features and of pictures. Pure functions, no state.

Every transform is two-dimensional, real to half spectrum, and orthonormal (energy is kept). Patch features
(B, H, W, C) are transformed over the patch grid, axes (1, 2); pictures (B, 3, h, w) over their pixels, axes (2, 3).
The half spectrum keeps the columns 0 ... W // 2 of the last transformed axis; the rest follows by symmetry.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
    if x.ndim != 4:
        raise ValueError(f"Expected a 4-D tensor (a batch of feature maps or pictures), got shape {tuple(x.shape)}.")
    x = x if x.dtype == torch.float64 else x.float()
    return torch.fft.rfft2(x, dim=axes, norm="ortho")


def invert(spectrum: Tensor, size: tuple[int, int], axes: tuple[int, int] = GRID) -> Tensor:
    """The real tensor of a complex half spectrum; size: length of the two axes (it tells W = 2n from W = 2n + 1)."""
    return torch.fft.irfft2(spectrum, s=size, dim=axes, norm="ortho")


def unit_phasor(spectrum: Tensor) -> Tensor:
    """exp(j phase) of a complex tensor; 1 with zero gradient where the amplitude vanishes (0 has no phase)."""
    amplitude = spectrum.abs()
    empty = amplitude <= torch.finfo(amplitude.dtype).tiny ** 0.5
    return torch.where(empty, torch.ones_like(spectrum), spectrum) / torch.where(empty, 1, amplitude)


def safe_angle(spectrum: Tensor) -> Tensor:
    """Phase of a complex tensor, radians; 0 with zero gradient where the amplitude vanishes (0 has no phase)."""
    empty = spectrum.abs() <= torch.finfo(spectrum.real.dtype).tiny ** 0.5
    return torch.where(empty, torch.ones_like(spectrum), spectrum).angle()


def split_spectrum(x: Tensor, axes: tuple[int, int] = GRID) -> Spectrum:
    """Amplitude and phase; only the two axes are transformed, so images of a batch and channels never mix.

    x: 4-D, real. Returns two half spectra. Raises ValueError if x is not 4-D. Source: SET, Sec. 3.1.
    """
    spectrum = transform(x, axes)
    return Spectrum(spectrum.abs(), safe_angle(spectrum))


def join_spectrum(spectrum: Spectrum, size: tuple[int, int], axes: tuple[int, int] = GRID) -> Tensor:
    """The inverse of `split_spectrum`; size: length of the two axes. Source: SET, Sec. 3.1."""
    return invert(torch.polar(spectrum.amplitude, spectrum.phase), size, axes)


def mirror_rows(half: Tensor, rows: int = 1) -> Tensor:
    """half with frequency u replaced by -u along axis `rows`; bin 0 stays."""
    return half.flip(rows).roll(1, rows)


def make_phase_change_odd(change: Tensor, width: int) -> Tensor:
    """A change of phase that keeps a half spectrum that of a real signal.

    A real signal's phase is odd: rho(-u, -v) = -rho(u, v). The columns v = 0 and, for even widths, v = W / 2 hold both
    partners; there the odd part of the change is taken (so nothing turns at the bins that are their own partners).
    change: (B, H, W // 2 + 1, C), radians; width: W. Same shape comes back.
    """
    odd = (change - mirror_rows(change)) / 2
    paired = torch.zeros(change.shape[2], dtype=torch.bool, device=change.device)
    paired[0] = True
    if width % 2 == 0:
        paired[-1] = True
    return torch.where(paired[None, None, :, None], odd, change)


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
