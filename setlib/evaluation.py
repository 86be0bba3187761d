"""Scoring: models x domains -> counts, IoU per class and mIoU. Labels are never resized: predictions are, to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object, reduce
from tqdm import tqdm

from setlib._memory import label_map
from setlib.data import domains
from setlib.data.domains import Domain
from setlib.data.labels import ClassSet
from setlib.distributed import state
from setlib.features import SharedFeatures
from setlib.inference import class_probabilities, cut_picture
from setlib.metric import MeanIoU, iou_per_class, mean_iou, tally
from setlib.run import Run
from setlib.segmenter import Segmenter


class PictureScore(NamedTuple):
    """One model on one picture. place: in its domain; miou: of it alone, percent; tally: see `metric.tally`, (3, K)."""

    place: int
    name: str
    miou: float
    tally: np.ndarray


@dataclass
class Score:
    """One model on one domain. counts: (K, K) pixels by label (row) and prediction (column)."""

    domain: str
    class_set: ClassSet
    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    pictures: list[PictureScore] = field(default_factory=list)
    precision: str = "float32"  # of the matrix products

    @property
    def iou(self) -> np.ndarray:
        """(K,) percent, NaN for absent classes."""
        return iou_per_class(self.counts)

    @property
    def miou(self) -> float:
        """Mean over the classes present, percent."""
        return mean_iou(self.iou)


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
    shared, any_model, classes = SharedFeatures(models.values()), next(iter(models.values())), domain.class_set
    metrics = {name: MeanIoU(len(classes)) for name in models}
    scores = {name: Score(domain.spec.text, classes, precision=model.precision) for name, model in models.items()}
    shown = progress and state().is_main_process
    own = range(state().process_index, len(domain), state().num_processes)  # of several processes
    with tqdm(own, desc=f"evaluate {domain.spec.text}", unit="img", leave=None, disable=not shown) as bar:
        for index, sample in domain.samples(bar):
            reference = np.asarray(domain.to_score(sample.label))
            edge = any_model.experiment.data.edge(domain.spec.name, max(sample.image.shape[:2]))
            passes = cut_picture(any_model, sample.image, edge)
            frozen = [shared(windows.images) for windows in passes]
            for name, model in models.items():
                merged = classes.merge(class_probabilities(model, passes, frozen))
                counts = metrics[name].add(prediction=label_map(merged, reference.shape), reference=reference)
                miou = mean_iou(iou_per_class(counts))
                scores[name].pictures.append(PictureScore(index, sample.name, miou, tally(counts)))
            latest = {name: f"{metric.compute()['miou']:.1f}" for name, metric in list(metrics.items())[:3]}
            bar.set_postfix(latest, refresh=False)
    for name, score in scores.items():
        score.counts = reduce(torch.from_numpy(metrics[name].counts).to(any_model.device), "sum").cpu().numpy()
        score.pictures = sorted(gather_object(score.pictures))
    return scores


def evaluate_run(run: Run, models: dict[str, Segmenter], names: Sequence[str]) -> dict[str, list[Score]]:
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
        for name, score in evaluate(models, domain).items():
            table[name].append(score)
    return table
