"""Variants x seeds x (source -> targets): trained alike, scored alike, compared in pairs, with intervals."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import torch
from safetensors import safe_open
from safetensors.torch import save
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from setlib.analysis.survey import styled_scenes
from setlib.backbone import FrozenBackbone
from setlib.checkpoint import build_segmenter, is_finished, load_segmenter
from setlib.data import domains
from setlib.data.corruptions import take_apart
from setlib.data.crops import RandomCrops
from setlib.evaluation import Score, evaluate
from setlib.experiment import Experiment
from setlib.features import KeptCrops, keep_crops
from setlib.files import write_atomic
from setlib.metric import iou_of_tally, mean_iou
from setlib.run import Run
from setlib.segmenter import Segmenter
from setlib.style import kind
from setlib.training import train
from setlib.weights.load import load_backbone

MEAN = "mean of targets"  # with the class set's name behind it where the targets have several
RESAMPLES, LEVEL = 2000, 0.95
STRETCH = 10  # pictures are drawn anew in stretches of so many: neighbours in a video look alike


SHARED = (  # what variants that are compared have in common
    *("seed=", "model.refiner=", "ablation.", "data.source=", "data.targets=", "data.class_set="),
    *("data.eval_images=", "data.content_seed="),
)


class Trial(NamedTuple):
    """One training: a variant, a seed and a source, in a run folder of its own; domains: that it is scored on."""

    variant: str
    run: Run
    domains: tuple[str, ...]


class Found(NamedTuple):
    """What one trial scored on one domain. tally: (pictures, 3, K), see `metric.tally`; miou: percent."""

    variant: str
    experiment: Experiment
    domain: str
    class_set: str
    classes: list[str]
    precision: str
    tally: np.ndarray

    @property
    def miou(self) -> float:
        """Over all pictures of the domain, percent."""
        return mean_iou(iou_of_tally(self.tally.sum(0)))


def plan(run: Run) -> list[Trial]:
    """Every training of `experiment.ablation`, in folders below RUN/ablation; each knows of itself alone.

    So more variants, seeds, sources and targets may be asked for later. Domains without labels are left out, and said.
    Raises ValueError for what cannot be compared.
    """
    settings, trials, labelled = run.experiment.ablation, [], dict[str, bool]()
    transfers, variants = run.experiment.transfers, [" ".join(text.split()) for text in settings.variants]
    for kept in (variants, settings.seeds, [source for source, _ in transfers]):
        if twice := [value for value in kept if list(kept).count(value) > 1]:
            raise ValueError(f"The ablation has '{twice[0]}' twice: name each variant, seed and source once.")
    for (source, targets), seed, variant in product(transfers, settings.seeds, variants):
        refiner, *words = variant.split()
        if fixed := [word for word in words if word.startswith(SHARED)]:
            raise ValueError(f"Variant '{variant}' sets {fixed[0].partition('=')[0]}, which all variants must share.")
        options = f"ablation.variants={variant}", f"ablation.seeds={seed}", "ablation.baseline=", "ablation.transfers="
        own = f"data.source={source}", f"data.targets={source}", f"model.refiner={refiner}", f"seed={seed}"
        folder = f"{_file_name(source)}/" * bool(settings.transfers) + f"{_file_name(variant)}-seed{seed}"
        made = run.nested(f"ablation/{folder}", *options, *settings.overrides, *own, *words)
        if refiner == "set-released" and not made.experiment.model.any_batch:
            raise ValueError(f"Variant '{variant}' is scored picture by picture: it needs model.any_batch=true.")
        for name in (source, *targets):
            if name not in labelled:
                is_rendered = domains.parse(name).name == "scenes"
                labelled[name] = is_rendered or domains.load(name, made.experiment.data, role="target").has_labels
        trials.append(Trial(variant, made, tuple(name for name in dict.fromkeys((source, *targets)) if labelled[name])))
    if bare := [name for name, has_labels in labelled.items() if not has_labels]:
        tqdm.write(f"{', '.join(bare)}: no labels, looked at, not scored")
    return trials


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=,~-]+", "_", text)


def train_together(
    runs: dict[str, Run], crops: KeptCrops | RandomCrops | None = None, bar: tqdm | None = None
) -> dict[str, tuple[Segmenter, list[dict]]]:
    """Trains runs that share source, crops and backbone one after the other: the frozen layers are computed once.

    Once for each kind of style, that is; fresh crops (train.views=0) are each run's own. crops: for those of their
    style. bar: moved on by one for each training.
    """
    first = next(iter(runs.values())).experiment
    backbone = load_backbone(first.model.backbone, patch_size=first.model.patch_size)
    source = domains.load(first.data.source, first.data, role="source")
    groups: dict[tuple, dict[str, Run]] = {}
    for name, run in runs.items():
        groups.setdefault(kind(build_segmenter(run.experiment, backbone).refiner.style), {})[name] = run
    trained = {}
    for style, own in groups.items():
        shared = crops if isinstance(crops, RandomCrops) or (crops and kind(crops.style) == style) else None
        if shared is None and first.train.views and not all(is_finished(run.path) for run in own.values()):
            models = (build_segmenter(run.experiment, backbone) for run in own.values())  # not kept
            shared = keep_crops(models, RandomCrops(source, first))
        for name, run in own.items():
            trained[name] = train(run, source=source, backbone=backbone, crops=shared)
            if bar is not None:
                bar.update()
    return {name: trained[name] for name in runs}


def run_ablation(run: Run) -> list[Found]:
    """Trains every variant of experiment.ablation with every seed on every source; scores it on source and targets.

    A seed decides initial weights and the order of the crops; crops and frozen features are shared. What is finished is
    loaded, so that a killed ablation goes on. All rows, a class each, are in RUN/ablation/table.csv.
    """
    trials = plan(run)
    groups = _alike(trials) if any(map(_lacking, trials)) else []
    left = [group for group in groups if any(map(_lacking, group))]
    with tqdm(total=2 * sum(map(len, left)), desc="ablation", unit="part", smoothing=0, disable=not left) as bar:
        for group in left:  # whole, so that frozen layers end where they would have, had nothing been done before
            runs = {f"{trial.variant}, seed {trial.run.experiment.seed}": trial.run for trial in group}
            models = {name: model for name, (model, _) in train_together(runs, bar=bar).items()}
            for domain in dict.fromkeys(domain for trial in group for domain in _lacking(trial)):
                lack = {name: trial for name, trial in zip(models, group, strict=True) if domain in _lacking(trial)}
                loaded = domains.load(domain, group[0].run.experiment.data, role="target")
                for name, score in evaluate({name: models[name] for name in lack}, loaded).items():
                    _write(lack[name], score)
            bar.update(len(group))
    found = [_read(trial, domain) for trial in trials for domain in trial.domains]
    write_atomic(run.path / "ablation" / "table.csv", table(found).to_csv(index=False))
    return found


def _lacking(trial: Trial) -> list[str]:
    """The domains that a trial is not scored on yet."""
    return [domain for domain in trial.domains if not _path(trial, domain).is_file()]


def _alike(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials in groups that share source, crops, pictures and the frozen layers that are computed once for all."""
    groups, backbones = dict[str, dict[int, list[Trial]]](), dict[tuple, FrozenBackbone]()
    for trial in trials:
        made = trial.run.experiment
        name = made.model.backbone, made.model.patch_size
        backbones[name] = backbones.get(name) or load_backbone(name[0], patch_size=name[1])
        model = build_segmenter(made, backbones[name])
        shared = made.data, made.inference, made.train.views, made.train.batch_size, name, model.precision
        mixed = made.train.mix, made.train.mix_layer, made.train.mix_high
        learns = model.frozen_until if model.refiner.layers else 0  # what refines nothing goes with any of its data
        groups.setdefault(repr((shared, mixed, kind(model.refiner.style))), {}).setdefault(learns, []).append(trial)
    for by_layer in groups.values():
        if len(by_layer) > 1 and 0 in by_layer:
            by_layer[max(by_layer)] += by_layer.pop(0)
    return [group for by_layer in groups.values() for group in by_layer.values()]


