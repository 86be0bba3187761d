"""Ablation: variants trained and scored, a row a class; paired differences with intervals; words from numbers."""

import numpy as np
import pytest

from setlib.analysis import ablation
from setlib.experiment import Experiment
from setlib.run import Run

CLASSES = 4
OPTIONS = [
    "ablation.variants=none,set,set model.rank=2 model.refined_layers=2,3",
    "ablation.overrides=train.steps=2,data.eval_images=2",
]


def made(values, pictures=40, noise=0.0, random_seed=0, domain="scenes:night", shared=0.0):
    """Trials whose IoU is about `values` {variant: one a seed}, percent; noise: of each picture, shared: of both."""
    random, found = np.random.default_rng(random_seed), []
    common = random.normal(0, 1, (pictures, CLASSES)) * shared
    for variant, seeds in values.items():
        for seed, value in enumerate(seeds):
            share = (value + common + random.normal(0, 1, (pictures, CLASSES)) * noise).clip(0, 100) / 100
            hit = (1000 * share).round().astype(np.int64)
            tally = np.stack([hit, np.full_like(hit, 1000), hit], 1)  # (P, 3, K): union 1000
            experiment = Experiment.build("smoke", seed=seed)
            names = [str(k) for k in range(CLASSES)]
            found.append(ablation.Found(variant, experiment, domain, "four", names, "float32", tally))
    return found


def test_spread_is_the_range_over_seeds():
    cell = ablation.spread(made({"set": [10.0, 14.0]}))[-1]
    found = (cell["domain"], cell["mean"], cell["low"], cell["high"], cell["seeds"])
    assert found == (ablation.MEAN, pytest.approx(12), pytest.approx(10), pytest.approx(14), [0, 1])


def test_differences_are_those_of_equal_seeds():
    found = ablation.differences(made({"none": [10.0, 20.0, 30.0], "set": [12.0, 21.0, 33.0]}), "none")
    (row,) = [row for row in found if row["domain"] == ablation.MEAN]
    assert row["values"] == pytest.approx([2, 1, 3]) and row["mean"] == pytest.approx(2)
    assert row["low"] == pytest.approx(2 - 4.303 / 3**0.5, abs=0.3)  # t of two degrees of freedom
    with pytest.raises(ValueError, match="baseline 'rein' is none of the variants none, set"):
        ablation.differences(made({"none": [10.0], "set": [12.0]}), "rein")


def test_fewer_than_three_seeds_have_no_interval():
    rows = ablation.differences(made({"none": [10.0, 11.0], "set": [12.0, 13.0]}), "none")
    assert {row["low"] for row in rows} == {None} and "too few seeds to tell apart **set** +2.0." in ablation.verdict(
        rows
    )


def test_intervals_widen_with_the_number_of_variants():
    values = {"none": [10.0, 11.0, 12.0], "set": [12.0, 13.5, 14.0]}
    narrow = ablation.differences(made(values), "none")[-1]
    wide = ablation.differences(made(values | {str(i): [11.0, 10.0, 12.0] for i in range(9)}), "none")
    wide = next(row for row in wide if (row["variant"], row["domain"]) == ("set", ablation.MEAN))
    assert wide["mean"] == pytest.approx(narrow["mean"]) and wide["low"] < narrow["low"]


