"""Scoring: models x domains -> counts, IoU per class and mIoU. Labels are never resized: predictions are, to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from evaluate import Metric, MetricInfo
from tqdm import tqdm

from setlib._memory import keep_freed_memory
from setlib.data import domains
from setlib.data.domains import Domain
from setlib.data.labels import IGNORE, ClassSet
from setlib.distributed import all_gather, all_reduce, shard_indices, state
from setlib.features import SharedFeatures
from setlib.inference import class_probabilities, cut_picture, label_map
from setlib.run import Run
from setlib.segmenter import Segmenter


class MeanIoU(Metric):
    """IoU per class and their mean over any number of pictures, kept as one K x K matrix of pixel counts.

    A class that neither label nor prediction holds has no IoU (NaN) and is left out of the mean. IoU in percent.
    """

    def __init__(self, num_classes: int, **options: Any) -> None:
        self.counts = np.zeros((num_classes, num_classes), np.int64)  # rows: label, columns: prediction
        super().__init__(**options)

    def _info(self) -> MetricInfo:
        pixels = datasets.Sequence(datasets.Sequence(datasets.Value("uint8")))
        return MetricInfo(
            description="Mean intersection over union from pixel counts.",
            citation="",
            inputs_description="predictions and references: (h, w) class indices; references of 255 are ignored.",
            features=datasets.Features({"predictions": pixels, "references": pixels}),
        )

    def add(self, *, prediction: np.ndarray, reference: np.ndarray, **_: Any) -> np.ndarray:
        """Counts one picture, and returns its counts (K, K). Raises ValueError if the shapes differ."""
        counts = pixel_counts(prediction, reference, len(self.counts))
        self.counts += counts
        return counts

    def add_batch(self, *, predictions: Sequence[np.ndarray], references: Sequence[np.ndarray], **_: Any) -> None:
        """Counts pictures, each (h, w)."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(self, **inputs: Any) -> dict[str, Any]:
        """{"miou": percent, "iou": (K,) percent} of all that was added, now (by keywords as in add_batch) or before."""
        if inputs:
            self.add_batch(**inputs)
        iou = iou_per_class(self.counts)
        return {"miou": mean_iou(iou), "iou": iou}


def pixel_counts(prediction: np.ndarray, reference: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, K) pixels by label (row) and prediction (column) of one picture. Raises ValueError if the shapes differ."""
    if prediction.shape != reference.shape:
        raise ValueError(f"Prediction {prediction.shape} and label {reference.shape} differ in size.")
    kept = reference != IGNORE
    pairs = reference[kept].astype(np.int64) * num_classes + prediction[kept]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def iou_per_class(counts: np.ndarray) -> np.ndarray:
    """(K,) percent from (K, K) pixel counts; NaN where neither label nor prediction holds the class."""
    hit = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - hit
    return np.where(union > 0, 100 * hit / np.maximum(union, 1), np.nan)


def mean_iou(iou: np.ndarray) -> float:
    """Mean over the classes that have an IoU; NaN if none has."""
    return float(np.nanmean(iou)) if not np.isnan(iou).all() else float("nan")


@dataclass
class Score:
    """One model on one domain. counts: (K, K) pixels by label (row) and prediction (column).

    `pictures` holds (place in the domain, name, mIoU of that picture alone).
    """

    domain: str
    class_set: ClassSet
    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    pictures: list[tuple[int, str, float]] = field(default_factory=list)
    precision: str = "float32"  # of the matrix products

    @property
    def iou(self) -> np.ndarray:
        """(K,) percent, NaN for absent classes."""
        return iou_per_class(self.counts)

    @property
    def miou(self) -> float:
        """Percent."""
        return mean_iou(self.iou)

    def to_dict(self) -> dict:
        """The entry of metrics.json."""
        iou = [None if np.isnan(v) else round(float(v), 4) for v in self.iou]
        return {
            "domain": self.domain,
            "miou": None if np.isnan(self.miou) else round(self.miou, 4),
            "per_class": dict(zip(self.class_set.classes, iou, strict=True)),
            "images": len(self.pictures),
            "pixels": int(self.counts.sum()),
            "class_set": self.class_set.name,
            "precision": self.precision,
        }


def evaluate(models: dict[str, Segmenter], domain: Domain, progress: bool = True) -> dict[str, Score]:
    """Scores models that share one backbone on a domain; the first layers, which they leave as they are, run once.

    The 19 classes are merged into the domain's own by summed probabilities. Of several processes each takes its part
    of the pictures, and all get the whole score.

    Raises
    ------
    ValueError : the domain has no labels.
    """
    if not domain.has_labels:
        raise ValueError(f"Domain '{domain.spec.text}' has no labels: it can be predicted and looked at, not scored.")
    keep_freed_memory()
    shared, any_model, classes = SharedFeatures(models.values()), next(iter(models.values())), domain.class_set
    metrics = {name: MeanIoU(len(classes)) for name in models}
    scores = {name: Score(domain.spec.text, classes, precision=model.precision) for name, model in models.items()}
    shown = progress and state().is_main_process
    with tqdm(shard_indices(len(domain)), desc=f"evaluate {domain.spec.text}", unit="img", disable=not shown) as bar:
        for index, sample in domain.samples(bar):
            reference = np.asarray(domain.to_score(sample.label))
            edge = any_model.experiment.data.edge(domain.spec.name, max(sample.image.shape[:2]))
            passes = cut_picture(any_model, sample.image, edge)
            frozen = [shared(windows.images) for windows in passes]
            for name, model in models.items():
                merged = classes.merge(class_probabilities(model, passes, frozen))
                counts = metrics[name].add(prediction=label_map(merged, reference.shape), reference=reference)
                scores[name].pictures.append((index, sample.name, mean_iou(iou_per_class(counts))))
            bar.set_postfix(
                {name: f"{m.compute()['miou']:.1f}" for name, m in list(metrics.items())[:3]}, refresh=False
            )
    for name, score in scores.items():
        score.counts = all_reduce(torch.from_numpy(metrics[name].counts).to(any_model.device)).cpu().numpy()
        score.pictures = sorted(all_gather(score.pictures))
    return scores


def evaluate_run(
    run: Run, models: dict[str, Segmenter], names: Sequence[str], progress: bool = True
) -> dict[str, list[Score]]:
    """Scores the run's models on every named domain: {model: [Score, ...]}; one decode and one frozen pass for all.

    A domain without labels is left out.
    """
    table: dict[str, list[Score]] = {name: [] for name in models}
    for text in names:
        with state().main_process_first():  # what is rendered once is then there for all
            domain = domains.load(text, run.experiment.data, role="target")
        if not domain.has_labels:
            tqdm.write(f"{text} has no labels: looked at, not scored")
            continue
        for name, score in evaluate(models, domain, progress).items():
            table[name].append(score)
    return table
