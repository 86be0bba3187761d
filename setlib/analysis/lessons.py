"""Six lessons on amplitude and phase: each computes one, and says what came out in a sentence made from the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from setlib import spectral
from setlib.analysis import spectra
from setlib.spectral import GRID, PIXELS, Axes


class Lesson(NamedTuple):
    """numbers: rows of a table; drawn: by name, for `plots.lines` or `plots.spectrum_row`; says: Markdown."""

    numbers: list[dict]
    drawn: dict[str, Any]
    says: str


def shift(x: Tensor, y: Tensor, axes: Axes = PIXELS) -> Lesson:
    """By how many columns y is x moved to the right, from the phases alone; x, y: 4-D of one shape.

    Moved by d, the phase of frequency v turns by -2 pi v d / W, whatever the row u and the channel. Measured is the
    direction of the mean phasor over both; transformed back, the means peak at d. agreement: their mean length.
    """
    width = x.shape[axes[1]]
    one, other = (spectral.unit_phasor(spectral.transform(z, axes), axes) for z in (x, y))
    turned = (other * one.conj()).movedim(axes[1], 0).flatten(1).mean(1)  # (W // 2 + 1,)
    found, agreement = int(torch.fft.irfft(turned, n=width).argmax()), turned.abs().mean().item()
    found -= width if found > width / 2 else 0
    frequency = torch.arange(len(turned)) / width
    line = torch.remainder(math.pi - 2 * math.pi * found * frequency, 2 * math.pi) - math.pi
    drawn = {"measured": (frequency, turned.angle()), "-2π v d / W": (frequency, line)}
    says = f"By the phases alone it moved by **{found}** columns; agreement {agreement:.2f} (1: all turn alike)."
    return Lesson([{"shift": found, "agreement": agreement}], drawn, says)


def alone(x: Tensor, axes: Axes = GRID) -> dict[str, Tensor]:
    """Each of P >= 2 pictures or feature maps, 4-D, rebuilt from its phase or its amplitude alone.

    For the other part stands what is known without the picture: the mean amplitude or the mean direction of the P - 1
    others, 1, or the phases of one white noise; and each channel gets its mean and spread back, so that it can be seen.
    With them comes another picture, unchanged: what any of its kind is worth.
    """
    size, spectrum = (x.shape[axes[0]], x.shape[axes[1]]), spectral.transform(x, axes)
    noise = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0)).movedim((2, 3), axes).to(x)
    amplitude, phasor = spectrum.abs(), spectral.unit_phasor(spectrum, axes)
    rebuilt = {
        "phase, mean amplitudes": (amplitude.sum(0) - amplitude) / (len(x) - 1) * phasor,
        "phase, amplitudes 1": phasor,
        "amplitude, mean phases": amplitude * spectral.unit_phasor(phasor.sum(0) - phasor, axes),
        "amplitude, phases of noise": amplitude * spectral.unit_phasor(spectral.transform(noise, axes), axes),
    }
    mean, made = x.mean(axes, keepdim=True), {"another picture": x.roll(1, 0)}
    for name, half in rebuilt.items():
        one = spectral.invert(half, size, axes)
        one = one - one.mean(axes, keepdim=True)
        made[name] = mean + one * x.std(axes, keepdim=True) / one.std(axes, keepdim=True).clamp(min=1e-12)
    return made


def correlation(x: Tensor, y: Tensor, axes: Axes = GRID) -> float:
    """Over places, channel by channel; the mean over the channels and pictures of two 4-D tensors of one shape."""
    flat = ((z - z.mean(axes, keepdim=True)).movedim(axes, (2, 3)).flatten(2) for z in (x, y))
    return F.cosine_similarity(*flat, dim=2).mean().item()


def rebuilding(known: Mapping[str, Tensor]) -> Lesson:
    """How what `alone` rebuilds correlates with the original; known: {place: (P, ...)}, of which "pixels" (P, 3, h, w).

    By Parseval it is a mean cosine of phase differences weighted by the amplitudes: the right phases win by definition.
    So compare with another picture, and with white noise, whose phases mean nothing.
    """
    noise, rows = torch.randn(list(known.values())[-1].shape, generator=torch.Generator().manual_seed(0)), []
    for place, x in {**known, "white noise": noise}.items():
        axes = PIXELS if place == "pixels" else GRID
        made = {name: correlation(y, x, axes) for name, y in alone(x, axes).items()}
        rows.append({"place": place} | made)
    places, says = [row["place"] for row in rows], "Correlation with the original:\n"
    curves = {name: (places, [row[name] for row in rows]) for name in made}
    for name, (_, values) in curves.items():
        numbers = (f"{round(y, 2) + 0.0:.2f} ({x})" for x, y in zip(places, values, strict=True))
        says += f"\n- {name}: " + ", ".join(numbers)
    return Lesson(rows, curves, says)


def leakage(pictures: Tensor, low: float = 0.1) -> Lesson:
    """Share of the energy on the two axes of the spectrum of pictures (B, 3, h, w): as they are, windowed, mirrored.

    Zero frequency is left out (the mean taken off, which a Hann window would spread). beyond: of the energy above the
    frequency radius `low`. Mirrored to twice its sides a picture meets itself at all borders. It keeps the means of
    rows and columns, whose energy is that of the axes: over all frequencies its share is the same.
    """
    x, rows, drawn = pictures - pictures.mean(PIXELS, keepdim=True), [], {}
    hann, across = torch.outer(*map(torch.hann_window, x.shape[2:])), torch.cat([x, x.flip(3)], 3)
    shown = {"as it is": x, "under a Hann window": x * hann, "mirrored": torch.cat([across, across.flip(2)], 2)}
    for name, one in shown.items():
        u, v = (torch.fft.fftfreq(side) for side in one.shape[2:])
        is_axis, radius = (u[:, None] == 0) | (v == 0), 2 * torch.hypot(u[:, None], v)
        energy = torch.fft.fft2(one).abs().square().sum((0, 1))  # (h, w)
        kept = {"all (%)": energy * (radius > 0), f"beyond {low:g} (%)": energy * (radius > low)}
        rows.append({"picture": name} | {key: 100 * (e[is_axis].sum() / e.sum()).item() for key, e in kept.items()})
        drawn[name] = spectra.log_amplitude_picture(255 * one[:1])[0].numpy()
    most, beyond = ("; ".join(f"{row[key]:.1f} % {row['picture']}" for row in rows) for key in kept)
    return Lesson(rows, drawn, f"Energy on the axes beyond radius {low:g}: {beyond}. Over all frequencies: {most}.")


def count_waves(sizes: Mapping[str, tuple[int, int]], radii: Sequence[float] = (0.1, 0.25, 0.5, 1.0)) -> Lesson:
    """How many independent waves a grid (H, W) has up to a radius (1: the grid's own Nyquist), by its name.

    A wave is a frequency with its partner (-u, -v), one amplitude and one phase; zero frequency is none.
    """
    drawn, rows = {}, []
    for name, (height, width) in sizes.items():
        both = spectral.own_partners(width)[: width // 2 + 1]  # columns that hold both partners
        once = ~(both & (torch.arange(height)[:, None] > height // 2))
        radius = spectral.frequency_radius((height, width))[once].sort().values[1:]
        rows.append({"grid": name} | {f"up to {r:g}": int((radius <= r + 1e-6).sum()) for r in radii})
        drawn[name] = (radius, torch.arange(len(radius)) + 1)
    said = (f"{row['grid']}: " + ", ".join(f"{n} {r}" for r, n in list(row.items())[1:]) for row in rows)
    return Lesson(rows, drawn, f"Waves by frequency radius. {'; '.join(said)}.")


def mixing(features: Tensor) -> Lesson:
    """What a transform over (batch, channel), as released, mixes, and one over the patch grid; features: (3, H, W, C).

    mate: |change| / |amplitude| of picture 0 when picture 2 replaces picture 1 beside it; positions: at how many of all
    its amplitude changes (drawn: in what share of the channels) when ONE patch, the middle one, becomes picture 1's.
    """
    patched, rows, drawn = features[:2].clone(), [], {}
    u, v = (side // 2 for side in features.shape[1:3])
    patched[0, u, v] = features[1, u, v]
    for name, axes in (("batch and channel", (0, 3)), ("the patch grid", GRID)):
        three = (features[:2], features[[0, 2]], patched)
        own, mate, patch = (torch.fft.fft2(x.double(), dim=axes).abs()[0] for x in three)  # (H, W, C)
        moved = (patch - own).abs() > 1e-12 * own.max()
        row = {"over": name, "mate (%)": 100 * ((mate - own).norm() / own.norm()).item()}
        rows.append(row | {"positions": int(moved.any(-1).sum()), "of": moved[..., 0].numel()})
        drawn[f"over {name}"] = 100 * moved.double().mean(-1).numpy()
    said = (
        "- over {over} another mate moves picture 0 by {mate (%):.0f} %, one patch moves {positions} of {of} positions"
    )
    return Lesson(rows, drawn, "\n".join(said.format(**row) for row in rows))


def empty_phases(size: tuple[int, int] = (16, 32), trials: int = 64) -> Lesson:
    """How far phases scatter, 1 - |mean phasor|, when stripes of 0 and 1 get noise of 1e-7, what float32 rounds.

    0: always the same, 1: anything; in the bins that are empty without noise, and in the others.
    """
    stripes = (torch.arange(size[1]) // 4 % 2).float()[:, None].expand(1, *size, 1)
    x = stripes + 1e-7 * torch.randn(trials, *size, 1, generator=torch.Generator().manual_seed(0))
    empty, rows = spectral.is_empty(spectral.transform(stripes).abs())[0], []
    phases = {"torch.angle": spectral.transform(x).angle(), "split_spectrum": spectral.split_spectrum(x).phase}
    for name, phase in phases.items():
        spread = 1 - torch.polar(torch.ones_like(phase), phase).mean(0).abs()
        rows.append({"by": name, "empty": spread[empty].mean().item(), "others": spread[~empty].mean().item()})
    said = " and ".join(f"{row['empty']:.2f} by {row['by']}" for row in rows)
    says = f"In {int(empty.sum())} of {empty.numel()} bins there is nothing; their phases spread by {said}."
    once, again = torch.fft.fftshift(torch.fft.fft2(x[:2, ..., 0]), dim=(1, 2)).angle().numpy()
    drawn = {"torch.angle, once": once, "torch.angle, again": again}
    return Lesson(rows, drawn | {"none where nothing is": spectra.phase_picture(x[:1, ..., 0])[0].numpy()}, says)
