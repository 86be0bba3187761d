"""Mean intersection over union, from one matrix of pixel counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from evaluate import Metric, MetricInfo

from setlib.data.labels import IGNORE


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


def tally(counts: np.ndarray) -> np.ndarray:
    """(3, K): pixels of each class that are hit, labelled and predicted, from (K, K) pixel counts; they add up."""
    return np.stack([np.diag(counts), counts.sum(1), counts.sum(0)])


def iou_per_class(counts: np.ndarray) -> np.ndarray:
    """(K,) percent from (K, K) pixel counts; NaN where neither label nor prediction holds the class."""
    return iou_of_tally(tally(counts))


def iou_of_tally(tallies: np.ndarray) -> np.ndarray:
    """(..., K) percent from tallies (..., 3, K)."""
    hit, labelled, predicted = np.moveaxis(tallies, -2, 0)
    union = labelled + predicted - hit
    return np.where(union > 0, 100 * hit / np.where(union > 0, union, 1), np.nan)


def mean_iou(iou: np.ndarray) -> float:
    """Mean over the classes that have an IoU; NaN if none has."""
    return float(np.nanmean(iou)) if not np.isnan(iou).all() else float("nan")