def _path(trial: Trial, domain: str) -> Path:
    return trial.run.path / "scores" / f"{_file_name(domain)}.safetensors"


def _write(trial: Trial, score: Score) -> None:
    about = {"class_set": score.class_set.name, "classes": json.dumps(score.class_set.classes)}
    about |= {"domain": score.domain, "precision": score.precision}
    tally = torch.from_numpy(np.stack([picture.tally for picture in score.pictures]))
    write_atomic(_path(trial, score.domain), save({"tally": tally}, metadata=about))


def _read(trial: Trial, domain: str) -> Found:
    with safe_open(_path(trial, domain), "np") as saved:
        about, tally = saved.metadata(), saved.get_tensor("tally")
    if about["domain"] != domain:
        raise ValueError(f"{_path(trial, domain)} holds {about['domain']}, not {domain}: use one name for one folder.")
    own = trial.variant, trial.run.experiment, domain
    return Found(*own, about["class_set"], json.loads(about["classes"]), about["precision"], tally)


# What was found


def table(found: Sequence[Found]) -> pandas.DataFrame:
    """A row per variant, seed, source, domain and class: IoU (percent, NaN without a pixel), and its pixels."""
    rows = []
    for one in found:
        tally, made = one.tally.sum(0), one.experiment
        own = {"variant": one.variant, "seed": made.seed, "source": made.data.source, "domain": one.domain}
        own |= {"class_set": one.class_set, "pictures": len(one.tally), "steps": made.train.steps}
        for name, iou, counts in zip(one.classes, iou_of_tally(tally), tally.T, strict=True):
            pixels = dict(zip(("hit", "labelled", "predicted"), counts.tolist(), strict=True))
            rows.append(own | {"precision": one.precision, "class": name, "iou": iou} | pixels)
    return pandas.DataFrame(rows)


