"""Scoring: models x domains -> counts, IoU per class and mIoU. Labels are never resized: predictions are, to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from tqdm import tqdm

from setlib.data import domains
from setlib.data.labels import IGNORE, ClassSet
from setlib.distributed import add_up, collect, keep_freed_memory, part, state
from setlib.experiment import Experiment, Run
from setlib.model import DEVICE, Segmenter
from setlib.windows import label_map


class MeanIoU(evaluate.Metric):
    """IoU per class and their mean over any number of pictures, kept as one K x K matrix of pixel counts.

    A class that neither label nor prediction holds has no IoU (NaN) and is left out of the mean. IoU in percent.
    """

    def __init__(self, num_classes: int, **options: Any) -> None:
        self.counts = np.zeros((num_classes, num_classes), np.int64)  # rows: label, columns: prediction
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        pixels = datasets.Sequence(datasets.Sequence(datasets.Value("uint8")))
        return evaluate.MetricInfo(
            description="Mean intersection over union from pixel counts.",
            citation="",
            inputs_description="predictions and references: (h, w) class indices; references of 255 are ignored.",
            features=datasets.Features({"predictions": pixels, "references": pixels}),
        )

    def add(self, *, prediction: np.ndarray, reference: np.ndarray, **_: Any) -> None:
        """Counts one picture. Raises ValueError if the shapes differ."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence[np.ndarray], references: Sequence[np.ndarray], **_: Any) -> None:
        """Counts pictures, each (h, w). Raises ValueError if a prediction and its reference differ in shape."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.counts += pixel_counts(prediction, reference, len(self.counts))

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
    """One model on one domain. `pictures` holds (place in the domain, name, mIoU of that picture alone)."""

    domain: str
    class_set: ClassSet
    counts: np.ndarray
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


def share_prefix(frozen_until: Mapping[str, int]) -> tuple[str, int]:
    """Whose frozen layers serve all models (those of the one that leaves most as they are), and where they go on."""
    return max(frozen_until, key=frozen_until.get), min(filter(None, frozen_until.values()), default=0)


def evaluate_models(models: dict[str, Segmenter], domain: domains.Domain, progress: bool = True) -> dict[str, Score]:
    """Scores models that share one backbone on a domain; the first layers, which they leave as they are, run once.

    The 19 classes are merged into the domain's own by summed probabilities. Of several processes each takes its part
    of the pictures, and all get the whole score.
    Raises ValueError if the domain has no labels.
    """
    if not domain.has_labels:
        raise ValueError(f"Domain '{domain.spec.text}' has no labels: it can be predicted and looked at, not scored.")
    keep_freed_memory()
    first, stop = share_prefix({name: model.frozen_until for name, model in models.items()})
    layers = sorted({layer for model in models.values() for layer in model.feature_layers})
    classes = domain.class_set
    merge = torch.from_numpy(classes.merge_matrix())
    metrics = {name: MeanIoU(len(classes)) for name in models}
    scores = {n: Score(domain.spec.text, classes, metrics[n].counts, precision=m.precision) for n, m in models.items()}
    shown = progress and state().is_main_process
    with tqdm(part(len(domain)), desc=f"evaluate {domain.spec.text}", unit="img", disable=not shown) as bar:
        for index, sample in domain.samples(bar):
            reference = domain.to_score(sample.label)
            edge = models[first].experiment.data.edge(domain.spec.name, max(sample.image.shape[:2]))
            views = models[first].windows(sample.image, edge)
            prefixes = [models[first].prefix(view.images, stop, layers) for view in views]
            for name, model in models.items():
                merged = torch.einsum("khw,kc->chw", model.probabilities(views, prefixes), merge)
                prediction, before = label_map(merged, reference.shape), metrics[name].counts.copy()
                metrics[name].add(prediction=prediction, reference=reference)
                alone = mean_iou(iou_per_class(metrics[name].counts - before))
                scores[name].pictures.append((index, sample.name, alone))
            bar.set_postfix({name: f"{score.miou:.1f}" for name, score in list(scores.items())[:3]}, refresh=False)
    for score in scores.values():
        score.counts = add_up(torch.from_numpy(score.counts).to(DEVICE)).cpu().numpy()
        score.pictures = sorted(collect(score.pictures))
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
        for name, score in evaluate_models(models, domain, progress).items():
            table[name].append(score)
    return table


def summary(table: dict[str, list[Score]], source: str) -> list[dict]:
    """Rows of mIoU per domain, one column per model, and each model's drop against the source; percent and points.

    There is no drop between different class sets.
    """
    rows = []
    for place, score in enumerate(next(iter(table.values()))):
        row: dict[str, Any] = {"domain": score.domain + (" (source)" if score.domain == source else "")}
        row |= {name: scores[place].miou for name, scores in table.items()}
        row |= {f"drop {name}": drop(scores, scores[place], source) for name, scores in table.items()}
        how = {"classes": score.class_set.name, "precision": score.precision}
        rows.append(row | {"pictures": len(score.pictures)} | how)
    return rows


def drop(scores: Sequence[Score], score: Score, source: str) -> float:
    """Points of mIoU that a score lies below the source's; NaN if the source is not scored in the same class set."""
    own = (one.miou for one in scores if one.domain == source and one.class_set == score.class_set)
    return next(own, float("nan")) - score.miou


