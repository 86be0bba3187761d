"""Refiner variants x seeds: trained alike, scored alike, one tidy table with the spread over seeds."""

from __future__ import annotations

import numpy as np

from setlib.analysis.scores import target_means
from setlib.evaluation import evaluate_run
from setlib.run import Run
from setlib.training import train_together

MEAN = "mean of targets"  # with the class set's name behind it where the targets have several


def run_ablation(run: Run, progress: bool = True) -> list[dict]:
    """Trains every variant of experiment.ablation with every seed in RUN/ablation and scores it on source and targets.

    The crops and their frozen features are shared by all; a seed decides initial weights and the order of the crops.
    What is finished is loaded. Returns rows {"variant", "seed", "precision", "domain", "miou"} (percent), with the
    mean over the targets of each class set after each model's domains.
    """
    settings, data = run.experiment.ablation, run.experiment.data
    runs = {
        f"{variant}, seed {seed}": run.nested(
            f"ablation/{variant}-seed{seed}", f"model.refiner={variant}", f"seed={seed}", *settings.overrides
        )
        for seed in settings.seeds
        for variant in settings.variants
    }
    models = {name: model for name, (model, _) in train_together(runs, progress).items()}
    small = next(iter(runs.values()))
    table = evaluate_run(small, models, list(dict.fromkeys([data.source, *data.targets])), progress)
    rows = []
    for name, scores in table.items():
        made = runs[name].experiment
        who = {"variant": made.model.refiner, "seed": made.seed, "precision": models[name].precision}
        rows += [who | {"domain": score.domain, "miou": score.miou} for score in scores]
        means = target_means({name: scores}, data.source)
        rows += [who | {"domain": MEAN + f", {c}" * (len(means) > 1), "miou": mean[name]} for c, mean in means.items()]
    return rows


def spread(rows: list[dict]) -> list[dict]:
    """Per variant and domain the mean over seeds and the range (lowest and highest seed), percent.

    A domain without a labelled pixel has no cell.
    A range, not a confidence interval: with two or three seeds an interval would promise more than is known.
    """
    cells: dict[tuple[str, str], list[dict]] = {}
    for row in (row for row in rows if row["miou"] == row["miou"]):
        cells.setdefault((row["variant"], row["domain"]), []).append(row)
    return [
        {
            "variant": variant,
            "domain": domain,
            "mean": float(np.mean([row["miou"] for row in cell])),
            "low": min(row["miou"] for row in cell),
            "high": max(row["miou"] for row in cell),
            "seeds": [row["seed"] for row in cell],
            "values": [row["miou"] for row in cell],
        }
        for (variant, domain), cell in cells.items()
    ]


def verdict(rows: list[dict]) -> str:
    """What the means over the targets show, in words made from the numbers."""
    cells = [cell for cell in spread(rows) if cell["domain"].startswith(MEAN)]
    text = "".join(_compare([c for c in cells if c["domain"] == d]) for d in dict.fromkeys(c["domain"] for c in cells))
    if empty := dict.fromkeys(row["domain"] for row in rows if row["miou"] != row["miou"]):
        text += f"Left out, for no pixel of it is labelled: {', '.join(empty)}. "
    return text + "Short trainings on few pictures: a hint where to look, not a ranking."


def _compare(cells: list[dict]) -> str:
    """Sentences on the variants' cells of one domain."""
    cells = sorted(cells, key=lambda cell: -cell["mean"])
    best, others = cells[0], cells[1:]
    text = (
        f"Over the seeds {', '.join(map(str, best['seeds']))}, **{best['variant']}** has the highest {best['domain']} "
    )
    text += f"({best['mean']:.1f} %, seeds {best['low']:.1f} to {best['high']:.1f}). "
    clear = [cell["variant"] for cell in others if cell["high"] < best["low"]]
    tied = [cell["variant"] for cell in others if cell["high"] >= best["low"]]
    if clear:
        text += f"Every seed of it is above every seed of {', '.join(clear)}. "
    if tied:
        text += f"Its seeds overlap with those of {', '.join(tied)}: no difference is shown there. "
    return text
