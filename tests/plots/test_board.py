"""Boards and sheets hold the pictures that they are given, in colours that mean something, and become one picture."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from setlib import plots
from setlib.data.labels import CAMVID, CITYSCAPES

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (20, 40, 3), np.uint8)
RINGS = plots.Panel(
    np.full((20, 40, 3), 200, np.uint8), "a title that is longer than the panel is wide " * 3, (0.2, 0.5)
)


def titles(board: plots.Board) -> list[list[str | None]]:
    return [[panel and panel.title for panel in row] for row in board.rows]


def test_a_board_is_one_picture_with_its_words_and_line(tmp_path):
    board = plots.Board([[RINGS, None], [RINGS._replace(is_wide=True)]], 3, "Some words.", {"road": (255, 0, 255)})
    whole, bare = np.asarray(board.image()), np.asarray(board.image(with_words=False))
    assert whole.shape[1] == bare.shape[1] == plots.WIDTH and whole.shape[0] > bare.shape[0]
    assert (bare == (255, 0, 255)).all(-1).sum() > 50  # the legend
    assert (bare[:, plots.WIDTH // 2] == 200).all(-1).any()  # the wide one reaches over the columns
    with Image.open(io.BytesIO(board.png("a line"))) as opened:
        assert opened.text["Source"] == "a line" and opened.text["Description"] == "Some words."
    assert 'alt="Some words."' in board._repr_html_()
    with Image.open(io.BytesIO(board.jpeg())) as opened:
        assert opened.size == bare.shape[1::-1]
    board.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == board.png()
    with pytest.raises(KeyError):
        board.panel("none")
    plain = plots.Board([[RINGS._replace(band=None), None], board.rows[1]], 3, "Some words.", board.legend)
    assert plain.png() != board.png()  # the rings


def test_a_place_of_the_board_is_a_place_of_a_panels_picture():
    red, blue = (np.full((20, 40, 3), colour, np.uint8) for colour in ((250, 0, 0), (0, 0, 250)))
    board = plots.Board([[plots.Panel(red, "a\nb"), plots.Panel(blue)], [plots.Panel(blue, "x", is_wide=True)]], 3)
    shown = np.asarray(board.image(with_words=False)).astype(int)
    found = set()
    for y in range(0, shown.shape[0], 13):
        for x in range(0, shown.shape[1], 29):
            place = board.locate((x + 0.5) / shown.shape[1], (y + 0.5) / shown.shape[0])
            is_panel = np.ptp(shown[y, x]) > 200
            assert bool(place) == bool(is_panel)
            if place:
                np.testing.assert_array_equal(place[0].picture[0, 0], shown[y, x])
                assert 0 <= place[1] < 1 and 0 <= place[2] < 1
                found.add(id(place[0]))
    assert len(found) == 3
    panel, right, down = board.locate(1e-4, 1 - 1e-4)
    assert panel.is_wide and right < 0.01 and down > 0.99


def test_cells_are_counted_in_their_box_and_cut_ones_count():
    cells = plots.Cells(1.5, 2, (0.5, 0.0, 0.5, 1.0))
    assert cells.at(0.4, 0.5) is None and cells.at(0.5, 0.0) == 0
    assert cells.at(0.99, 0.7) == 3 and cells.at(0.7, 1.0) is None


def test_a_frame_goes_around_one_square():
    made = plots.framed(np.zeros((20, 40, 3), np.uint8) + 9, 1, 2, 5)
    assert (made[5, 10:15] == 255).all() and (made[9, 10:15] == 255).all() and (made[4, 9:16] == 0).all()
    assert (made[6:9, 11:14] == 9).all() and (made[:3] == 9).all()


def test_a_sheet_places_pictures_and_titles_and_leaves_gaps():
    sheet = plots.sheet([[IMAGE, None], [IMAGE / np.float32(255), IMAGE // 2]], ["first", "second"], ["a", "b"])
    assert titles(sheet) == [["first\na", None], ["second", ""]]
    np.testing.assert_allclose(sheet.rows[1][0].picture, IMAGE, atol=1)  # of floats, too
    np.testing.assert_array_equal(sheet.rows[1][1].picture, IMAGE // 2)
    alone = plots.sheet([[IMAGE]], titles=[["alone"]])
    assert titles(alone) == [["alone"]] and alone.image().height < plots.WIDTH / 2
    assert 'alt="alone"' in alone._repr_html_()


def test_labels_are_mixed_in_and_ignored_pixels_stay():
    label = np.full((20, 40), 13, np.uint8)
    label[0, 0] = 255
    shown = plots.coloured(IMAGE, label, CITYSCAPES, alpha=1.0)
    assert (shown[1, 1] == CITYSCAPES.colours[13]).all()
    assert (shown[0, 0] == IMAGE[0, 0]).all()
    assert (plots.coloured(IMAGE, label, CITYSCAPES, alpha=0) == IMAGE).all()


def test_predictions_are_merged_into_the_label_classes():
    truck = np.full((20, 40), CITYSCAPES.classes.index("truck"), np.uint8)
    made = plots.prediction_sheet([(IMAGE, None, {"set": truck}), (IMAGE, None, {"set": truck})], CAMVID, ["x", "y"])
    car = plots.coloured(IMAGE, np.full((20, 40), CAMVID.classes.index("Car"), np.uint8), CAMVID, 0.75)
    assert titles(made) == [["x\npicture", "set"], ["y", ""]]
    np.testing.assert_array_equal(made.rows[0][1].picture, car)
    assert made.legend == {"Car": CAMVID.colours[CAMVID.classes.index("Car")]}
    assert plots.class_legend(CAMVID).legend == dict(zip(CAMVID.classes, CAMVID.colours, strict=True))
    assert plots.class_legend(CAMVID).image().height < 60


def test_a_prediction_sheet_keeps_a_place_for_missing_labels():
    label = np.full((20, 40), 255, np.uint8)
    made = plots.prediction_sheet([(IMAGE, label, {"set": label * 0}), (IMAGE, None, {"set": label * 0})], CITYSCAPES)
    assert titles(made) == [["picture", "label", "set"], ["", None, ""]] and list(made.legend) == ["road"]


def test_spectra_share_a_scale_and_phase_is_cyclic():
    phases = [np.full((4, 8), -np.pi), np.full((4, 8), np.pi)]
    parts = {"log(1 + amplitude)": [np.zeros((4, 8)), np.full((4, 8), 7.0)], "phase (rad)": phases}
    made = plots.spectra([IMAGE, IMAGE], parts, ["a", "b"])
    assert titles(made) == [["a", "b"], ["log(1 + amplitude)", ""], ["phase (rad)", ""]]
    amplitudes, phases = made.rows[1:]
    assert amplitudes[0].scale == amplitudes[1].scale and (amplitudes[0].scale.low, amplitudes[0].scale.high) == (0, 7)
    assert amplitudes[0].picture.mean() < 10 < 200 < amplitudes[1].picture.mean()
    assert np.abs(phases[0].picture.astype(int) - phases[1].picture).max() < 3 and "π" in phases[0].scale.ticks.values()
    bar = np.asarray(made.image())[-60:, plots.WIDTH - plots.SCALE + plots.GAP + 2]  # of the phases, at the right edge
    assert len(np.unique(bar, axis=0)) > 20


def test_depth_is_logarithmic_with_a_white_sky():
    panel = plots.depth(np.array([[1.0, 10.0, 100.0, np.inf]]))
    assert (panel.picture[0, 3] == 255).all() and "(m)" in panel.title
    assert panel.scale.ticks == {0: "1", np.log10(2): "2", np.log10(5): "5", 1: "10"} | {
        np.log10(far): str(far) for far in (20, 50, 100)
    }
    half = plots.in_colour(np.array([[0.5]]), "viridis_r", 0, 1)
    np.testing.assert_array_equal(panel.picture[0, 1], half[0, 0])


def test_colours_run_from_low_to_high():
    colours = plots.in_colour(np.array([[-1.0, 0, 1, 2, 3, np.nan]]), "viridis", 0, 2)[0]
    np.testing.assert_array_equal(colours[[0, 3]], colours[[1, 4]])
    assert len(np.unique(colours, axis=0)) == 4 and (colours[5] == 128).all()
    assert plots.in_colour(np.zeros((2, 2)), "viridis", 0, 0).shape == (2, 2, 3)


def test_a_token_sheet_shows_the_most_influential_token():
    patches, influence = RANDOM.random((4, 8, 3)), np.array([0, 2.0, 1.0])
    spectrum = np.abs(np.fft.rfft2(RANDOM.random((4, 8, 3)), axes=(0, 1)))
    one = SimpleNamespace(layer=9, branch="patches", spectrum=None, picture=patches, influence=influence)
    two = SimpleNamespace(layer=9, branch="amplitude", spectrum=spectrum, picture=patches, influence=influence)
    made = plots.token_sheet(IMAGE[:18, :36], [one, two, two])  # whose last patches are not whole
    assert [len(row) for row in made.rows] == [4, 1]
    assert all(title.startswith("layer 9 ") and "token 1\n" in title for row in titles(made) for title in row)
    share = patches[..., 1]
    expected = plots.over_grey(IMAGE[:18, :36], share, share.min(), share.max(), 5)
    np.testing.assert_array_equal(made.panel("layer 9 patches"), expected)
    np.testing.assert_array_equal(made.rows[0][1].picture, expected)
    whole = made.rows[0][2].picture
    half = np.fft.fftshift(spectrum[..., 1], axes=0)
    np.testing.assert_array_equal(whole[:, 4:], plots.in_colour(half, "viridis", half.min(), half.max())[:, :4])
    np.testing.assert_array_equal(whole[1:, 1:], whole[:0:-1, :0:-1])  # as strong at minus each frequency
    assert "no tokens" in plots.token_sheet(IMAGE, []).words


@pytest.mark.parametrize("width", [7, 8])
def test_the_whole_spectrum_is_that_of_the_transform(width):
    x = RANDOM.random((4, width))
    one = SimpleNamespace(spectrum=np.abs(np.fft.rfft2(x))[..., None], picture=x[..., None])
    whole = np.fft.fftshift(np.abs(np.fft.fft2(x)))
    expected = plots.in_colour(whole, "viridis", whole.min(), whole.max()).astype(int)
    drawn = plots.attention(one, 0, IMAGE[:, : 5 * width], 5)[1].picture
    assert drawn.shape == expected.shape and np.abs(drawn - expected).max() <= 2
