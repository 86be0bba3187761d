"""Swaps as causal evidence: a part of picture B put on picture A, and how far that goes towards A in B's style.

The rendered streets hold the counterfactual itself: A* is A's layout in B's style. Every part, of any transform, is
judged by one yardstick, the share of the distance from A to A* that it closes, beside placebos that move A as far.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy import fft
from torch import Tensor

from setlib import spectral
from setlib.baselines import join_haar, split_haar
from setlib.style import turned

CUT = 0.25  # between low and high frequencies; 1 = Nyquist
SPANS = {  # low < radius <= high; from 0 on with zero frequency
    "all": (0.0, 1.5),
    "mean": (0.0, 0.0),
    "low": (0.001, CUT),
    "high": (CUT, 1.5),
}
Part = Callable[[Tensor, Tensor], Tensor]  # of A and B, both (B, H, W, C): A with a part of B's


def swap_spectrum(
    x: Tensor,
    y: Tensor,
    part: str,
    low: float = 0.0,
    high: float = 1.5,
    weight: float = 1.0,
    axes: spectral.Axes = spectral.GRID,
) -> Tensor:
    """x (B, H, W, C) with y's amplitude or phase at frequencies low < radius <= high; low 0: zero frequency as well.

    weight: how far towards y, 0 to 1; axes: those that are transformed. Raises ValueError for another part.
    """
    if part not in ("amplitude", "phase"):
        raise ValueError(f"Unknown part '{part}': expected amplitude or phase.")
    mix = spectral.mix_amplitude if part == "amplitude" else spectral.mix_phase
    above = float(np.nextafter(np.float32(low), np.float32(2))) if low else 0.0  # radii are float32
    return mix(x, y, weight, above, high, axes)


def swap_mean(x: Tensor, y: Tensor) -> Tensor:
    """x (B, H, W, C) with y's mean over the positions, the zero frequency, in every channel."""
    return x + (y - x).mean((1, 2), keepdim=True)


def swap_moments(x: Tensor, y: Tensor) -> Tensor:
    """x (B, H, W, C) with y's mean and standard deviation over the positions, in every channel (AdaIN)."""
    (x_mean, x_std), (y_mean, y_std) = ((z.mean((1, 2), True), z.std((1, 2), keepdim=True)) for z in (x, y))
    return (x - x_mean) / x_std.clamp(min=1e-12) * y_std + y_mean


def swap_haar(x: Tensor, y: Tensor, is_low: bool) -> Tensor:
    """x (B, H, W, C) with y's low band, or its three high bands, of one step of the Haar transform (FADA)."""
    own, other = split_haar(x), split_haar(y)
    bands = [other[:1], own[1:]] if is_low else [own[:1], other[1:]]
    return join_haar(torch.cat(bands), (x.shape[1], x.shape[2]))


def swap_cosine(x: Tensor, y: Tensor, is_low: bool) -> Tensor:
    """x (B, H, W, C) with y's cosine coefficients (DCT) of frequencies up to CUT, or above it (Causal-Tune's bands)."""
    rows, columns = (torch.arange(size) / size for size in x.shape[1:3])
    taken = ((torch.hypot(rows[:, None], columns) <= CUT) == is_low)[..., None].numpy()
    own, other = (fft.dctn(z.numpy(), axes=(1, 2), norm="ortho") for z in (x, y))
    return torch.from_numpy(fft.idctn(np.where(taken, other, own), axes=(1, 2), norm="ortho"))


PARTS: dict[str, Part] = {
    "amplitude": partial(swap_spectrum, part="amplitude"),
    "amplitude, low": partial(swap_spectrum, part="amplitude", high=CUT),
    "amplitude, high": partial(swap_spectrum, part="amplitude", low=CUT),
    "phase": partial(swap_spectrum, part="phase"),
    "phase, low": partial(swap_spectrum, part="phase", high=CUT),
    "phase, high": partial(swap_spectrum, part="phase", low=CUT),
    "mean (DC)": swap_mean,
    "mean and deviation (AdaIN)": swap_moments,
    "Haar, low": partial(swap_haar, is_low=True),
    "Haar, high": partial(swap_haar, is_low=False),
    "DCT, low": partial(swap_cosine, is_low=True),
    "DCT, high": partial(swap_cosine, is_low=False),
}
PLACEBOS = ("random basis", "shuffled patches", "channel axis", "noise")


def placebo(part: Part, name: str, x: Tensor, y: Tensor, reach: Tensor, seed: int = 0) -> Tensor:
    """x (B, H, W, C) moved by `reach` (B,), as far as `part` moves it, in a way that knows nothing of waves.

    random basis: the same swap after random signs and a random order of the positions, so over an orthonormal basis
    without place or frequency. shuffled patches: after a random order alone, which leaves the mean in its bin. channel
    axis: over the channels of each position, as the released code transforms. noise: a random direction. What does not
    know the order of the positions, such as a mean, is its own placebo with shuffled patches.
    Raises ValueError for an unknown name.
    """
    generator, (height, width) = torch.Generator().manual_seed(seed), x.shape[1:3]
    if name == "noise":
        change = torch.randn(x.shape, generator=generator)
    elif name == "channel axis":
        rows = [z.flatten(1, 2).transpose(1, 2)[:, None] for z in (x, y)]  # (B, 1, C, N)
        change = (part(*rows)[:, 0].transpose(1, 2).unflatten(1, (height, width))) - x
    elif name in PLACEBOS:
        basis = partial(turned, seed=seed, signed=name == "random basis")
        change = basis(part(basis(x), basis(y)), back=True) - x
    else:
        raise ValueError(f"Unknown placebo '{name}': expected one of {', '.join(PLACEBOS)}.")
    return x + change * (reach / change.flatten(1).norm(dim=1).clamp(min=1e-12)).view(-1, 1, 1, 1)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distance of each picture's features, (B,); x, y: (B, H, W, C)."""
    return (x - y).flatten(1).norm(dim=1)


def closed(x: Tensor, start: Tensor, goal: Tensor) -> Tensor:
    """The share of the distance from `start` to `goal` that x has closed, (B,): 1 at the goal, 0 as far as the start.

    All (B, H, W, C). Below 0: further away than the start.
    """
    return 1 - distance(x, goal) / distance(start, goal).clamp(min=1e-12)
