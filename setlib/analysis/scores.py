"""What trainings and scores show: tables, means over unseen domains, and words made from the numbers alone.

mIoU of different class sets is never averaged or compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas

from setlib.data.labels import ClassSet
from setlib.evaluation import PictureScore, Score
from setlib.experiment import Experiment
from setlib.files import LOCK, alone
from setlib.run import Run
from setlib.segmenter import Segmenter

# Trainings: what `training.train_together` returns, {name: (model, history)}


def training_summary(trained: dict[str, tuple[Segmenter, list[dict]]], window: int = 10) -> list[dict]:
    """Rows per model: parameters by part, mean loss of first and last `window` steps, median seconds; NaN if lost."""
    rows = []
    for name, (model, history) in trained.items():
        taken = pandas.DataFrame(history, columns=["loss", "seconds"])
        parts = {f"parameters of the {part}": count for part, count in model.num_trainable().items()}
        steps = {"steps": model.experiment.train.steps, "precision": model.precision}
        ends = {"first loss": taken.loss[:window].mean(), "last loss": taken.loss[-window:].mean()}
        rows.append({"model": name} | parts | steps | ends | {"seconds per step": taken.seconds.median()})
    return rows


def say_training(rows: list[dict]) -> str:
    """What `training_summary` shows, in words made from its numbers."""
    rows = [row for row in rows if row["last loss"] == row["last loss"]]
    parts = [f"{row['model']} from {row['first loss']:.2f} to {row['last loss']:.2f}" for row in rows]
    text = f"The loss on the source went, over {rows[0]['steps']} steps: {'; '.join(parts)}. " if rows else ""
    if len(rows) > 1:
        text += f"Lowest at the end is {min(rows, key=lambda row: row['last loss'])['model']}. "
    return text + "A low loss on the source says nothing yet of other domains: that is asked in notebook 04."


# Scores: what `evaluation.evaluate_run` returns, {model: [Score, ...]}


def results(table: Mapping[str, Sequence[Score]], source: str) -> pandas.DataFrame:
    """One row a model and domain: model, domain, class_set, miou (percent), drop, pictures, precision, unseen.

    drop: points below the same model on the source in the same class set, NaN without it. unseen: of no source, with
    labelled pixels.
    """
    columns = ["model", "domain", "class_set", "miou", "pictures", "precision"]
    rows = [
        (name, score.domain, score.class_set.name, score.miou, len(score.pictures), score.precision)
        for name, scores in table.items()
        for score in scores
    ]
    frame = pandas.DataFrame(rows, columns=columns)
    frame["unseen"] = (frame.domain != source) & frame.miou.notna()
    own = frame[frame.domain == source].set_index(["model", "class_set"]).miou.rename("own")
    frame["drop"] = frame.join(own, on=["model", "class_set"]).own - frame.miou
    return frame


def score_summary(table: Mapping[str, Sequence[Score]], source: str) -> list[dict]:
    """Rows of mIoU per domain, one column per model, and each model's drop against the source; percent and points."""
    rows = []
    for domain, found in results(table, source).groupby("domain", sort=False):
        first, by_model = found.iloc[0], found.set_index("model")
        row = {"domain": domain + " (source)" * (domain == source)} | by_model["miou"].to_dict()
        row |= {f"drop {name}": points for name, points in by_model["drop"].items()}
        rows.append(row | {"pictures": first.pictures, "classes": first.class_set, "precision": first.precision})
    return rows


def unseen(scores: Iterable[Score], source: str) -> dict[ClassSet, list[Score]]:
    """The scores of all domains but the source in which a pixel is labelled, by class set."""
    return by_class_set(score for score in scores if score.domain != source and score.counts.any())


def by_class_set(scores: Iterable[Score]) -> dict[ClassSet, list[Score]]:
    """The scores by their class set."""
    groups: dict[ClassSet, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.class_set, []).append(score)
    return groups


