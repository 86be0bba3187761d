"""The premise in pictures shows the numbers of its rows: in the right cell, in percent, in brackets where doubtful."""

from __future__ import annotations

import io

import pytest

from setlib import plots


def drawn(figure):
    """The figure, once it has been drawn: what cannot be drawn fails here."""
    figure.savefig(io.BytesIO())
    return figure


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def shares() -> list[dict]:
    """Two layers, two bands; the pixels lack the second band's second cell."""
    rows, value = [], 0.0
    for layer in (0, 3):
        for part in ("amplitude", "phase"):
            for band in ("mean", "to 1") if layer else ("mean",):
                for factor in ("style", "content", "interaction"):
                    value += 0.01
                    rows.append({"layer": layer, "part": part, "band": band, "factor": factor, "share": value})
    return rows


def test_share_maps_put_each_share_into_its_cell_on_one_scale():
    figure = drawn(plots.share_maps(shares()))
    panels = figure.axes[:4]
    assert [ax.get_title() for ax in panels] == [
        "amplitude: style",
        "amplitude: content",
        "phase: style",
        "phase: content",
    ]
    assert texts(panels[0]) == ["1", "7", "10"] and texts(panels[3]) == ["5", "14", "17"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["pixels", "layer 3"]
    assert {ax.images[0].get_clim() for ax in panels} == {(0, 100)}


def test_atlas_brackets_what_carries_no_style():
    rows = [
        {"layer": layer, "part": part, "band": "all", "closed": closed, "closed low": low, "gain low": gain}
        for part, layer, closed, low, gain in (
            ("amplitude", 0, 0.2, 0.1, 0.1), ("amplitude", 3, -0.3, -0.4, 0.2),
            ("phase", 0, -0.001, -0.1, 0.0), ("phase", 3, 0.05, 0.02, 0.01),
        )
    ]  # fmt: skip
    left, right = drawn(plots.atlas(rows)).axes[:2]
    assert texts(left) == ["20", "(-30)"] and texts(right) == ["(0)", "5"]
    assert left.images[0].get_clim() == pytest.approx((-30, 30)) and not left.patches
    left, right = plots.atlas(rows, chosen=("phase", 3, "all")).axes[:2]
    (frame,) = right.patches
    assert not left.patches and 0.5 < frame.get_y() < 1 and frame.get_x() < 0  # the second row


def test_accuracy_maps_leave_out_what_is_not_known():
    rows = [
        {"layer": 0, "part": part, "band": "all", "domain": 80.0, "classes": None} for part in ("amplitude", "phase")
    ]
    assert [ax.get_title() for ax in drawn(plots.accuracy_maps(rows)).axes[:2]] == [
        "amplitude: domain",
        "phase: domain",
    ]
    rows = [row | {"classes": 60.0} for row in rows]
    assert texts(drawn(plots.accuracy_maps(rows)).axes[3]) == ["60"]


def test_yardstick_shows_parts_and_placebos_where_they_are():
    rows = [
        {"part": "amplitude", "closed": 0.2, "closed low": 0.1, "closed high": 0.3, "random basis": 0.1, "noise": -0.2},
        {"part": "mean", "closed": 0.1, "closed low": 0.0, "closed high": 0.2, "noise": -0.1},
    ]
    ax = plots.yardstick([row | {"layer": 3, "donor": "another street"} for row in rows])
    drawn(ax.figure)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["amplitude", "mean"]
    assert ax.get_xlabel().endswith("layer 3; B: another street")
    points = {
        (round(float(line.get_xdata()[0])), int(line.get_ydata()[0])) for line in ax.lines if len(line.get_xdata()) == 1
    }
    assert points == {(20, 0), (10, 1), (10, 0), (-20, 0), (-10, 1)}
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["part", "placebo: random basis", "placebo: noise"]


def test_curves_show_swap_and_placebo_by_layer():
    values = {"closed": 0.1, "closed low": 0.0, "closed high": 0.2, "placebo": 0.05, "miou": 40.0, "placebo miou": 38.0}
    rows = [
        {"layer": layer, "part": part, "band": band} | values
        for band in ("all", "low") for part in ("amplitude", "phase") for layer in (0, 3)
    ]  # fmt: skip
    for value, scale, heights in (("closed", 100, {10.0, 5.0}), ("miou", 1, {40.0, 38.0})):
        figure = drawn(plots.transplant_curves(rows, value, "label", scale))
        assert [ax.get_title() for ax in figure.axes] == ["all", "low"]
        found = {float(y) for ax in figure.axes for line in ax.lines for y in line.get_ydata()}
        assert found == heights


def test_reveal_names_guess_claim_result_and_placebo():
    ax = plots.reveal(30, claim=100, result=-21.4, placebo=-28, ends=(-45, 0), label="of the way (%)")
    drawn(ax.figure)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "your guess",
        "the paper's claim",
        "measured",
        "placebo",
    ]
    assert [text.strip() for text in texts(ax)] == ["30 %", "100 %", "-21 %", "-28 %"]
    low, high = ax.get_xlim()
    assert low < -45 and high > 100
