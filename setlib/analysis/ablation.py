"""Refiner variants x seeds: trained alike, scored alike, one tidy table with the spread over seeds."""

from __future__ import annotations

from itertools import product

import pandas

from setlib.analysis.scores import target_means
from setlib.checkpoint import build_segmenter, is_finished
from setlib.data import domains
from setlib.data.crops import RandomCrops
from setlib.evaluation import evaluate_run
from setlib.features import KeptCrops, keep_crops
from setlib.run import Run
from setlib.segmenter import Segmenter
from setlib.training import train
from setlib.weights.load import load_backbone

MEAN = "mean of targets"  # with the class set's name behind it where the targets have several


def train_together(
    runs: dict[str, Run], crops: KeptCrops | RandomCrops | None = None
) -> dict[str, tuple[Segmenter, list[dict]]]:
    """Trains runs that share source, crops and backbone one after the other: the frozen layers are computed once."""
    first = next(iter(runs.values())).experiment
    backbone = load_backbone(first.model.backbone, patch_size=first.model.patch_size)
    source = domains.load(first.data.source, first.data, role="source")
    if crops is None and not all(is_finished(run) for run in runs.values()):
        models = (build_segmenter(run.experiment, backbone) for run in runs.values())  # not kept
        crops = keep_crops(models, RandomCrops(source, first))
    return {name: train(run, source=source, backbone=backbone, crops=crops) for name, run in runs.items()}


def run_ablation(run: Run) -> list[dict]:
    """Trains every variant of experiment.ablation with every seed in RUN/ablation and scores it on source and targets.

    The crops and their frozen features are shared by all; a seed decides initial weights and the order of the crops.
    What is finished is loaded. Returns rows {"variant", "seed", "precision", "domain", "miou"} (percent), with the
    mean over the targets of each class set after each model's domains.
    """
    settings, data = run.experiment.ablation, run.experiment.data
    runs = {}
    for seed, variant in product(settings.seeds, settings.variants):
        options = f"model.refiner={variant}", f"seed={seed}", *settings.overrides
        runs[f"{variant}, seed {seed}"] = run.nested(f"ablation/{variant}-seed{seed}", *options)
    models = {name: model for name, (model, _) in train_together(runs).items()}
    small = next(iter(runs.values()))
    table = evaluate_run(small, models, list(dict.fromkeys([data.source, *data.targets])))
    means = target_means(table, data.source)
    rows = []
    for name, scores in table.items():
        made = runs[name].experiment
        cells = [(score.domain, score.miou) for score in scores]
        for class_set, by_model in means.items():
            cells.append((f"{MEAN}, {class_set}" if len(means) > 1 else MEAN, by_model[name]))
        who = {"variant": made.model.refiner, "seed": made.seed, "precision": models[name].precision}
        rows += [who | {"domain": domain, "miou": miou} for domain, miou in cells]
    return rows


def spread(rows: list[dict]) -> list[dict]:
    """Per variant and domain the mean over seeds and the range (lowest and highest seed), percent.

    A domain without a labelled pixel has no cell.
    A range, not a confidence interval: with two or three seeds an interval would promise more than is known.
    """
    cells = pandas.DataFrame(rows).dropna(subset="miou").groupby(["variant", "domain"], sort=False)
    found = cells.miou.agg(mean="mean", low="min", high="max").assign(seeds=cells.seed.agg(list))
    return found.assign(values=cells.miou.agg(list)).reset_index().to_dict("records")


def verdict(rows: list[dict]) -> str:
    """What the means over the targets show, in words made from the numbers."""
    text, cells = "", [cell for cell in spread(rows) if cell["domain"].startswith(MEAN)]
    for domain in dict.fromkeys(cell["domain"] for cell in cells):
        best, *others = sorted((cell for cell in cells if cell["domain"] == domain), key=lambda cell: -cell["mean"])
        below = [cell["variant"] for cell in others if cell["high"] < best["low"]]
        tied = [cell["variant"] for cell in others if cell["high"] >= best["low"]]
        text += (
            f"Over the seeds {', '.join(map(str, best['seeds']))}, **{best['variant']}** has the highest {domain} "
            f"({best['mean']:.1f} %, seeds {best['low']:.1f} to {best['high']:.1f}). "
        )
        if below:
            text += f"Every seed of it is above every seed of {', '.join(below)}. "
        if tied:
            text += f"Its seeds overlap with those of {', '.join(tied)}: no difference is shown there. "
    if empty := dict.fromkeys(row["domain"] for row in rows if row["miou"] != row["miou"]):
        text += f"Left out, for no pixel of it is labelled: {', '.join(empty)}. "
    return text + "Short trainings on few pictures: a hint where to look, not a ranking."
