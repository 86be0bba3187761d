"""The Fourier mathematics: amplitude and phase of patch features and of images. Pure functions, no state.

Patch features (B, H, W, C) are transformed over the patch grid, axes (1, 2); images (B, 3, h, w) over their pixels,
axes (2, 3). These are the definitions; SET's layers call equal, faster forms of two of them (`_kernels.py`).
Transforms are orthonormal: the energy, the sum of squares, is kept. The spectrum F(u, v) of a real signal
is Hermitian, F(-u, -v) = conj F(u, v), so that half of it says all: v runs over 0 ... W // 2, and features (B, H, W, C)
have the half spectrum (B, H, W // 2 + 1, C), one bin for each (u, v).

A phase is a point of the circle: -pi and pi are the same. Where a channel of an image has no amplitude but rounding
(`is_empty`) its phase would be chance, and another on each processor: there it is 0 and passes on no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Axes = tuple[int, int]
GRID: Axes = (1, 2)  # of patch features (B, H, W, C)
PIXELS: Axes = (2, 3)  # of images (B, 3, h, w)
NOTHING = 1e-6  # of a channel's largest amplitude: what float32 rounds; at and below it there is no phase
OPPOSED = 1e-3  # length below which the mean of two phases has no direction


class Spectrum(NamedTuple):
    """Amplitude >= 0 (feature or pixel units) and phase (radians, -pi to pi), both half spectra of one shape."""

    amplitude: Tensor
    phase: Tensor


def transform(x: Tensor, axes: Axes = GRID) -> Tensor:
    """Complex half spectrum of a real 4-D tensor over two of its axes; half precision is computed in float32.

    Raises ValueError if x is not 4-D. Source: SET, Sec. 3.1.
    """
    return torch.fft.rfft2(_checked(x), dim=axes, norm="ortho")


def invert(spectrum: Tensor, size: tuple[int, int], axes: Axes = GRID) -> Tensor:
    """The real tensor of a complex half spectrum; size: length of the two axes (it tells W = 2n from W = 2n + 1)."""
    return torch.fft.irfft2(spectrum, s=size, dim=axes, norm="ortho")


def split_spectrum(x: Tensor, axes: Axes = GRID) -> Spectrum:
    """Amplitude and phase; only the two axes are transformed, so images of a batch and channels never mix.

    Where the amplitude is nothing (`is_empty`) the phase is 0, and so are the gradients through both. A bin that is its
    own partner, (-u, -v) = (u, v), is real: its phase is 0 or pi, never -pi.
    x: 4-D, real. Returns two half spectra, float32 for half precision. Raises ValueError if x is not 4-D.
    Source: SET, Sec. 3.1.
    """
    spectrum = transform(x, axes)
    height, width = x.shape[axes[0]], x.shape[axes[1]]
    own = own_partners(height)[:, None] & own_partners(width)[: width // 2 + 1]  # (H, W // 2 + 1)
    imaginary = spectrum.imag.masked_fill(per_bin(own, axes).to(x.device), 0)  # it is 0 but for rounding
    spectrum = torch.complex(spectrum.real, imaginary + 0.0)  # -0 + 0.0 is 0, lest a phase of pi become -pi
    amplitude = spectrum.detach().abs()
    empty = is_empty(amplitude, axes)
    known = torch.where(empty, 1, spectrum)  # what has no phase becomes 1, of phase 0, and passes on no gradient
    return Spectrum(torch.where(empty, amplitude, known.abs()), known.angle())


def join_spectrum(spectrum: Spectrum, size: tuple[int, int], axes: Axes = GRID) -> Tensor:
    """The inverse of `split_spectrum`; size: length of the two axes. Source: SET, Sec. 3.1."""
    amplitude, phase = (_checked(part) for part in spectrum)
    return invert(amplitude * torch.complex(phase.cos(), phase.sin()), size, axes)


def change_phase(phase: Tensor, change: Tensor, width: int) -> Tensor:
    """phase + change, the change made odd so that the half spectrum stays that of a real signal.

    A real signal's phase is odd: rho(-u, -v) = -rho(u, v). The columns v = 0 and, for even widths, v = W / 2 hold both
    partners; there the odd part of the change is taken (so nothing turns at the bins that are their own partners).
    phase, change: (B, H, W // 2 + 1, C), radians; width: W. Same shape comes back, not wrapped.
    """
    both = slice(None, None, width // 2 if width % 2 == 0 else width)  # the columns 0 and, for even widths, W / 2
    changed, part = phase + change, change[:, :, both]
    changed[:, :, both] = phase[:, :, both] + (part - mirror_rows(part)) / 2
    return changed


def own_partners(length: int) -> Tensor:
    """Which frequencies u of an axis are -u as well, (length,) bool: 0 and, for an even length, the highest."""
    return 2 * torch.arange(length) % length == 0


def mirror_rows(half: Tensor) -> Tensor:
    """A half spectrum (B, H, ...) with u replaced by -u along H; u = 0 stays."""
    return half.flip(1).roll(1, 1)


def per_bin(values: Tensor, axes: Axes) -> Tensor:
    """One value for each bin, (H, W // 2 + 1), shaped to go with a 4-D half spectrum over `axes`."""
    return values[:, :, None] if axes == GRID else values


def is_empty(amplitude: Tensor, axes: Axes = GRID) -> Tensor:
    """Where an amplitude is nothing but rounding: at most NOTHING of the largest of its image and channel."""
    return amplitude <= NOTHING * amplitude.amax(axes, keepdim=True)


def unit_phasor(spectrum: Tensor, axes: Axes = GRID) -> Tensor:
    """exp(j phase) of a complex half spectrum; 1 with zero gradient where the amplitude is nothing (`is_empty`)."""
    amplitude = spectrum.abs()
    empty = is_empty(amplitude.detach(), axes)
    return torch.where(empty, 1, spectrum) / torch.where(empty, 1, amplitude)


def frequency_radius(size: tuple[int, int]) -> Tensor:
    """Distance of every half-spectrum bin from zero frequency, (H, W // 2 + 1): 1 at Nyquist, sqrt(2) in a corner."""
    u, v = torch.fft.fftfreq(size[0]), torch.fft.rfftfreq(size[1])
    return 2 * torch.hypot(u[:, None], v[None, :])


def band_mask(size: tuple[int, int], low: float = 0.0, high: float = 1.5) -> Tensor:
    """1 where low <= frequency radius <= high, else 0; (H, W // 2 + 1) float32."""
    radius = frequency_radius(size)
    return ((radius >= low) & (radius <= high)).float()


def mix_amplitude(
    content: Tensor, style: Tensor, weight: float = 1.0, low: float = 0.0, high: float = 1.5, axes: Axes = GRID
) -> Tensor:
    """Content with its amplitude moved towards the style's by `weight` within a band; its phase is kept.

    Weight 1 over all frequencies is the full swap, over a low band FDA, weight < 1 AmpMix.
    content, style: 4-D of one shape. Returns content's shape and type.
    Raises ValueError if the shapes differ. Source: FDA (Yang, CVPR 2020), FACT/AmpMix (Xu, CVPR 2021).
    """
    one, other, share, size = _pair(content, style, weight, low, high, axes)
    mixed = torch.lerp(one.abs(), other.abs(), share)
    return invert(mixed * unit_phasor(one, axes), size, axes).to(content.dtype)


def mix_phase(
    content: Tensor, style: Tensor, weight: float = 1.0, low: float = 0.0, high: float = 1.5, axes: Axes = GRID
) -> Tensor:
    """Content with its phase turned towards the style's by `weight` within a band; its amplitude is kept.

    The counterpart of `mix_amplitude`. Phases are mixed as points of the unit circle: pi and -pi are neighbours; half
    way between opposed ones there is no direction: the content's stays.
    Source: APR (Chen, ICCV 2021) at weight 1.
    """
    one, other, share, size = _pair(content, style, weight, low, high, axes)
    own = unit_phasor(one, axes)
    mean = torch.lerp(own, unit_phasor(other, axes), share.to(one))
    turned = torch.where(mean.abs() < OPPOSED, own, mean)
    return invert(one.abs() * turned / turned.abs(), size, axes).to(content.dtype)


def _pair(
    content: Tensor, style: Tensor, weight: float, low: float, high: float, axes: Axes
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Both complex spectra, how far to go at each bin, and the size of the two axes."""
    if content.shape != style.shape:
        raise ValueError(f"Content {tuple(content.shape)} and style {tuple(style.shape)} differ in shape.")
    size = (content.shape[axes[0]], content.shape[axes[1]])
    one, other = transform(content, axes), transform(style, axes)
    share = weight * band_mask(size, low, high).to(one.real)
    return one, other, per_bin(share, axes).expand_as(one), size


def _checked(x: Tensor) -> Tensor:
    """x in float32 or float64. Raises ValueError if it is not 4-D."""
    if x.ndim != 4:
        raise ValueError(f"Expected a 4-D tensor (a batch of feature maps or pictures), got shape {tuple(x.shape)}.")
    return x if x.dtype == torch.float64 else x.float()
