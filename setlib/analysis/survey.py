"""What domains hold: pictures, brightness, class shares, and examples of labels and predictions to look at."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from setlib.analysis import spectra
from setlib.data import domains
from setlib.data.augment import fit, resize, to_tensor
from setlib.data.domains import Domain, short_name
from setlib.data.labels import ClassSet
from setlib.experiment import Data
from setlib.inference import predict
from setlib.plots import coloured
from setlib.scenes import STYLES
from setlib.segmenter import Segmenter


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


def survey(domain: Domain, class_set: ClassSet, limit: int = 100) -> Survey:
    """Reads at most `limit` pictures of a domain, evenly spaced; its labels are merged into class_set."""
    counts, greys, sizes = np.zeros(256, np.int64), [], []
    for _, sample in domain.samples(evenly(len(domain), limit)):
        sizes.append(f"{sample.image.shape[1]} x {sample.image.shape[0]}")
        grey = sample.image.mean(-1)
        greys.append((grey.mean(), grey.std()))
        if sample.label is not None:
            counts += np.bincount(label_in(class_set, domain, sample.label).ravel(), minlength=256)
    counts = counts[: len(class_set)]
    shares = counts / max(counts.sum(), 1) if domain.has_labels else None
    brightness, contrast = np.mean(greys, axis=0).tolist()
    return Survey(domain.spec.text, len(domain), statistics.mode(sizes), brightness, contrast, shares)


def evenly(length: int, limit: int) -> list[int]:
    """At most `limit` places of so many, evenly spaced."""
    return sorted({round(i) for i in np.linspace(0, length - 1, min(limit, length)).tolist()})


def common_class_set(several: Sequence[Domain]) -> ClassSet:
    """The class set that all labelled domains can be counted in: the smallest of theirs."""
    return min((domain.class_set for domain in several), key=len)


def label_in(class_set: ClassSet, domain: Domain, label: np.ndarray | None) -> np.ndarray | None:
    """A domain's raw label as places in class_set, its own or one it can be merged into; None stays None."""
    if label is None or domain.class_set is class_set:
        return domain.to_score(label)
    return class_set.to_place[domain.ids.to_train[label]]


def examples(domain: Domain, indices: Sequence[int], class_set: ClassSet) -> list[np.ndarray | None]:
    """Pictures and coloured labels in turns, (h, w, 3) uint8 each; None where a domain has no labels."""
    shown = []
    for _, sample in domain.samples(indices):
        label = label_in(class_set, domain, sample.label)
        shown += [sample.image, None if label is None else coloured(sample.image, label, class_set, 0.75)]
    return shown


def predictions(
    models: Mapping[str, Segmenter], chosen: Sequence[tuple[Domain, int]], class_set: ClassSet
) -> list[tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]]:
    """What `plots.prediction_sheet` draws of chosen (domain, index): picture, label, train ids by model.

    Labels are places in class_set; the predictions are not merged yet.
    """
    found = []
    for domain, index in chosen:
        _, sample = next(domain.samples([*range(index, len(domain)), *range(index)]))
        predicted = {name: predict(model, sample.image) for name, model in models.items()}
        found.append((sample.image, label_in(class_set, domain, sample.label), predicted))
    return found


def styled_scenes(data: Data, layouts: int, styles: Sequence[str] = STYLES) -> dict[str, Tensor]:
    """The same rendered streets in several styles: {style: (layouts, 3, h, w)} in [0, 1]; rendered when missing."""
    loaded = {style: domains.load(f"scenes:{style}", replace(data, eval_images=layouts)) for style in styles}
    return {s: torch.cat([to_tensor(d.sample(i).image) for i in range(layouts)]) for s, d in loaded.items()}


def domain_profile(domain: Domain, long_edge: int, limit: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """`spectra.radial_profile` averaged over pictures of one long edge (grey values 0 to 255): radii, profile."""
    images = [to_tensor(sample.image) for _, sample in domain.samples(evenly(len(domain), limit))]
    found = [spectra.radial_profile(255 * resize(image, fit(image, long_edge))) for image in images]
    return found[0][0].numpy(), torch.cat([profile for _, profile in found]).mean(0).numpy()


def say_survey(source: Survey, targets: Sequence[Survey], class_set: ClassSet) -> str:
    """What the surveys hold, as Markdown sentences."""
    by_light = sorted(targets, key=lambda one: one.brightness)
    ends = [f"{one.brightness:.0f} ({short_name(one.domain)})" for one in (by_light[0], by_light[-1])]
    order, num_classes = np.argsort(-source.shares), len(class_set)
    largest = " and ".join(f"{class_set.classes[i]} ({100 * source.shares[i]:.0f} %)" for i in order[:2])
    rare = [class_set.classes[i] for i in order if 0 < source.shares[i] < 0.01]
    absent = [class_set.classes[i] for i in order if source.shares[i] == 0]
    rare_names = f" ({', '.join(rare)})" if rare else ""
    missing = f"; {len(absent)} of {num_classes} do not occur ({', '.join(absent)})" if absent else ""
    lines = [
        f"- Mean grey value, of 255: {source.brightness:.0f} ({short_name(source.domain)}) in the source, "
        f"{' to '.join(dict.fromkeys(ends))} in the targets.",
        f"- The largest shares of the source's labelled pixels are {largest}; {len(rare)} of {num_classes} classes "
        f"hold less than 1 % each{rare_names}{missing}.",
    ]
    gaps = [50 * np.abs(one.shares - source.shares).sum() for one in targets if one.shares is not None]
    if gaps:
        span = " to ".join(dict.fromkeys(f"{gap:.0f}" for gap in (min(gaps), max(gaps))))
        lines.append(f"- For the source's class shares, {span} % of a target's labelled pixels would change class.")
    return "\n".join(lines)