def cells(found: Sequence[Found]) -> dict[str, dict[tuple[str, int], list[Found]]]:
    """What is compared, by its title: each domain, then the targets of each class set together (MEAN).

    In each, by variant and seed, what is averaged. mIoU of different class sets is never averaged; a domain without a
    labelled pixel is left out.
    """
    targets: dict[str, set[str]] = {one.experiment.data.source: set() for one in found}
    for one in found:
        if one.domain != one.experiment.data.source:
            targets[one.experiment.data.source].add(one.class_set)
    alone, means = dict[str, dict](), dict[str, dict]()
    for one in (one for one in found if one.tally[:, 1].any()):
        source, who = one.experiment.data.source, (one.variant, one.experiment.seed)
        start = f"{source} -> " * (len(targets) > 1)
        alone.setdefault(start + one.domain, {}).setdefault(who, []).append(one)
        if one.domain != source:
            title = start + MEAN + f", {one.class_set}" * (len(targets[source]) > 1)
            means.setdefault(title, {}).setdefault(who, []).append(one)
    return alone | means


def spread(found: Sequence[Found]) -> list[dict]:
    """Per domain (a title of `cells`) and variant its mIoU, percent: values (one a seed), mean, low and high, seeds."""
    rows = []
    for title, models in cells(found).items():
        for variant in dict.fromkeys(variant for variant, _ in models):
            seeds = [seed for name, seed in models if name == variant]
            values = [float(np.mean([part.miou for part in models[variant, seed]])) for seed in seeds]
            row = {"variant": variant, "domain": title, "mean": float(np.mean(values))}
            rows.append(row | {"low": min(values), "high": max(values), "seeds": seeds, "values": values})
    return rows


