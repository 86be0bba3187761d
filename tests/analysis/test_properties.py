"""Every refiner's properties: one image at a time, an exact inverse, a real signal; the released form has none."""

import math

import pytest

from setlib.analysis import properties
from setlib.refiners import REFINERS


@pytest.fixture(scope="module")
def rows():
    return {row["refiner"]: row for row in properties.table()}


def test_every_refiner_has_a_row_and_only_the_released_one_leaks(rows):
    assert list(rows) == list(REFINERS)
    for name, row in rows.items():
        assert [row[key] > 1e-6 for key in properties.COLUMNS[:3]] == [name == "set-released"] * 3
        assert (row["identity at the start"] > 0.01) == (name in ("vpt", "rein-eager") or "style" in name)
    assert rows["set-released"]["batch mates"] > 0.3


def test_what_is_transformed_comes_back_and_is_real(rows):
    transforms = {name for name in REFINERS if name.startswith(("set", "fada"))}
    for name, row in rows.items():
        assert math.isnan(row["inverse"]) == (name not in transforms)
        assert math.isnan(row["real signal"]) == (name not in transforms - {"fada", "set-dct"})
        assert name == "set-released" or not (row["inverse"] > 1e-6 or row["real signal"] > 1e-6)
    assert rows["set-released"]["inverse"] == pytest.approx(1 - 0.5**0.5) and rows["set-released"]["real signal"] > 0.3


def test_attention_by_branch_is_even_where_the_text_says_so(rows):
    said = properties.say(list(rows.values()))
    for name, row in rows.items():
        for branch, (entropy, deviation) in row["attention"].items():
            assert 0 < entropy <= 1 and deviation >= 0
            assert (f"{name}'s {branch}" in said.split("Before training")[1]) == (entropy > properties.EVEN)
    assert "real signal (set-released: " in said and "batch mates (set:" not in said
    assert rows["set-cosine"]["attention"]["phase"][0] < 0.98 < rows["set"]["attention"]["phase"][0]
    assert "every property but these: none" in properties.say([rows["set"]])
