"""What spectra and domains look like in numbers: movement with style and content, brightness, class shares.

Everything here measures; drawing is in `plots.py`, the transforms in `spectral.py`, what tokens do in `attention.py`.
The functions `say_...` put results into a Markdown sentence, made from the numbers alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from setlib import spectral
from setlib.backbone import FrozenBackbone
from setlib.data import domains
from setlib.data.augment import fit, resize
from setlib.data.labels import ClassSet
from setlib.experiment import Data
from setlib.inference import predict
from setlib.plots import coloured, short_name
from setlib.scenes import STYLES
from setlib.segmenter import Segmenter

PARTS = ("amplitude", "phase")


def as_tensor(image: np.ndarray) -> Tensor:
    """A picture (h, w, 3) uint8 as (1, 3, h, w) float in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def as_picture(images: Tensor) -> np.ndarray:
    """The first of (B, 3, h, w) in [0, 1] as (h, w, 3) uint8; what lies outside is cut."""
    return (images[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def styled_scenes(data: Data, layouts: int, styles: Sequence[str] = STYLES) -> dict[str, Tensor]:
    """The same rendered streets in several styles: {style: (layouts, 3, h, w)} in [0, 1]; rendered when missing."""
    some = replace(data, eval_images=layouts)
    loaded = {style: domains.load(f"scenes:{style}", some) for style in styles}
    return {s: torch.cat([as_tensor(d.sample(i).image) for i in range(layouts)]) for s, d in loaded.items()}


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
    return torch.fft.fftshift(amplitude, dim=axes).log1p().mean(spectral.CHANNEL_AXIS[axes])


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


def movement(backbone: FrozenBackbone, pictures: Mapping[str, Tensor], layers: Sequence[int]) -> list[dict]:
    """How much amplitude and phase move with style and with content, in the pixels and after frozen layers.

    pictures: {style: (layouts, 3, h, w)} in [0, 1], the same layouts in every style, sides multiples of the patch size.
    style: mean of `compare` over all pairs of styles of one layout; content: over all pairs of layouts of one style.
    Returns rows with layer ("pixels" or the number), part, style, content and ratio = style / content.
    Raises ValueError if there are not at least two styles and two layouts.
    """
    if len(pictures) < 2 or min(len(images) for images in pictures.values()) < 2:
        raise ValueError("Movement needs at least two styles and two layouts of each.")
    spaces = {"pixels": (pictures, spectral.PIXELS)}
    maps = {style: backbone(images, layers=layers) for style, images in pictures.items()}
    spaces |= {layer: ({style: found[layer] for style, found in maps.items()}, spectral.GRID) for layer in layers}
    rows = []
    for layer, (features, axes) in spaces.items():
        near = [compare(features[s], features[t], axes) for s, t in combinations(features, 2)]
        pairs = [list(pair) for pair in zip(*combinations(range(len(next(iter(features.values())))), 2), strict=True)]
        far = [compare(x[pairs[0]], x[pairs[1]], axes) for x in features.values()]
        for part in PARTS:
            style, content = (float(np.mean([one[part] for one in found])) for found in (near, far))
            ratio = style / content if content else None
            rows.append({"layer": layer, "part": part, "style": style, "content": content, "ratio": ratio})
    return rows


def say_movement(rows: Sequence[Mapping]) -> str:
    """The rows of `movement` as Markdown sentences."""
    found = {(row["layer"], row["part"]): row for row in rows}
    places, lines = list(dict.fromkeys(row["layer"] for row in rows)), []
    for place in places:
        a, p = found[place, "amplitude"], found[place, "phase"]
        lines.append(
            f"- {'In the **pixels**' if place == 'pixels' else f'After **layer {place}**'} the log amplitude moved by "
            f"{a['style']:.2f} between styles and {a['content']:.2f} between layouts, "
            f"the phase by {p['style']:.2f} and {p['content']:.2f}."
        )
    gaps = [(found[place, "amplitude"]["ratio"] or 0) - (found[place, "phase"]["ratio"] or 0) for place in places]
    return "\n".join(lines) + (
        f"\n- In units of what another layout changes, style moved the amplitude more than the phase in "
        f"{sum(gap > 0 for gap in gaps)} of {len(gaps)} places, and the phase more than the amplitude in "
        f"{sum(gap < 0 for gap in gaps)}."
    )


def feature_pictures(features: Sequence[Tensor], fitted: int | None = None) -> list[np.ndarray]:
    """Feature maps as pictures in common colours: their first three principal components.

    features: (1, H, W, C) each. fitted: components and colours are those of the first so many; None: of all.
    Returns (H, W, 3) floats in [0, 1] each; the sign of a component is fixed.
    """
    flat = torch.cat([f.flatten(0, 2) for f in features]).double()
    known = sum(f.shape[1] * f.shape[2] for f in features[:fitted])
    flat = flat - flat[:known].mean(0)
    axes = torch.linalg.eigh(flat[:known].T @ flat[:known])[1][:, -3:].flip(1)  # (C, 3), the strongest first
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    values = flat @ axes
    low, high = values[:known].quantile(0.01, dim=0), values[:known].quantile(0.99, dim=0)
    values = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    sizes = [f.shape[1] * f.shape[2] for f in features]
    return [v.view(*f.shape[1:3], 3).numpy() for v, f in zip(values.split(sizes), features, strict=True)]


class Survey(NamedTuple):
    """A look at one domain: pictures there and read, their commonest size, mean brightness and contrast, class shares.

    brightness, contrast: mean and standard deviation of the grey values of a picture, 0 to 255, averaged over pictures.
    shares: (K,) of the labelled pixels, in the class set that was asked for; None without labels.
    """

    domain: str
    pictures: int
    size: str
    brightness: float
    contrast: float
    shares: np.ndarray | None


def common_class_set(several: Sequence[domains.Domain]) -> ClassSet:
    """The class set that all labelled domains can be counted in: the smallest of theirs."""
    return min((domain.class_set for domain in several), key=len)


def label_lookup(domain: domains.Domain, class_set: ClassSet) -> np.ndarray:
    """(256,) uint8: from a domain's raw label ids to places in class_set, its own or one it can be merged into."""
    if domain.class_set is class_set:
        return domain.ids.to_score
    return class_set.to_place[domain.ids.to_train]


def examples(domain: domains.Domain, indices: Sequence[int], class_set: ClassSet) -> list[np.ndarray | None]:
    """Pictures and coloured labels in turns, (h, w, 3) uint8 each; None where a domain has no labels."""
    samples = [sample for _, sample in domain.samples(indices)]
    lookup = label_lookup(domain, class_set)
    labels = [None if s.label is None else coloured(s.image, lookup[s.label], class_set, 0.75) for s in samples]
    return [shown for sample, label in zip(samples, labels, strict=True) for shown in (sample.image, label)]


def predictions(
    models: Mapping[str, Segmenter], chosen: Sequence[tuple[domains.Domain, int]], class_set: ClassSet
) -> list[tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]]:
    """What `plots.prediction_sheet` draws of chosen (domain, index): picture, label, train ids by model.

    Labels are places in class_set; the predictions are not merged yet.
    """
    found = []
    for domain, index in chosen:
        _, sample = next(domain.samples([*range(index, len(domain)), *range(index)]))
        label = None if sample.label is None else label_lookup(domain, class_set)[sample.label]
        found.append((sample.image, label, {name: predict(model, sample.image) for name, model in models.items()}))
    return found


def survey(domain: domains.Domain, class_set: ClassSet, limit: int = 100) -> Survey:
    """Reads at most `limit` pictures of a domain, evenly spaced; its labels are merged into class_set."""
    lookup, counts, greys, sizes = label_lookup(domain, class_set), np.zeros(256, np.int64), [], Counter()
    for _, sample in domain.samples(_evenly(len(domain), limit)):
        sizes[f"{sample.image.shape[1]} x {sample.image.shape[0]}"] += 1
        grey = sample.image.mean(-1)
        greys.append((grey.mean(), grey.std()))
        if sample.label is not None:
            counts += np.bincount(lookup[sample.label].ravel(), minlength=256)
    counts = counts[: len(class_set)]
    shares = counts / max(counts.sum(), 1) if domain.has_labels else None
    brightness, contrast = np.mean(greys, axis=0).tolist()
    return Survey(domain.spec.text, len(domain), sizes.most_common(1)[0][0], brightness, contrast, shares)


def domain_profile(domain: domains.Domain, long_edge: int, limit: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """`radial_profile` averaged over pictures of one long edge (grey values 0 to 255): radii, profile."""
    images = [as_tensor(sample.image) for _, sample in domain.samples(_evenly(len(domain), limit))]
    found = [radial_profile(255 * resize(image, fit(image, long_edge))) for image in images]
    return found[0][0].numpy(), torch.cat([profile for _, profile in found]).mean(0).numpy()


def _evenly(length: int, limit: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, length - 1, min(limit, length)).tolist()})