def target_means(table: Mapping[str, Sequence[Score]], source: str) -> dict[str, dict[str, float]]:
    """Mean mIoU over the unseen domains of each class set, percent: {class set's name: {model: mean}}."""
    groups = results(table, source).query("unseen").groupby("class_set", sort=False)
    return {classes: found.groupby("model", sort=False).miou.mean().to_dict() for classes, found in groups}


def class_means(table: Mapping[str, Sequence[Score]], source: str) -> list[tuple[ClassSet, dict[str, np.ndarray]]]:
    """Per class set, {model: (K,) percent}: IoU of each class, averaged over the unseen domains that have it."""
    groups, means = {name: unseen(scores, source) for name, scores in table.items()}, []
    for classes in next(iter(groups.values())):
        iou = {name: pandas.DataFrame([s.iou for s in own[classes]]).mean().to_numpy() for name, own in groups.items()}
        means.append((classes, iou))
    return means


def hardest(scores: Sequence[Score], source: str) -> Score:
    """The lowest mIoU among the unseen domains of the first one's class set; the source's score if none is unseen."""
    own = [score for score in scores if score.domain == source] or scores
    return min(next(iter(unseen(scores, source).values()), own), key=lambda score: score.miou)


def extremes(score: Score, count: int = 2) -> list[PictureScore]:
    """The `count` best and the `count` worst pictures of a domain, best first; fewer if there are not so many."""
    ranked = sorted((p for p in score.pictures if p.miou == p.miou), key=lambda picture: -picture.miou)
    return ranked[:count] + ranked[count:][-count:]


def say_scores(table: Mapping[str, Sequence[Score]], source: str) -> str:
    """What the table shows, in words made from its numbers."""
    frame, means = results(table, source), target_means(table, source)
    text = "" if means else "No domain but the source was scored. "
    for classes, found in means.items():
        words = ", ".join(f"{name} {mean:.1f}" for name, mean in found.items())
        text += f"Mean over the unseen domains in {classes}: {words} % mIoU. "
    if empty := [score.domain for score in next(iter(table.values())) if not score.counts.any()]:
        text += f"Left out, for no pixel of it is labelled: {', '.join(empty)}. "
    if means:
        first = next(iter(means.values()))
        best = max(first, key=lambda name: first[name])
        worst = hardest(table[best], source)
        row = frame[(frame.model == best) & (frame.domain == worst.domain)].iloc[0]
        text += f"The hardest for {best} is {worst.domain} ({worst.miou:.1f} %)"
        text += f", {row['drop']:.1f} points below its own source. " if row["drop"] == row["drop"] else ". "
    return text + "One seed each: a difference of a few points can be chance (notebook 05 shows the spread)."


def write_metrics(run: Run, scores: Sequence[Score], used: Experiment | None = None) -> None:
    """RUN/metrics.json: what was scored now, and what was scored on other domains before.

    used: how the pictures were chosen and predicted, where the run's configuration was overridden.
    """
    experiment, used, results = run.experiment, used or run.experiment, {}
    views = used.inference
    words = ["whole pictures" if views.whole else f"windows by {views.stride:.2f}"]
    words += [f"scales {', '.join(f'{scale:g}' for scale in views.scales)}"] if views.scales != (1.0,) else []
    words += ["flip"] * views.flip
    for score in scores:
        iou = [round(value, 4) for value in score.iou.tolist()]
        results[score.domain] = {
            "domain": score.domain,
            "miou": round(score.miou, 4),
            "per_class": dict(zip(score.class_set.classes, iou, strict=True)),
            "images": len(score.pictures),
            "pixels": int(score.counts.sum()),
            "class_set": score.class_set.name,
            "precision": score.precision,
            "inference": " + ".join(words),
            "content_seed": used.data.content_seed,
            "eval_edges": used.data.eval_edges,
        }
    about = {"profile": experiment.profile, "seed": experiment.seed, "source": experiment.data.source}
    with alone(run.path / LOCK):
        before = {result["domain"]: result for result in run.read_json("metrics.json", {"results": []})["results"]}
        content = {"config": experiment.to_dict(), "results": list((before | results).values())}
        run.write_json("metrics.json", about | content)