@pytest.mark.parametrize(("by_seed", "by_picture"), [(2.0, 0.0), (0.0, 20.0), (1.5, 12.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(by_seed, by_picture):
    hits, tries = 0, 60
    for number in range(tries):
        random = np.random.default_rng([7, number])
        values = {name: 50 + random.normal(0, by_seed, 5) for name in ("none", "set")}
        found = made(values, 60, by_picture, 1000 + number, shared=10.0)
        row = ablation.differences(found, "none", number)[-1]
        hits += row["low"] <= 0 <= row["high"]
    assert hits >= 0.85 * tries  # 95 % nominal; below 85 % by chance once in a thousand


def test_rendered_styles_are_the_same_streets_and_few_pictures_are_units_too():
    values = {"none": [10.0, 11.0, 12.0], "set": [12.0, 13.1, 13.9]}
    one = made(values, 30, 5.0, domain="scenes:night", shared=8.0)
    twin = [found._replace(domain="scenes:fog") for found in one]
    alone, both = (ablation.differences(found, "none")[-1] for found in (one, [*one, *twin]))
    assert both["high"] - both["low"] == pytest.approx(alone["high"] - alone["low"])  # no street counts twice
    draws = ablation.Draws(0, 3)
    assert (draws.pictures("scenes:fog", 8) == draws.pictures("scenes:night", 8)).all()
    assert draws.pictures("camvid:dusk@x", 60).shape == (ablation.RESAMPLES, 60)
    assert draws.pictures("camvid:dusk@x~fog3", 60) is draws.pictures("camvid:dusk@x", 60)
    assert (draws.stretches, draws.sets) == (8 + 6, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ablation.variants=none,none"], "twice"),
        (["ablation.seeds=0,0"], "has '0' twice"),
        (["ablation.variants=none,set data.eval_images=1"], "sets data.eval_images, which all variants must share"),
        (["ablation.variants=none,set-released"], "needs model.any_batch=true"),
        (["ablation.transfers=scenes:game -> scenes:fog,scenes:game -> scenes:night"], "has 'scenes:game' twice"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_trained(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ablation.plan(Run.open(tmp_path, Experiment.build("smoke", overrides=options)))


def test_targets_may_be_added_later_without_a_training(tmp_path):
    options = [OPTIONS[1], "ablation.variants=none,set", "ablation.seeds=0"]
    for targets in ("scenes:night", "scenes:fog scenes:night"):
        transfers = f"ablation.transfers=scenes:game -> {targets}"
        found = ablation.run_ablation(Run.open(tmp_path, Experiment.build("smoke", overrides=[*options, transfers])))
        made_at = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
        assert len(found) == 2 * (1 + len(targets.split())) and len(made_at) == 2
    assert made_at == {path: path.stat().st_mtime_ns for path in made_at}


def test_the_curve_is_of_the_first_variant_and_the_runs_own(tmp_path):
    options = [OPTIONS[1], "ablation.variants=none,rein", "ablation.baseline=rein", "ablation.lengths=1,3"]
    run = Run.open(tmp_path, Experiment.build("smoke", targets=["scenes:night"], overrides=options))
    curves = ablation.curves(ablation.run_ablation(ablation.lengthened(run)))
    names = [f"{name}, {domain}" for name in ("none", "set") for domain in ("scenes:game", ablation.MEAN)]
    assert sorted(curves) == sorted(names) and all(steps == [1, 3] for steps, _ in curves.values())


def test_words_follow_the_numbers():
    values = {"none": [5.0, 6.0, 5.5], "rein": [15.0, 16.1, 15.5], "set": [5.1, 5.9, 5.6], "fada": [1.0, 2.0, 1.6]}
    text = ablation.verdict(ablation.differences(made(values)))
    above, below, rest = text.split(";")
    assert "beside none: above it **rein** +10.0 [" in above and "below it **fada** -4.0 [" in below
    assert "not told apart **set** +0.0 [" in rest


def test_a_domain_without_a_labelled_pixel_is_in_no_mean():
    empty = [one._replace(tally=one.tally * 0) for one in made({"none": [5.0], "set": [6.0]}, domain="folder@x")]
    found = [*empty, *made({"none": [5.0], "set": [12.0]})]
    cells = ablation.spread(found)
    assert {cell["domain"] for cell in cells} == {"scenes:night", ablation.MEAN}
    assert cells[-1]["mean"] == pytest.approx(12)


def test_variants_are_refiners_with_options_trained_and_scored(tmp_path):
    run = Run.open(tmp_path, Experiment.build("smoke", targets=["scenes:night"], overrides=OPTIONS))
    found = ablation.run_ablation(run)
    assert {(one.variant, one.experiment.seed) for one in found} == {
        (variant, seed) for variant in ("none", "set", "set model.rank=2 model.refined_layers=2,3") for seed in (0, 1)
    }
    last = found[-1]
    assert (last.experiment.model.rank, last.experiment.model.refined_layers) == (2, (2, 3))
    assert ablation.spread(found)[-1]["domain"] == ablation.MEAN
    table = ablation.table(found)
    assert len(table) == 6 * 2 * 19 and list(table.columns[:4]) == ["variant", "seed", "source", "domain"]
    assert (tmp_path / "ablation" / "table.csv").is_file()


def test_what_is_done_is_skipped_and_several_sources_are_one_table(tmp_path, monkeypatch):
    transfers = "ablation.transfers=scenes:game -> scenes:night,scenes:clear -> scenes:fog scenes:night"
    options = [OPTIONS[1], "ablation.variants=none,set", "ablation.seeds=0", transfers]
    run = Run.open(tmp_path, Experiment.build("smoke", overrides=options))
    first = ablation.run_ablation(run)
    titles = [row["domain"] for row in ablation.spread(first) if row["variant"] == "set"]
    assert titles[1] == "scenes:game -> scenes:night" and titles[-1] == f"scenes:clear -> {ablation.MEAN}"
    monkeypatch.setattr(ablation, "train_together", None)
    again = ablation.run_ablation(run)
    assert ablation.spread(again) == ablation.spread(first)
