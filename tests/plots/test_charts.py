"""Charts draw what they are given, and come back as Axes or as a Figure that shows itself; tables say every cell."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes

from setlib import plots
from setlib.data.labels import CAMVID, CITYSCAPES

RANDOM = np.random.default_rng(0)
SHARES = RANDOM.dirichlet(np.ones(19))
HISTORY = [{"step": step, "loss": 3.0 / step} for step in range(1, 21)]
CELL = {"variant": "set", "domain": "scenes:fog", "mean": 31.0, "low": 29.0, "high": 33.0, "values": [30.0, 32.0]}
SHARED = [
    {"layer": layer, "part": part, "factor": factor, "share": share}
    for layer in ("pixels", 3)
    for part in ("amplitude", "phase")
    for factor, share in (("style", 0.1), ("content", 0.5), ("interaction", 0.4))
]
DISTANCES = [{"layer": "pixels", "amplitude": 0.1, "phase": 0.2}, {"layer": 4, "amplitude": 0.3, "phase": 0}]
ALL = {
    "class_shares": ({"scenes:game": SHARES}, CITYSCAPES),
    "loss_curves": ({"set": HISTORY},),
    "distances": (DISTANCES,),
    "influences": ([(7, 0.5), (3, 0.4)], 3),
    "domain_bars": ({"set": {"scenes:fog": 30.0}},),
    "class_bars": ({"set": 100 * SHARES}, CITYSCAPES),
    "class_heatmap": ({"scenes:fog": 100 * SHARES}, CITYSCAPES),
    "confusion": (np.eye(19, dtype=np.int64), CITYSCAPES),
    "share_lines": (SHARED,),
    "lines": ({"a": ([0, 1], [2, 3])}, "time (s)", "way (m)"),
}


@pytest.mark.parametrize("name", ALL)
def test_takes_and_returns_axes_and_keeps_the_global_look(name: str):
    function, before = getattr(plots, name), dict(matplotlib.rcParams)
    ax = function(*ALL[name])
    assert isinstance(ax, Axes) and isinstance(ax.figure, plots.Figure)
    assert ax.figure._repr_png_().startswith(b"\x89PNG")
    mine = plots.Figure().add_subplot()
    assert function(*ALL[name], ax=mine) is mine and mine.has_data()
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_involved():
    code = "import sys, setlib.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_lines_are_curves_with_markers_where_places_have_names_or_points_alone():
    series = {"a": (["pixels", "layer 1"], [0.1, 0.2]), "b": (["pixels", "layer 1"], [0.3, 0.4])}
    ax = plots.lines(series, "", "share")
    assert [text.get_text() for text in ax.get_xticklabels()] == ["pixels", "layer 1"]
    assert [(line.get_marker(), line.get_linestyle()) for line in ax.lines] == [("o", "-"), ("s", "-")]
    assert ax.lines[0].get_linewidth() > ax.lines[1].get_linewidth()
    assert ax.lines[1].get_ydata() == pytest.approx([0.3, 0.4]) and ax.get_ylabel() == "share"
    (curve,), (points,) = (plots.lines({"a": ([0, 1], [2, 3])}, "x", "y", dots=dots).lines for dots in (False, True))
    assert (curve.get_marker(), points.get_marker(), points.get_linestyle()) == ("", "o", "None")


def test_equal_class_shares_are_one_series_in_percent():
    shares = {"scenes:fog": SHARES, "scenes:night": SHARES, "camvid:dusk@/far/away": np.r_[1.0, np.zeros(18)]}
    ax = plots.class_shares(shares, CITYSCAPES)
    assert [line.get_label() for line in ax.lines] == ["scenes:fog, scenes:night", "camvid:dusk"]
    assert ax.lines[0].get_xdata() == pytest.approx(100 * SHARES)
    assert np.isnan(ax.lines[1].get_xdata()).sum() == 18


def test_loss_is_smoothed_over_a_tenth_of_the_steps():
    raw, smooth = plots.loss_curves({"none": [], "set": HISTORY}).lines
    assert raw.get_ydata()[-1] == pytest.approx(3 / 20)
    assert smooth.get_ydata()[-1] == pytest.approx((3 / 20 + 3 / 19) / 2)
    assert smooth.get_label() == "set: 0.15 at the end"


def test_what_is_not_there_is_said():
    missing = plots.loss_curves({"set": []})
    assert not missing.lines and "is not there" in missing.get_legend().get_title().get_text()
    assert "Nothing stands behind a layer" in plots.distances([]).texts[0].get_text()
    assert plots.stacked(plots.class_bars, []) is None


def test_every_class_set_has_a_panel_of_its_own():
    groups = [(CITYSCAPES, {"scenes:fog": 100 * SHARES}), (CAMVID, {"camvid:dusk@x": np.arange(11.0)})]
    made = plots.stacked(plots.class_heatmap, groups)
    assert [ax.images[0].get_array().shape for ax in made.axes[:2]] == [(1, 19), (1, 11)]
    assert [ax.get_title(loc="right") for ax in made.axes[:2]] == ["cityscapes-19", "camvid-11"]
    alone = plots.stacked(plots.class_bars, [(CAMVID, {"set": np.arange(11.0), "none": np.arange(11.0)})])
    assert len(alone.axes) == 1 and alone.axes[0].get_title(loc="right") == ""


def test_bars_are_as_high_as_their_values():
    scores = {"none": {"scenes:game": 40.0}, "set": {"scenes:game": 50.0, "camvid:dusk@/x": 30.0}}
    ax = plots.domain_bars(scores, source="scenes:game")
    heights = [bar.get_height() for container in ax.containers for bar in container]
    assert np.isnan(heights[1]) and [heights[i] for i in (0, 2, 3)] == [40, 50, 30]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["scenes:game\n(source)", "camvid:dusk"]
    wide = plots.class_bars({"set": np.r_[[np.nan], np.arange(18.0)]}, CITYSCAPES).containers[0]
    assert np.isnan(wide[0].get_width()) and wide[18].get_width() == 17
    ax = plots.distances(DISTANCES)
    assert [bar.get_height() for bar in ax.patches] == [0.1, 0.3, 0.2, 0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["pixels", "layer 4"]


def test_what_is_chosen_is_pointed_out():
    plain, chosen = (plots.distances(DISTANCES, chosen=name).figure.pixels() for name in (None, 4))
    assert plain.shape == chosen.shape and plain.dtype == np.uint8 and not np.array_equal(plain, chosen)
    ax = plots.influences([(7, 0.5), (3, 0.4), (1, 0.1)], 3)
    colours = [bar.get_facecolor() for bar in ax.patches]
    assert [bar.get_height() for bar in ax.patches] == [0.5, 0.4, 0.1] and colours[0] == colours[2] != colours[1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["7", "3", "1"]


def test_confusion_is_percent_of_the_label():
    counts = np.zeros((11, 11), np.int64)
    counts[0, :2] = 30, 10
    shown = plots.confusion(counts, CAMVID).images[0].get_array()
    assert shown[0, :2].tolist() == [75, 25]
    assert np.isnan(shown[1].astype(float).filled(np.nan)).all()


def test_a_forest_shows_every_seed_and_colours_what_is_beyond_zero():
    row = {"baseline": "none", "mean": 2, "low": 1, "high": 3, "values": [1.5, 2.5]}
    rows = [row | {"variant": "set", "domain": f"scenes:{i}"} for i in range(5)]
    rows += [row | {"variant": "rein", "domain": "scenes:0", "low": None, "high": None}]
    made = plots.forest(rows)
    assert [ax.get_title("left") for ax in made.axes] == [f"scenes:{i}" for i in range(5)]
    zero, seeds, interval, mean, *unknown = made.axes[0].lines
    assert zero.get_xdata() == [0, 0] and list(seeds.get_xdata()) == [1.5, 2.5] and list(interval.get_xdata()) == [1, 3]
    assert mean.get_color() == interval.get_color() == plots.COLOURS[0] and len(unknown) == 2  # no interval
    assert [label.get_text() for label in made.axes[0].get_yticklabels()] == ["set", "rein"]
    assert "above none" in made.get_supxlabel()


def test_shares_have_a_line_for_each_part_and_factor_and_bands_where_ends_are_known():
    ax = plots.share_lines(SHARED)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.1, 0.1], [0.5, 0.5]] * 2
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"] * 2 and ax.get_ylim() == (0, 1)
    assert ax.lines[0].get_color() == ax.lines[1].get_color() != ax.lines[2].get_color()
    labels = ["amplitude, style", "amplitude, content", "phase, style", "phase, content"]
    assert [text.get_text() for text in ax.get_legend().texts] == labels and not ax.collections
    assert [label.get_text() for label in ax.get_xticklabels()] == ["pixels", "layer 3"]
    known = plots.share_lines([row | {"layer": 0, "share": -0.2, "low": -0.3, "high": 0.1} for row in SHARED])
    assert len(known.collections) == 4 and known.lines[0].get_ydata().tolist() == [0] * 2
    assert [label.get_text() for label in known.get_xticklabels()] == ["pixels"]
    chosen = plots.share_lines(SHARED, chosen=3)
    assert len(chosen.patches) == len(ax.patches) + 1


def test_table_shows_numbers_dashes_and_escapes():
    rows = [{"a": 1, "b": 2.345, "c": "<x>"}, {"a": 20, "b": None, "c": [1.0, 2.0]}, {"b": float("nan"), "c": 1e-7}]
    made = plots.table(rows, "a < b")
    assert repr(made).splitlines() == [
        "a < b",
        " a   b        c",
        " 1 2.3      <x>",
        "20   – 1.0, 2.0",
        " –   –  1.0e-07",
    ]
    page = made._repr_html_()
    assert "<caption>a &lt; b</caption>" in page and "&lt;x&gt;" in page and "<x>" not in page
    assert "nothing to show" in repr(plots.table([]))
    assert "2.35" in repr(plots.table(rows, decimals=2))