def say_survey(source: Survey, targets: Sequence[Survey], class_set: ClassSet) -> str:
    """What the surveys hold, as Markdown sentences."""
    darkest, brightest = (pick(targets, key=lambda one: one.brightness) for pick in (min, max))
    order = np.argsort(-source.shares)
    largest = " and ".join(f"{class_set.classes[i]} ({100 * source.shares[i]:.0f} %)" for i in order[:2])
    rare = [class_set.classes[i] for i in order if 0 < source.shares[i] < 0.01]
    absent = [class_set.classes[i] for i in order if source.shares[i] == 0]
    gaps = {one.domain: 50 * np.abs(one.shares - source.shares).sum() for one in targets if one.shares is not None}
    rare_names = f" ({', '.join(rare)})" if rare else ""
    ends = dict.fromkeys(f"{one.brightness:.0f} ({short_name(one.domain)})" for one in (darkest, brightest))
    lines = [
        f"- Mean grey value, of 255: {source.brightness:.0f} ({short_name(source.domain)}) in the source, "
        f"{' to '.join(ends)} in the targets.",
        f"- The largest shares of the source's labelled pixels are {largest}; {len(rare)} of {len(class_set)} classes "
        f"hold less than 1 % each{rare_names}"
        + (f"; {len(absent)} of {len(class_set)} do not occur ({', '.join(absent)})." if absent else "."),
    ]
    if gaps:
        span = " to ".join(dict.fromkeys(f"{gap:.0f}" for gap in (min(gaps.values()), max(gaps.values()))))
        lines.append(
            f"- For the source's class shares, {span} % of a target's labelled pixels would have to change class."
        )
    return "\n".join(lines)
