"""The study: kept and gone on with, its beliefs right at the ends of the way, its words those of its numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from setlib.analysis import factorial, premise, transplant, verdict
from setlib.experiment import Experiment
from setlib.run import Run

STYLES = ("game", "clear", "night", "fog")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run.open(tmp_path_factory.mktemp("premise") / "run", Experiment.build("smoke"))


@pytest.fixture(scope="module")
def found(run: Run) -> premise.Findings:
    return premise.measure(run, layouts=4, places=2, styles=STYLES)


def test_every_place_has_its_rows(found: premise.Findings):
    assert list(dict.fromkeys(row["layer"] for row in found.shares)) == [0, 1, 2, 3, 4]
    assert {row["layer"] for row in found.yardstick} == {row["layer"] for row in found.atlas} == {0, 3}
    assert len(found.yardstick) == 2 * 2 * len(transplant.PARTS)
    assert len(found.atlas) == 2 * 2 * len(transplant.SPANS)
    for row in found.yardstick:
        assert row["closed low"] <= row["closed"] <= row["closed high"] <= 1
        others = [row[name] for name in transplant.PLACEBOS if name in row]
        assert row["closed"] - row["gain"] == pytest.approx(max(others))


def test_a_second_start_measures_nothing_and_a_killed_one_goes_on(run: Run, found: premise.Findings, tmp_path):
    """Killed before about.json names the third place: rows of it that are there already are measured again."""
    kept = {path.name: path.stat().st_mtime_ns for path in run.path.glob("premise/*.json")}
    assert premise.measure(run, layouts=4, places=2, styles=STYLES) == found
    assert {path.name: path.stat().st_mtime_ns for path in run.path.glob("premise/*.json")} == kept
    other = Run.open(tmp_path / "run", run.experiment)
    shutil.copytree(run.path / "premise", other.path / "premise")
    other.write_json("premise/about.json", found.about | {"done": [0, 1]})
    again = premise.measure(other, layouts=4, places=2, styles=STYLES)
    for one, two in zip(again[:3], found[:3], strict=True):
        numbers = [[v for v in row.values() if isinstance(v, float)] for row in one]
        assert numbers == [pytest.approx([v for v in row.values() if isinstance(v, float)], abs=1e-4) for row in two]


def test_a_larger_study_answers_a_smaller_question(run: Run, found: premise.Findings):
    assert premise.measure(run, layouts=3, places=1, styles=STYLES) == found


def test_another_question_is_asked_anew(run: Run, found: premise.Findings, tmp_path):
    other = Run.open(tmp_path / "run", run.experiment)
    first = premise.measure(other, layouts=3, places=1, styles=STYLES[:3])
    second = premise.measure(other, layouts=3, places=1, styles=STYLES)
    assert first.about["asked"] != second.about["asked"] and second.about["done"] == [0, 1, 2, 3, 4]
    assert {row["layer"] for row in second.atlas} == {0}
    control = premise.measure(other, layouts=3, places=1, styles=STYLES, is_control=True)
    assert control.about["asked"]["backbone"] != second.about["asked"]["backbone"]
    assert premise.read(other, "premise-control") == control


def test_beliefs_at_the_ends_of_the_way(run: Run):
    """A is A, A* has gone all the way, B's style is found in B and its content is not A's."""
    from setlib.analysis.survey import styled_scenes
    from setlib.weights.load import load_backbone

    pictures = styled_scenes(run.experiment.data, 4, STYLES)
    with torch.no_grad():
        streets = premise.Streets(load_backbone("tiny-random"), pictures)
        beliefs = premise._beliefs(run, streets, 3)
        start, goal, donor = (beliefs(beliefs.features[index]) for index in (streets.a, streets.goal, streets.b))
        np.testing.assert_allclose(start["closed"], 0, atol=1e-6)
        np.testing.assert_allclose(goal["closed"], 1, atol=1e-6)
        np.testing.assert_allclose(start["to A"], 0, atol=1e-6)
        np.testing.assert_allclose(donor["to B"], 0, atol=1e-6)
        assert not donor["content kept"].any() and goal["content kept"].mean() > 0.5
        assert not start["style of B"].any()
        for layer in (0, 2):  # what is not changed goes on as it did, whichever layer it is taken up after
            there = streets.after(layer)
            torch.testing.assert_close(streets.go_on(there[streets.a], layer, 3), beliefs.start, atol=1e-4, rtol=1e-4)


def test_streets_pair_each_layout_with_another_in_its_own_style():
    pictures = {style: torch.full((5, 3, 8, 8), float(i)) for i, style in enumerate(STYLES)}
    for i in range(5):
        for one in pictures.values():
            one[i, 0] = i / 10
    streets = premise.Streets(None, pictures)
    cells = streets.images[:, :2, 0, 0]
    assert (cells[streets.a, 1] == 0).all()
    assert (cells[streets.goal, 1] > 0).all() and (cells[streets.goal, 0] == cells[streets.a, 0]).all()
    assert (cells[streets.b, 1] == cells[streets.goal, 1]).all() and (cells[streets.b, 0] != cells[streets.a, 0]).all()


def test_words_are_made_from_the_numbers(found: premise.Findings):
    """Every number in the sentences changes with the rows, and nothing is said of what is not there."""
    said = verdict.say_shares(found.shares)
    rows = json.loads(json.dumps(found.shares))
    for row in rows:
        if (row["layer"], row["part"], row["band"], row["factor"]) == (0, "amplitude", "all", "style"):
            row |= {"share": 0.777, "low": 0.7, "high": 0.8}
    assert "78 % [70, 80]" in verdict.say_shares(rows) and "78 % [70, 80]" not in said
    counts = verdict.tally(found.shares)
    bands = {row["band"] for row in found.shares} - {"mean", factorial.ALL}
    cells = {(row["layer"], row["band"]) for row in found.shares if row["band"] in bands}
    assert all(sum(own.values()) == len(cells) for own in counts.values())
    assert len(verdict.say_yardstick(found.yardstick).splitlines()) == 2
    assert "layer 3" in verdict.say_atlas(found)
    assert premise.read(Run(Path("no-such-run"), None)) is None