def differences(found: Sequence[Found], baseline: str = "", random_seed: int = 0) -> list[dict]:
    """How far each variant is above the baseline (default: the first), in pairs of equal seed and picture, in points.

    Rows variant, baseline, domain (a title of `cells`), mean, low, high, values (one a seed), seeds. low and high: a
    95 % interval, corrected for the number of variants (Bonferroni); None with fewer than three seeds. Its standard
    error is that of a hierarchical bootstrap, which draws seeds and pictures anew (`Draws`). Of n units a bootstrap
    finds only (n - 1) / n of the variance: the rest is added, for seeds and for pictures, and a t distribution stands
    in for the normal one (with Satterthwaite's degrees of freedom).
    Raises ValueError if the baseline is not among the variants.
    """
    variants = list(dict.fromkeys(one.variant for one in found))
    baseline = baseline or variants[0]
    if baseline not in variants:
        raise ValueError(f"The baseline '{baseline}' is none of the variants {', '.join(variants)}.")
    others, rows = [variant for variant in variants if variant != baseline], []
    for title, models in cells(found).items():
        seeds = [seed for variant, seed in models if variant == baseline]
        draws = Draws(random_seed, len(seeds))
        points, resampled = ({variant: 0.0 for variant in variants} for _ in range(2))
        for place, part in enumerate(models[baseline, seeds[0]]):
            often = draws.pictures(part.domain, len(part.tally)).astype(float)
            for variant in variants:
                tally = np.stack([models[variant, seed][place].tally for seed in seeds]).astype(float)  # (S, P, 3, K)
                points[variant] += _miou(tally.sum(1))
                resampled[variant] += _miou(np.tensordot(often, tally, (1, 1)))  # (R, S)
        parts = len(models[baseline, seeds[0]])
        for variant in others:
            values = (points[variant] - points[baseline]) / parts
            means = ((resampled[variant] - resampled[baseline]) / parts * draws.seeds).sum(1)
            low, high = _interval(values, means, draws, len(others))
            row = {"variant": variant, "baseline": baseline, "domain": title, "mean": float(values.mean())}
            rows.append(row | {"low": low, "high": high, "values": values.tolist(), "seeds": seeds})
    return rows


