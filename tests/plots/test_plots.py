"""Figures draw what they are given, and come back as Axes or as a Figure that shows itself."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes

from setlib.data.labels import CAMVID, CITYSCAPES
from setlib.plots import charts as plots

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (20, 40, 3), np.uint8)
LABEL = RANDOM.integers(0, 19, (20, 40)).astype(np.uint8)
SHARES = RANDOM.dirichlet(np.ones(19))
HISTORY = [{"step": step, "loss": 3.0 / step} for step in range(1, 21)]
CELL = {"variant": "set", "domain": "scenes:fog", "mean": 31.0, "low": 29.0, "high": 33.0, "seeds": [0, 1]}
CELL["values"] = [30.0, 32.0]
MOVED = [
    {"layer": layer, "part": part, "style": 0.1, "content": 0.5}
    for layer in ("pixels", 3)
    for part in ("amplitude", "phase")
]
ALL = {
    "picture": (plots.picture, IMAGE),
    "class_legend": (plots.class_legend, CAMVID),
    "depth": (plots.depth, np.where(LABEL == 10, np.inf, 5.0 + LABEL).astype(np.float32)),
    "class_shares": (plots.class_shares, {"scenes:game": SHARES}, CITYSCAPES),
    "loss_curves": (plots.loss_curves, {"set": HISTORY}),
    "attention_over_spectrum": (plots.attention_over_spectrum, RANDOM.random((8, 9))),
    "attention_over_picture": (plots.attention_over_picture, IMAGE, RANDOM.random((4, 8))),
    "radial_profiles": (plots.radial_profiles, np.arange(4), {"a": np.arange(4)}),
    "domain_bars": (plots.domain_bars, {"set": {"scenes:fog": 30.0}}),
    "class_bars": (plots.class_bars, {"set": 100 * SHARES}, CITYSCAPES),
    "class_heatmap": (plots.class_heatmap, {"scenes:fog": 100 * SHARES}, CITYSCAPES),
    "confusion": (plots.confusion, np.eye(19, dtype=np.int64), CITYSCAPES),
    "intervals": (plots.intervals, [CELL]),
    "movement": (plots.movement, MOVED),
}


@pytest.mark.parametrize("name", ALL)
def test_takes_and_returns_axes_and_keeps_the_global_look(name: str):
    function, *arguments = ALL[name]
    before = dict(matplotlib.rcParams)
    ax = function(*arguments)
    assert isinstance(ax, Axes) and isinstance(ax.figure, plots.Figure)
    assert ax.figure._repr_png_().startswith(b"\x89PNG")
    mine = plots.Figure().add_subplot()
    assert function(*arguments, ax=mine) is mine
    assert mine.has_data() or mine.get_legend() is not None
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_involved():
    code = "import sys, setlib.plots.charts; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_labels_are_mixed_in_and_ignored_pixels_stay():
    label = np.full((20, 40), 13, np.uint8)
    label[0, 0] = 255
    shown = plots.coloured(IMAGE, label, CITYSCAPES, alpha=1.0)
    assert (shown[1, 1] == CITYSCAPES.colours[13]).all()
    assert (shown[0, 0] == IMAGE[0, 0]).all()
    assert (plots.coloured(IMAGE, label, CITYSCAPES, alpha=0) == IMAGE).all()


def test_sheet_places_pictures_and_leaves_gaps():
    sheet = plots.sheet([[IMAGE, None], [IMAGE // 2, IMAGE]], ["first", "second"], ["a", "b"])
    assert [ax.get_visible() for ax in sheet.axes] == [True, False, True, True]
    assert (sheet.axes[2].images[0].get_array() == IMAGE // 2).all()
    assert (sheet.axes[0].get_title(), sheet.axes[2].get_ylabel()) == ("a", "second")
    assert plots.sheet([[IMAGE]], titles=[["alone"]]).axes[0].get_title() == "alone"


def test_predictions_are_merged_into_the_label_classes():
    truck = np.full((20, 40), CITYSCAPES.classes.index("truck"), np.uint8)
    made = plots.prediction_sheet([(IMAGE, None, {"set": truck}), (IMAGE, None, {"set": truck})], CAMVID, ["x", "y"])
    car = plots.coloured(IMAGE, np.full((20, 40), CAMVID.classes.index("Car"), np.uint8), CAMVID, 0.75)
    assert [ax.get_title() for ax in made.axes[:2]] == ["picture", "set"]
    assert (made.axes[1].images[0].get_array() == car).all()
    assert [text.get_text() for text in made.legends[0].get_texts()] == ["Car"]


def test_prediction_sheet_keeps_a_place_for_missing_labels():
    label = np.zeros((20, 40), np.uint8)
    made = plots.prediction_sheet([(IMAGE, label, {"set": label}), (IMAGE, None, {"set": label})], CITYSCAPES)
    assert [ax.get_visible() for ax in made.axes] == [True, True, True, True, False, True]


def test_equal_class_shares_are_one_series_in_percent():
    shares = {"scenes:fog": SHARES, "scenes:night": SHARES, "camvid:dusk@/far/away": np.r_[1.0, np.zeros(18)]}
    ax = plots.class_shares(shares, CITYSCAPES)
    assert [line.get_label() for line in ax.lines] == ["scenes:fog, scenes:night", "camvid:dusk"]
    assert ax.lines[0].get_xdata() == pytest.approx(100 * SHARES)
    assert np.isnan(ax.lines[1].get_xdata()).sum() == 18


def test_loss_is_smoothed_over_a_tenth_of_the_steps():
    raw, smooth = plots.loss_curves({"set": HISTORY}).lines
    assert raw.get_ydata()[-1] == pytest.approx(3 / 20)
    assert smooth.get_ydata()[-1] == pytest.approx((3 / 20 + 3 / 19) / 2)
    assert smooth.get_label() == "set: 0.15 at the end"


@pytest.mark.parametrize("histories, lines", [({"none": [], "set": HISTORY}, 2), ({"set": []}, 0)])
def test_a_history_that_is_not_there_has_no_curve(histories, lines):
    ax = plots.loss_curves(histories)
    assert len(ax.lines) == lines and ("is not there" in ax.get_legend().get_title().get_text()) == (not lines)


def test_without_groups_there_is_no_figure():
    assert plots.stacked(plots.class_bars, []) is None


def test_spectra_share_a_scale_and_phase_is_cyclic():
    parts = {"log(1 + amplitude)": [np.zeros((4, 8)), np.full((4, 8), 7.0)], "phase (rad)": [np.zeros((4, 8))] * 2}
    made = plots.spectra([IMAGE, IMAGE], parts, ["a", "b"])
    amplitude, phase = made.axes[2].images[0], made.axes[4].images[0]
    assert amplitude.get_clim() == made.axes[3].images[0].get_clim() == (0, 7)
    assert phase.get_clim() == pytest.approx((-np.pi, np.pi)) and phase.get_cmap().name == "twilight"


def test_attention_over_the_spectrum_puts_zero_frequency_amid_the_left_edge():
    share = np.zeros((8, 5))
    share[0, 0] = 0.5
    shown = plots.attention_over_spectrum(share).images[0].get_array()
    assert np.argwhere(shown == 50).tolist() == [[4, 0]]


def test_every_class_set_has_a_panel_of_its_own():
    groups = [(CITYSCAPES, {"scenes:fog": 100 * SHARES}), (CAMVID, {"camvid:dusk@x": np.arange(11.0)})]
    made = plots.stacked(plots.class_heatmap, groups)
    assert [ax.images[0].get_array().shape for ax in made.axes[:2]] == [(1, 19), (1, 11)]
    assert [ax.get_title(loc="right") for ax in made.axes[:2]] == ["cityscapes-19", "camvid-11"]
    alone = plots.stacked(plots.class_bars, [(CAMVID, {"set": np.arange(11.0), "none": np.arange(11.0)})])
    assert len(alone.axes) == 1 and alone.axes[0].get_title(loc="right") == ""


def test_bars_are_as_high_as_their_scores():
    scores = {"none": {"scenes:game": 40.0}, "set": {"scenes:game": 50.0, "camvid:dusk@/x": 30.0}}
    ax = plots.domain_bars(scores, source="scenes:game")
    heights = [bar.get_height() for container in ax.containers for bar in container]
    assert np.isnan(heights[1]) and [heights[i] for i in (0, 2, 3)] == [40, 50, 30]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["scenes:game\n(source)", "camvid:dusk"]
    wide = plots.class_bars({"set": np.r_[[np.nan], np.arange(18.0)]}, CITYSCAPES).containers[0]
    assert np.isnan(wide[0].get_width()) and wide[18].get_width() == 17


def test_confusion_is_percent_of_the_label():
    counts = np.zeros((11, 11), np.int64)
    counts[0, :2] = 30, 10
    shown = plots.confusion(counts, CAMVID).images[0].get_array()
    assert shown[0, :2].tolist() == [75, 25]
    assert np.isnan(shown[1].astype(float).filled(np.nan)).all()


def test_intervals_show_every_seed_and_do_without_an_interval():
    ax = plots.intervals([CELL, CELL | {"variant": "none", "low": None, "high": None}])
    drawn = [line.get_xdata().tolist() for line in ax.lines]
    assert drawn == [[29, 33], [30, 32], [31], [30, 32], [31]]


def test_movement_has_a_line_for_each_part_and_kind():
    ax = plots.movement(MOVED)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.1, 0.1], [0.5, 0.5]] * 2
    assert [text.get_text().strip() for text in ax.texts][0] == "amplitude, style"


def test_token_sheet_shows_the_most_influential_token():
    patches, half = RANDOM.random((4, 8, 3)), RANDOM.random((4, 5, 3))
    influence = np.array([0, 2.0, 1.0])
    one = SimpleNamespace(layer=9, branch="patches", spectrum=None, picture=patches, influence=influence)
    (ax, *_) = plots.token_sheet(IMAGE, [one]).axes
    assert np.asarray(ax.images[-1].get_array()) == pytest.approx(100 * patches[..., 1])
    assert ax.get_title() == "layer 9 patches: token 1"
    one = SimpleNamespace(layer=9, branch="amplitude", spectrum=half, picture=patches, influence=influence)
    axes = [ax for ax in plots.token_sheet(IMAGE, [one]).axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == ["layer 9 amplitude: token 1", "the same, over the picture"]
    expected = (np.fft.fftshift(half[..., 1], axes=0), patches[..., 1])
    for ax, share in zip(axes, expected, strict=True):
        assert np.asarray(ax.images[-1].get_array()) == pytest.approx(100 * share)


def test_distances_are_bars_by_layer():
    ax = plots.distances([{"layer": 3, "amplitude": 0.1, "phase": 0.2}, {"layer": 4, "amplitude": 0.3, "phase": 0}])
    assert [bar.get_height() for bar in ax.patches] == [0.1, 0.3, 0.2, 0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["layer 3", "layer 4"]


def test_token_sheet_of_a_model_without_tokens_says_so():
    made = plots.token_sheet(IMAGE, [])
    assert "no tokens" in made.texts[0].get_text()
    assert "Nothing stands behind a layer" in plots.distances([]).texts[0].get_text()


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


def test_pivot_makes_long_rows_wide():
    rows = [{"v": "set", "d": "fog", "m": 1}, {"v": "set", "d": "night", "m": 2}, {"v": "none", "d": "fog", "m": 3}]
    assert plots.pivot(rows, "v", "d", "m") == [{"v": "set", "fog": 1, "night": 2}, {"v": "none", "fog": 3}]


@pytest.mark.parametrize(
    "domain, short",
    [
        ("scenes:night", "scenes:night"),
        ("camvid:dusk@/x/camvid", "camvid:dusk"),
        ("folder@my_photos", "folder:my_photos"),
    ],
)
def test_short_name(domain: str, short: str):
    assert plots.short_name(domain) == short


def test_influences_point_out_the_chosen_token():
    ax = plots.influences([(7, 0.5), (3, 0.4), (1, 0.1)], 3)
    heights = [bar.get_height() for bar in ax.patches]
    colours = [bar.get_facecolor() for bar in ax.patches]
    assert heights == [0.5, 0.4, 0.1] and colours[0] == colours[2] != colours[1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["7", "3", "1"]


def test_the_chosen_layer_is_pointed_out_and_pixels_are_the_figure():
    table = [{"layer": "pixels", "amplitude": 0.1, "phase": 0.2}, {"layer": "layer 1", "amplitude": 0.3, "phase": 0.1}]
    plain, chosen = (plots.distances(table, chosen=name).figure.pixels() for name in (None, "layer 1"))
    assert plain.shape == chosen.shape and plain.dtype == np.uint8 and not np.array_equal(plain, chosen)
