"""What spectra and features look like in numbers and pictures: distances, components, what is similar to what.

Everything here measures; drawing is in the room `plots`, the transforms are in `spectral.py`, what domains hold is in
`survey.py`, what tokens do in `tokens.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from setlib import spectral

PARTS = ("amplitude", "phase")
COMPONENTS = 32  # in which patches are compared


def spectrum_pictures(x: Tensor) -> dict[str, np.ndarray]:
    """What `plots.spectra` draws of pictures (B, 3, h, w) in [0, 1]: {name: (B, h, w)}, 0 frequency in the middle.

    Log amplitude of grey values of 0 to 255, phase, and the phase minus that of the first picture; NaN: no phase.
    """
    phase = phase_picture(x.mean(1))
    against = torch.remainder(phase - phase[:1] + math.pi, 2 * math.pi) - math.pi
    parts = {"log(1 + amplitude)": log_amplitude_picture(255 * x), "phase (rad)": phase}
    return {name: part.numpy() for name, part in (parts | {"phase - first's (rad)": against}).items()}


def phase_picture(x: Tensor) -> Tensor:
    """Phase (radians, -pi to pi) of the full spectra of (B, h, w), zero frequency in the middle; NaN where it is empty.

    To be drawn on cyclic colours, on which -pi and pi look the same.
    """
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(1, 2))
    return spectrum.angle().masked_fill(spectral.is_empty(spectrum.abs(), (1, 2)), math.nan)


def log_amplitude_picture(x: Tensor, axes: spectral.Axes = spectral.PIXELS) -> Tensor:
    """log(1 + amplitude) of the full spectrum, zero frequency in the middle, averaged over channels; (B, h, w)."""
    amplitude = torch.fft.fft2(x.float(), dim=axes, norm="ortho").abs()
    return torch.fft.fftshift(amplitude, dim=axes).log1p().mean(3 if axes == spectral.GRID else 1)


def radial_profile(images: Tensor, bins: int = 32) -> tuple[Tensor, Tensor]:
    """Mean log amplitude of (B, 3, h, w) by frequency radius: radii (bins,) and profile (B, bins)."""
    amplitude = spectral.transform(images, spectral.PIXELS).abs().log1p().mean(1)  # (B, h, w // 2 + 1)
    radius = spectral.frequency_radius(images.shape[2:]).flatten()
    index = (radius / radius.max().clamp(min=1e-9) * bins).long().clamp(max=bins - 1)
    total = torch.zeros(len(images), bins, dtype=amplitude.dtype).index_add_(1, index, amplitude.flatten(1))
    count = torch.bincount(index, minlength=bins)
    return (torch.arange(bins) + 0.5) / bins * radius.max(), total / count.clamp(min=1)


def _counts(size: tuple[int, int], axes: spectral.Axes) -> Tensor:
    """How often a position of the half spectrum occurs in the full one, 1 or 2, shaped to go with a 4-D spectrum."""
    counts = torch.where(spectral.own_partners(size[1])[: size[1] // 2 + 1], 1.0, 2.0)
    return spectral.per_bin(counts[None], axes)


def round_trip(x: Tensor, axes: spectral.Axes = spectral.PIXELS) -> dict[str, float]:
    """What splitting into amplitude and phase and joining again changes: largest error, and energy on both sides.

    x: 4-D. Parseval: the energies (sums of squares) of x and of its orthonormal spectrum are equal.
    """
    spectrum = spectral.split_spectrum(x, axes)
    size = (x.shape[axes[0]], x.shape[axes[1]])
    error = (spectral.join_spectrum(spectrum, size, axes) - x).abs().max().item()
    inside = (spectrum.amplitude.double().square() * _counts(size, axes)).sum().item()
    return {"largest error": error, "energy": x.double().square().sum().item(), "energy of the spectrum": inside}


def compare(x: Tensor, y: Tensor, axes: spectral.Axes = spectral.GRID) -> dict[str, float]:
    """How far apart two tensors are in amplitude and in phase; x, y: 4-D of one shape, transformed over `axes`.

    Over all images, channels and frequencies but zero (a mean has no phase), with the weights w = sqrt(A_x A_y):
    amplitude = sum w |ln A_x - ln A_y| / sum w: 0 for equal amplitudes, 0.69 where one is twice the other;
    phase = 1 - sum w cos(rho_x - rho_y) / sum w: 0 for equal phases, 1 for unrelated ones, 2 for opposed ones.
    The weights silence positions that are empty (`spectral.is_empty`) in x or y, whose phase is rounding; their square
    root lets every octave of a natural picture count twice as much as the one below it. Both are 0 if there is nothing
    to compare.
    """
    size = (x.shape[axes[0]], x.shape[axes[1]])
    one, other = (spectral.transform(z, axes) for z in (x, y))
    smallest = torch.finfo(one.real.dtype).tiny
    empty = spectral.is_empty(one.abs(), axes) | spectral.is_empty(other.abs(), axes)
    a, b = (z.abs().clamp(min=smallest) for z in (one, other))
    kept = spectral.per_bin(spectral.frequency_radius(size) > 0, axes)
    weights = (a * b).sqrt() * ~empty * _counts(size, axes).to(a) * kept.to(a)
    total = weights.sum().clamp(min=smallest)
    turned = (1 - (spectral.unit_phasor(one, axes) * spectral.unit_phasor(other, axes).conj()).real).clamp(min=0)
    moved = {"amplitude": (a.log() - b.log()).abs(), "phase": turned}
    return {part: ((weights * value).sum() / total).item() for part, value in moved.items()}


def swaps(content: Tensor, style: Tensor, low: float, axes: spectral.Axes = spectral.GRID) -> dict[str, Tensor]:
    """Content, style, and content with parts of the style's spectrum, by title; low: where the low band ends."""
    return {
        "content": content,
        "style": style,
        "style's low amplitudes (FDA)": spectral.mix_amplitude(content, style, high=low, axes=axes),
        "style's amplitudes": spectral.mix_amplitude(content, style, axes=axes),
        "half of the way": spectral.mix_amplitude(content, style, weight=0.5, axes=axes),
        "style's phases": spectral.mix_phase(content, style, axes=axes),
    }


