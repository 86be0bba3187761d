"""Ablation: one row per variant, seed and domain; words that the numbers carry."""

from setlib.analysis import ablation
from setlib.experiment import Experiment
from setlib.run import Run


def rows(values):
    return [
        {"variant": variant, "seed": seed, "domain": ablation.MEAN, "miou": miou}
        for variant, seeds in values.items()
        for seed, miou in enumerate(seeds)
    ]


def test_spread_is_the_range_over_seeds():
    (cell,) = ablation.spread(rows({"set": [10.0, 14.0]}))
    assert (cell["mean"], cell["low"], cell["high"], cell["seeds"]) == (12, 10, 14, [0, 1])


def test_words_follow_the_numbers():
    text = ablation.verdict(rows({"none": [5.0, 6.0], "rein": [10.0, 14.0], "set": [12.0, 13.0]}))
    assert "**set** has the highest mean" in text
    assert "above every seed of none" in text
    assert "overlap with those of rein" in text


def test_a_domain_without_a_labelled_pixel_is_out_of_the_table_and_said_once():
    empty = [{"variant": "set", "seed": seed, "domain": "folder@x", "miou": float("nan")} for seed in (0, 1)]
    found = [*empty, *rows({"none": [5.0, 6.0], "set": [12.0, 13.0]})]
    assert {cell["domain"] for cell in ablation.spread(found)} == {ablation.MEAN}
    text = ablation.verdict(found)
    assert "**set** has the highest mean" in text and "nan" not in text and text.count("folder@x") == 1
    assert "highest" not in ablation.verdict(empty)


def test_variants_and_seeds_are_trained_and_scored(tmp_path):
    options = ["ablation.variants=none,set", "ablation.overrides=train.steps=2,data.eval_images=2"]
    run = Run.open(tmp_path, Experiment.build("smoke", targets=["scenes:night"], overrides=options))
    found = ablation.run_ablation(run)
    assert {(row["variant"], row["seed"]) for row in found} == {("none", 0), ("none", 1), ("set", 0), ("set", 1)}
    assert [row["domain"] for row in found[:3]] == ["scenes:game", "scenes:night", ablation.MEAN]
    assert found[1]["miou"] == found[2]["miou"]
    assert ablation.run_ablation(run) == found  # loaded, not trained again