def by_class_set(scores: Sequence[Score]) -> dict[ClassSet, list[Score]]:
    """The scores by their class set: mIoU of different class sets is never averaged or compared."""
    groups: dict[ClassSet, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.class_set, []).append(score)
    return groups


def unseen(scores: Sequence[Score], source: str) -> dict[ClassSet, list[Score]]:
    """The scores of all domains but the source, by class set; not those in which no pixel is labelled."""
    return by_class_set([score for score in scores if score.domain != source and score.counts.any()])


def target_means(scores: Sequence[Score], source: str) -> dict[str, float]:
    """Mean mIoU over the unseen domains of each class set, percent; {class set's name: mean}."""
    return {found.name: float(np.mean([s.miou for s in group])) for found, group in unseen(scores, source).items()}


def class_means(table: dict[str, list[Score]], source: str) -> list[tuple[ClassSet, dict[str, np.ndarray]]]:
    """Per class set, {model: (K,) percent}: IoU of each class, averaged over the unseen domains that have it."""
    groups = {name: unseen(scores, source) for name, scores in table.items()}
    return [
        (
            found,
            {
                name: np.ma.masked_invalid([s.iou for s in own[found]]).mean(0).filled(np.nan)
                for name, own in groups.items()
            },
        )
        for found in next(iter(groups.values()))
    ]


def hardest(scores: Sequence[Score], source: str) -> Score:
    """The lowest mIoU among the unseen domains of the first one's class set; the source's score if none is unseen."""
    own = [score for score in scores if score.domain == source] or scores
    return min(next(iter(unseen(scores, source).values()), own), key=lambda score: score.miou)


def extremes(score: Score, count: int = 2) -> list[tuple[int, str, float]]:
    """The `count` best and the `count` worst pictures of a domain, best first; fewer if there are not so many."""
    ranked = sorted((p for p in score.pictures if p[2] == p[2]), key=lambda picture: -picture[2])
    return ranked[:count] + ranked[count:][-count:]


def verdict(table: dict[str, list[Score]], source: str) -> str:
    """What the table shows, in words made from its numbers."""
    means = {name: target_means(scores, source) for name, scores in table.items()}
    text = "No domain but the source was scored. "
    for place, classes in enumerate(next(iter(means.values()))):
        found = {name: mean[classes] for name, mean in means.items()}
        words = ", ".join(f"{name} {mean:.1f}" for name, mean in found.items())
        text = (text if place else "") + f"Mean over the unseen domains in {classes}: {words} % mIoU. "
    if empty := [score.domain for score in next(iter(table.values())) if not score.counts.any()]:
        text += f"Left out, for no pixel of it is labelled: {', '.join(empty)}. "
    best = max(table, key=lambda name: next(iter(means[name].values()), 0.0))
    worst = hardest(table[best], source)
    points = drop(table[best], worst, source)
    if worst.domain != source:
        text += f"The hardest for {best} is {worst.domain} ({worst.miou:.1f} %)"
        text += f", {points:.1f} points below its own source. " if points == points else ". "
    return text + "One seed each: a difference of a few points can be chance (notebook 05 shows the spread)."


def write_metrics(run: Run, scores: Sequence[Score], used: Experiment | None = None) -> dict:
    """RUN/metrics.json: what was scored now, and what was scored on other domains before. Returns its content.

    used: how the pictures were chosen and predicted, where the run's configuration was overridden.
    """
    path, experiment = run.path / "metrics.json", run.experiment
    results = {r["domain"]: r for r in run.read_json("metrics.json")["results"]} if path.is_file() else {}
    used = used or experiment
    how = {"inference": str(used.inference), "content_seed": used.data.content_seed}
    how["eval_edges"] = list(used.data.eval_edges)
    results |= {score.domain: score.to_dict() | how for score in scores}
    content = {
        "profile": experiment.profile,
        "seed": experiment.seed,
        "source": experiment.data.source,
        "config": experiment.to_dict(),
        "results": list(results.values()),
    }
    run.write_json("metrics.json", content)
    return content