def feature_pictures(features: Sequence[Tensor], fitted: int | None = None) -> list[np.ndarray]:
    """Feature maps as pictures in common colours: their first three principal components.

    features: (1, H, W, C) each. fitted: components and colours are those of the first so many; None: of all.
    Returns (H, W, 3) floats in [0, 1] each; the sign of a component is fixed.
    """
    sizes = [f.shape[1] * f.shape[2] for f in features]
    known = sum(sizes[:fitted])
    values = _components(features, known, 3)
    low, high = values[:known].quantile(0.01, dim=0), values[:known].quantile(0.99, dim=0)
    values = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    return [v.view(*f.shape[1:3], 3).numpy() for v, f in zip(values.split(sizes), features, strict=True)]


def similarities(features: Sequence[Tensor], patch: int) -> list[np.ndarray]:
    """How similar every patch of feature maps (1, H, W, C) is to one of its own map, by its row-major number: (H, W).

    Cosines, -1 to 1, of the strongest COMPONENTS principal components of all maps together: what all patches share is
    their mean, which is taken off, and what few share is left out.
    Raises ValueError if there is no such patch.
    """
    height, width = features[0].shape[1:3]
    if not 0 <= patch < height * width:
        raise ValueError(f"The patches are 0 to {height * width - 1}, row by row, not {patch}.")
    values = _components(features, None, COMPONENTS).split(height * width)
    return [F.cosine_similarity(v, v[patch], dim=1).view(height, width).float().numpy() for v in values]


def _components(features: Sequence[Tensor], known: int | None, count: int) -> Tensor:
    """Principal components of patches, (patches, count) float64, the strongest first; found on the first `known`."""
    flat = torch.cat([f.flatten(0, 2) for f in features]).double()  # (patches, C)
    flat = flat - flat[:known].mean(0)
    axes = torch.linalg.eigh(flat[:known].T @ flat[:known])[1][:, -count:].flip(1)  # (C, count)
    return flat @ (axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign())