class Draws:
    """What a hierarchical bootstrap draws, the same for all variants: seeds, and the pictures of each domain.

    seeds: (R, S) shares. stretches, sets: of all pictures, how many that are drawn on their own, and in how many sets.
    """

    def __init__(self, random_seed: int, seeds: int) -> None:
        self.random = np.random.default_rng(random_seed)
        self.seeds = self.random.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
        self.stretches, self._sets = 0, dict[str, np.ndarray]()

    @property
    def sets(self) -> int:
        """Of pictures that are not the same ones."""
        return len(self._sets)

    def pictures(self, domain: str, count: int) -> np.ndarray:
        """How often each picture is drawn, (R, count).

        Picture i of every rendered style is one street, and a corrupted domain has the pictures of its own: these are
        drawn together. Others are drawn in stretches of at most STRETCH neighbours, which in a video look alike.
        """
        is_rendered, plain = domain.partition(":")[0] == "scenes", take_apart(domain)[0]
        name = "scenes" if is_rendered else plain
        if name not in self._sets:
            length = 1 if is_rendered else max(1, min(STRETCH, count // 6))
            blocks = math.ceil(count / length)
            self.stretches += blocks
            often = self.random.multinomial(blocks, np.full(blocks, 1 / blocks), RESAMPLES)
            self._sets[name] = often.repeat(length, axis=1)[:, :count]
        return self._sets[name]


def cross(rows: Sequence[dict], means: Sequence[dict]) -> list[dict]:
    """A row per domain: the mIoU of each variant and the interval of its difference; of `differences` and `spread`."""
    ends = {(row["variant"], row["domain"]): _say_ends(row) for row in rows}
    wide: dict[str, dict] = {}
    for cell in means:
        row = wide.setdefault(cell["domain"], {"domain": domains.short_name(cell["domain"])})
        row[cell["variant"]] = f"{cell['mean']:.1f}" + ends.get((cell["variant"], cell["domain"]), "")
    return list(wide.values())


def _miou(tallies: np.ndarray) -> np.ndarray:
    """Mean IoU, percent, of tallies (..., 3, K)."""
    with warnings.catch_warnings():  # of a resample without a labelled pixel there is none
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(iou_of_tally(tallies), axis=-1)


def _interval(values: np.ndarray, means: np.ndarray, draws: Draws, compared: int) -> tuple[float | None, float | None]:
    """The ends of the interval of `differences`. values: (S,) of the seeds; means: (R,) of the bootstrap."""
    free = draws.stretches - draws.sets
    if len(values) < 3 or not free:
        return None, None
    by_seed = values.var(ddof=1) / len(values)
    by_picture = max(np.nanvar(means) - by_seed * (1 - 1 / len(values)), 0.0) * draws.stretches / free
    whole = by_seed + by_picture
    freedom = whole**2 / (by_seed**2 / (len(values) - 1) + by_picture**2 / free) if whole else math.inf
    reach = stats.t.isf((1 - LEVEL) / 2 / compared, freedom) * math.sqrt(whole)
    return float(values.mean() - reach), float(values.mean() + reach)


def verdict(rows: Sequence[dict]) -> str:
    """What the differences over the means of the targets show, in words made from the numbers."""
    text = ""
    for title in dict.fromkeys(row["domain"] for row in rows if MEAN in row["domain"]):
        own = sorted((row for row in rows if row["domain"] == title), key=lambda row: -row["mean"])
        known = [row for row in own if row["low"] is not None]
        above, below = ([row for row in known if row["low"] > 0], [row for row in known if row["high"] < 0])
        open_ones = [row for row in own if row not in above and row not in below]
        rest = "not told apart" if known else "too few seeds to tell apart"
        name = domains.short_name(title)
        text += f"{name[0].upper()}{name[1:]}, beside {own[0]['baseline']}: "
        parts = [
            f"{words} {', '.join(map(_say_row, group))}"
            for words, group in (("above it", above), ("below it", below), (rest, open_ones))
            if group
        ]
        text += "; ".join(parts) + ". "
    return text.strip()


def _say_row(row: dict) -> str:
    return f"**{row['variant']}** {row['mean']:+.1f}{_say_ends(row)}"


def _say_ends(row: dict) -> str:
    return "" if row["low"] is None else f" [{row['low']:+.1f}, {row['high']:+.1f}]"


# The learning curve, and why


def lengthened(run: Run) -> Run:
    """An ablation in RUN/curve: the first variant and the run's own refiner, trained to each of `ablation.lengths`."""
    settings = run.experiment.ablation
    compared = dict.fromkeys([settings.variants[0], run.experiment.model.refiner])
    variants = [f"{name} train.steps={steps}" for name in compared for steps in settings.lengths]
    options = f"ablation.variants={','.join(variants)}", f"ablation.seeds={settings.seeds[0]}", "ablation.baseline="
    return run.nested("curve", *options, "ablation.transfers=")


def curves(found: Sequence[Found]) -> dict[str, tuple[list[int], list[float]]]:
    """mIoU by steps, of the source and of the mean of the targets: {name: (steps, percent)}, seeds averaged."""
    steps = {one.variant: one.experiment.train.steps for one in found}
    source, lines = found[0].experiment.data.source, dict[str, dict[int, float]]()
    for cell in spread(found):
        if cell["domain"] == source or MEAN in cell["domain"]:
            name = re.sub(r"\s*train\.steps=\d+", "", cell["variant"])
            lines.setdefault(f"{name}, {cell['domain']}", {})[steps[cell["variant"]]] = cell["mean"]
    return {name: (sorted(own), [own[count] for count in sorted(own)]) for name, own in lines.items()}


@torch.no_grad()
def style_distances(run: Run, layouts: int = 2) -> dict[str, tuple[list[int], list[float]]]:
    """Behind each layer: how far one rendered street in two styles is apart, in units of two streets in one style.

    {variant: (layers, ratio)}, of each variant's first model.
    """
    data, lines = run.experiment.data, {}
    pictures = torch.stack(list(styled_scenes(data, layouts).values()), 1)  # (n, S, 3, h, w)
    for trial in plan(run)[: len(run.experiment.ablation.variants)]:
        model = load_segmenter(trial.run.path)
        layers = list(range(1, model.backbone.num_layers + 1))
        with model.autocast():
            parts = [model.backbone(part.to(model.device), model.refiner, layers) for part in pictures]
        ratios = []
        for layer in layers:
            x = torch.stack([part[layer].flatten(1).float() for part in parts])  # (n, S, H W C)
            styles, streets = torch.cdist(x, x), torch.cdist(x.transpose(0, 1), x.transpose(0, 1))
            ratios.append(float(_off_diagonal(styles) / _off_diagonal(streets)))
        lines[trial.variant] = (layers, ratios)
    return lines


def _off_diagonal(distances: Tensor) -> Tensor:
    """The mean over pairs of two; distances: (..., n, n)."""
    count = distances.shape[-1]
    return distances.sum((-1, -2)).mean() / (count * (count - 1))
