"""The explorer's views: pure, equal to what the rest of the package computes, and one sentence for what cannot be."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from setlib import evaluation as evaluate
from setlib import plots, spectral
from setlib.analysis import factorial, transplant
from setlib.analysis import spectra as analysis
from setlib.analysis.tokens import Intervened
from setlib.analysis.transplant import SPANS, swap_spectrum
from setlib.checkpoint import build_segmenter, save_segmenter
from setlib.data.augment import to_image
from setlib.experiment import Experiment
from setlib.explorer import material
from setlib.explorer.studio import ALL, Studio
from setlib.refiners import REFINERS
from setlib.run import Run
from setlib.segmenter import Segmenter

OPTIONS = ["data.eval_images=4", "data.long_edge=64", "data.height=32", "data.width=64"]
GAME, NIGHT = "scenes:game", "scenes:night"
OWN = "the trained run"


def random_weights(model: Segmenter) -> Segmenter:
    """Tokens that add something: SET starts at none."""
    torch.manual_seed(1)
    for branch in model.refiner.branches().values():
        torch.nn.init.normal_(branch.delta_map.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Studio:
    """A run with a model, rendered domains, and a folder of pictures without labels."""
    folder = tmp_path_factory.mktemp("studio")
    (folder / "bare" / "images").mkdir(parents=True)
    for i in range(2):
        noise("RGB", (40, 48)).save(folder / "bare" / "images" / f"{i}.png")
    run = Run.open(folder / "run", Experiment.build("smoke", overrides=OPTIONS))
    save_segmenter(random_weights(build_segmenter(run.experiment)), run.path / "model")
    return Studio(run, [f"folder@{folder / 'bare'}"])


@pytest.fixture(scope="module")
def trained(studio) -> str:
    return str(studio.run.path)


def noise(mode: str, size=(60, 40)) -> Image.Image:
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}[mode]
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values, mode)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def is_coloured(picture: np.ndarray) -> np.ndarray:
    """Which pixels of a grey picture are in colour, (h, w)."""
    return picture.max(-1) > picture.min(-1)


def equal(one: plots.Board, other: plots.Board) -> bool:
    return one.words == other.words and one.png() == other.png()


# Swap


BASE = {"content": GAME, "style": NIGHT, "high": 0.8, "weight": 0.7}
CHANGES = {"content": "scenes:fog", "content_index": 1, "style": "scenes:fog", "style_index": 2, "part": "phase"}
CHANGES |= {"space": "layer 2", "low": 0.2, "high": 0.3, "weight": 0.2, "run": OWN, "patch": 3}


@pytest.mark.parametrize("name", CHANGES)
def test_every_argument_of_swap_changes_it_and_nothing_else_does(studio, trained, name):
    base = studio.swap(**BASE)
    assert equal(base, studio.swap(**BASE))
    assert not equal(base, studio.swap(**BASE | {name: trained if name == "run" else CHANGES[name]}))
    assert equal(base, Studio(studio.run).swap(**BASE))  # another studio, nothing kept


@pytest.mark.parametrize("part", analysis.PARTS)
def test_the_mixture_is_the_swap_of_pixels(studio, part):
    board = studio.swap(**BASE | {"part": part})
    content, style = studio.image(GAME, 0), studio.image(NIGHT, 0)
    mix = spectral.mix_amplitude if part == "amplitude" else spectral.mix_phase
    expected = to_image(mix(content, style, 0.7, 0.0, 0.8, spectral.PIXELS))
    np.testing.assert_array_equal(board.panel("mixture"), expected)
    assert "70 % of the style's " + part in board.words and "from 0.000 to 0.800" in board.words


@pytest.mark.parametrize("space", ["pixels", "layer 2"])
def test_spectra_are_those_of_content_style_and_mixture(studio, space):
    """A swap of amplitudes leaves the content's phase and has the style's amplitude, exactly; a swap of phases not."""
    whole = {"content": GAME, "style": NIGHT, "space": space}
    board = studio.swap(**whole)
    titles = [panel.title for panel in board.panels if panel.title.startswith("phase")]
    content, style, mixture = (board.panel(title).astype(int) for title in titles)
    assert np.abs(mixture - content).mean() < 1 < np.abs(mixture - style).mean()
    amplitudes = [board.panel(f"log amplitude, {name}").astype(int) for name in ("content", "style", "mixture")]
    assert np.abs(amplitudes[2] - amplitudes[1]).mean() < 1 < np.abs(amplitudes[0] - amplitudes[1]).mean()
    turned = studio.swap(**whole, part="phase")
    content, style, mixture = (turned.panel(title).astype(int) for title in titles)
    assert np.abs(mixture - style).mean() < 25 < np.abs(mixture - content).mean()
    if space != "pixels":  # colours and phases of the content do not follow the mixture
        np.testing.assert_array_equal(content, board.panel(titles[0]))
        features = f"features after {space}, content"
        np.testing.assert_array_equal(turned.panel(features), board.panel(features))


@pytest.mark.parametrize("space", ["pixels", "layer 2", "layer 3"])  # without the refiner, and with it
@pytest.mark.parametrize("part", analysis.PARTS)
def test_weight_0_and_the_same_picture_change_nothing(studio, trained, space, part):
    for same in ({"weight": 0.0}, {"style": GAME}):
        board = studio.swap(**BASE | {"part": part, "space": space, "run": trained} | same)
        assert "0.0 % of the pixels change their class" in board.words
        assert not is_coloured(board.panel("pixels that flipped")).any()
    moved = studio.swap(**BASE | {"part": part, "space": space, "run": trained, "weight": 1.0, "high": 1.5})
    assert " 0.0 % of the pixels" not in moved.words


def test_the_miou_of_the_content_is_that_of_an_evaluation(studio, trained):
    model = studio.model(trained)
    model.experiment = model.experiment.override("inference.whole=true")
    score = evaluate.evaluate({"set": model}, studio.domain(NIGHT), progress=False)["set"]
    for index, _, miou, _ in score.pictures:
        assert studio.segmented(trained, NIGHT, index).miou == pytest.approx(miou, abs=1e-6)
        words = studio.swap(**BASE | {"content": NIGHT, "content_index": index, "run": trained}).words
        assert f"mIoU of this picture, at the size shown: {miou:.1f} % before" in words


@pytest.mark.parametrize("space", ["pixels", "layer 2"])
def test_flipped_pixels_are_counted_and_marked(studio, trained, space):
    """Against the model on the mixture, or with the features of its layer replaced by hand."""
    board = studio.swap(**BASE | {"space": space, "run": trained, "high": 1.5, "weight": 1.0})
    image, model = studio.image(GAME, 0), studio.model(trained)
    if space == "pixels":
        mixed = spectral.mix_amplitude(image, studio.image(NIGHT, 0), axes=spectral.PIXELS).clamp(0, 1)
        after = studio.segment(trained, GAME, 0, mixed)
    else:
        mixed = spectral.mix_amplitude(*(studio.maps(trained, d, 0, tuple(image.shape[-2:]))[2] for d in (GAME, NIGHT)))
        after = studio.segment(trained, GAME, 0, refiner=Intervened(model.refiner, 2, lambda features, layer: mixed))
    flipped = studio.segmented(trained, GAME, 0).places != after.places
    assert flipped.any() and f"{after.miou:.1f} % after. {100 * flipped.mean():.1f} % of the pixels" in board.words
    np.testing.assert_array_equal(is_coloured(board.panel("pixels that flipped")), flipped)


@pytest.mark.parametrize("name", REFINERS)
def test_an_intervention_that_does_nothing_changes_nothing(studio, name):
    experiment = studio.experiment.override(f"model.refiner={name}", "model.any_batch=true", "model.num_prompts=3")
    model, image = random_weights(build_segmenter(experiment)).eval(), studio.image(GAME, 0)
    with torch.no_grad():
        for layer in (1, 2):
            still = Intervened(model.refiner, layer, model.refiner if layer in model.refiner.layers else lambda f, _: f)
            torch.testing.assert_close(model(image, refiner=still), model(image))
            zero = Intervened(model.refiner, layer, lambda features, _: torch.zeros_like(features))
            assert not torch.allclose(model(image, refiner=zero), model(image))


def test_a_domain_without_labels_is_predicted_without_a_score(studio, trained):
    bare = studio.names[-1]
    words = studio.swap(**BASE | {"content": bare, "run": trained}).words
    assert "no labels, so there is no mIoU" in words and "% of the pixels change their class" in words
    assert studio.swap(content=bare, style=GAME).panel("content").shape[1] == round(64 * 40 / 48)


@pytest.mark.parametrize("space", ["pixels", "layer 2"])
def test_a_chosen_patch_is_compared_with_all_others_before_and_after(studio, trained, space):
    for run in ("", trained):
        board = studio.swap(**BASE | {"space": space, "patch": 7, "run": run})
        before, after = (board.panel(f"similarity to patch 7 {when}") for when in ("before", "after"))
        side, row, column = studio.backbone(run).patch_size, *divmod(7, studio.grid(run, GAME, 0)[1])
        yellow = plots.over_grey(to_image(studio.image(GAME, 0)), np.ones(studio.grid(run, GAME, 0)), 0, 1, side)
        inside = np.s_[row * side + 1 : (row + 1) * side - 1, column * side + 1 : (column + 1) * side - 1]
        for shown in (before, after):
            np.testing.assert_array_equal(shown[inside], yellow[inside])  # similarity 1
        assert not np.array_equal(before, after) and "to patch 7" in board.words
        still = studio.swap(**BASE | {"space": space, "patch": 7, "run": run, "style": GAME, "style_index": 0})
        one, other = (still.panel(f"similarity to patch 7 {when}").astype(int) for when in ("before", "after"))
        assert np.abs(one - other).max() <= 1
    layer = 2 if space == "layer 2" else studio.backbone().num_layers - 1
    assert any(panel.title.startswith(f"similarity to patch 7 before, layer {layer}") for panel in board.panels)


def test_every_patch_can_be_clicked_in_what_shows_the_content(studio, trained):
    board = studio.swap(**BASE | {"space": "layer 2", "run": trained, "patch": 0})
    clickable = [panel for panel in board.panels if panel.cells]
    rows, columns = studio.grid(trained, GAME, 0)
    titles = {panel.title for panel in clickable}
    assert {"features after layer 2, content", "features after layer 2, mixture", "ground truth"} <= titles
    assert not any("style" in title or "log amplitude" in title or "phase" in title for title in titles)
    for panel in clickable:
        (cells,) = panel.cells
        assert cells.at(0, 0) == 0 and cells.at(0.999, 0.999) == rows * columns - 1
        assert cells.at(0.501, 0.501) == int(0.501 * cells.rows) * columns + int(0.501 * cells.columns)


def test_a_street_that_exists_in_the_style_tells_how_far_the_swap_goes(studio):
    """Against `closed` by hand; without such a street nothing is said."""
    size = tuple(studio.image(GAME, 0).shape[-2:])
    x, y, goal = (studio.maps("", name, index, size)[2] for name, index in ((GAME, 0), (NIGHT, 1), (NIGHT, 0)))
    own = transplant.closed(swap_spectrum(x, y, "phase", 0.25, 0.5), x, goal).item()
    arguments = {"content": GAME, "style": NIGHT, "style_index": 1, "part": "phase", "space": "layer 2"}
    words = studio.swap(**arguments, low=0.25, high=0.5).words
    assert (
        f"Of the way to this street in {NIGHT} it closes {round(100 * own)} %" in words and "Notebook 02" not in words
    )
    assert f"in {NIGHT} it closes" in studio.swap(GAME, NIGHT).words  # in the pixels
    assert "it closes" not in studio.swap(GAME, studio.names[-1]).words  # no rendered street
    assert "it closes" not in studio.swap(GAME, GAME, style_index=1).words  # no other style


def test_bands_that_share_an_end_share_no_frequency(studio):
    size = (64, 64)
    x, y = (torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    parts = {band: swap_spectrum(x, y, "amplitude", *ends, axes=spectral.PIXELS) for band, ends in SPANS.items()}
    changed = {
        band: (spectral.transform(z - x, spectral.PIXELS).abs().amax((0, 1)) > 1e-4) for band, z in parts.items()
    }
    radius = spectral.frequency_radius(size)
    for band, (low, high) in SPANS.items():
        torch.testing.assert_close(changed[band], ((radius > low) | (radius + low == 0)) & (radius <= high))


# Lens


@pytest.mark.parametrize("space", ["pixels", "layer 2"])
def test_the_lens_reads_the_same_before_and_after_no_swap(studio, trained, space):
    for run in ("", trained):
        still, moved = (studio.lens(**BASE | {"space": space, "run": run, "weight": w}) for w in (0.0, 1.0))
        layers = [2, 3, 4] if space == "layer 2" else [1, 2, 3, 4]
        assert [p.title.split(":")[0] for p in still.panels if p.title.startswith("layer")] == [
            f"layer {layer}, {when}" for layer in layers for when in ("before", "after")
        ]
        for layer in layers:
            before, after = (still.panel(f"layer {layer}, {when}") for when in ("before", "after"))
            assert (before != after).any(-1).mean() < 0.001
        assert not np.array_equal(moved.panel(f"layer {layer}, before"), moved.panel(f"layer {layer}, after"))
        assert "mIoU" in still.panels[-1].title and "fitted to scenes:game" in still.words


def test_a_lens_is_fitted_once_and_needs_a_source(studio, tmp_path, monkeypatch):
    fitted = studio.lenses("", [1, 4])
    monkeypatch.setattr(material, "fit_lenses", None)
    assert studio.lenses("", [4, 1]) is fitted
    bare = studio.names[-1]
    assert "mIoU" not in studio.lens(content=bare, style=GAME).panels[-1].title
    run = Run.open(tmp_path / "run", studio.experiment.override("data.source="))
    with pytest.raises(ValueError, match="labelled source, and this run names none"):
        Studio(run).lens(GAME, NIGHT)


# Layers


def test_shares_are_those_of_a_design_made_by_hand(studio, monkeypatch):
    """Pictures that are a style's gain times a layout: all of log amplitude's style is style, phase is content."""
    generator = torch.Generator().manual_seed(0)
    layouts, gain = torch.rand(4, 1, 3, 32, 64, generator=generator), {GAME: 1.0, NIGHT: 0.25}
    fresh = Studio(studio.run)
    fresh.image = lambda name, index, size=None: gain[name] * layouts[index]
    rows = {(r["layer"], r["part"], r["factor"]): r["share"] for r in fresh.shares("", (GAME, NIGHT), (0, 2))}
    x = torch.cat([fresh.image(name, index) for index in (0, 2) for name in (GAME, NIGHT)]).permute(0, 2, 3, 1)
    for part in analysis.PARTS:
        found = [rows["pixels", part, factor] for factor in factorial.FACTORS]
        assert found == pytest.approx(factorial.shares(factorial.band_products(x, part)["all"], 2).tolist())
        assert rows["pixels", part, "interaction"] == pytest.approx(0, abs=1e-3)
    assert rows["pixels", "phase", "style"] == pytest.approx(0, abs=1e-3)
    assert rows["pixels", "phase", "content"] == pytest.approx(1, abs=1e-3)
    assert rows["pixels", "amplitude", "style"] > 0.2
    assert {layer for layer, *_ in rows} == set(fresh.spaces())


def test_two_styles_are_parted_into_shares_and_real_pictures_into_distances(studio):
    board = studio.layers(GAME, NIGHT, 3, 3, space="layer 2")  # the last number: the next one is the first
    assert "Streets 3 and 0, the next one, in both styles, layer 2: of the amplitude style explains" in board.words
    assert "Streets 1 and 2 in both" in studio.layers(GAME, NIGHT, 1, 2).words
    shares = [row["share"] for row in studio.shares("", (GAME, NIGHT), (3, 0)) if row["layer"] == "layer 2"]
    said = [int(n) for n in re.findall(r"(-?\d+) %", board.words.split("Streets")[1])]
    assert said == [round(100 * share) for share in shares]
    assert board.panel("what style and content explain").any()
    for first, second in ((GAME, GAME), (GAME, studio.names[-1])):
        assert studio.layers(first, second, 0, 1).panel("distance by layer").any()


def test_distances_are_those_of_the_analysis(studio):
    table, size = studio.distances("", (GAME, 0), (NIGHT, 0)), tuple(studio.image(GAME, 0).shape[-2:])
    assert [row["layer"] for row in table] == studio.spaces()
    x, y = (studio.maps("", name, 0, size)[3] for name in (GAME, NIGHT))
    assert {"layer": "layer 3", **analysis.compare(x, y)} == table[3]
    for row in (table[0], table[3]):
        board = studio.layers(first=GAME, second=NIGHT, space=row["layer"])
        assert f"{row['amplitude']:.2f} apart in amplitude and {row['phase']:.2f} in phase" in board.words
        assert equal(board, studio.layers(first=GAME, second=NIGHT, space=row["layer"]))
    moved = [(swap_spectrum(x, y, part) - x).norm(dim=-1)[0].numpy() for part in analysis.PARTS]
    high, grey = max(m.max() for m in moved), to_image(studio.image(GAME, 0))
    for part, m in zip(analysis.PARTS, moved, strict=True):
        expected = plots.over_grey(grey, m, 0, high, studio.backbone().patch_size)
        drawn = board.panel(f"where the other's {part}").astype(int)
        assert drawn.shape == grey.shape and np.abs(drawn - expected).max() <= 1
    same = studio.layers(first=GAME, second=GAME, space="layer 3")
    assert "0.00 apart in amplitude and 0.00 in phase" in same.words
    assert same.panel("where the other's phase").shape == board.panel("where the other's phase").shape


# Tokens


def test_tokens_are_sorted_by_influence_and_attend_where_the_analysis_says(studio, trained):
    known = studio.places(trained, NIGHT, 0)
    layer = max(known)
    assert set(known[layer]) == {"amplitude", "phase"}
    ranking = studio.ranking(trained, NIGHT, 0, layer, "phase")
    values, strongest = [value for _, value in ranking], ranking[0][0]
    assert values == sorted(values, reverse=True) and values[0] > 0 and 0 not in dict(ranking)
    shown = {"domain": NIGHT, "run": trained, "layer": layer, "branch": "phase"}
    board, nothing = studio.tokens(**shown), studio.tokens(**shown, token=0)
    assert f"Token {strongest} of phase after layer {layer}: number 1 of" in board.words
    assert equal(board, studio.tokens(**shown, token=strongest))
    assert "change by 0.0 % on average" in nothing.words and " 0.0 % of the pixels change" in nothing.words
    assert "change by 0.0 % on average" not in board.words
    attention = next(a for a in studio.reading(trained, NIGHT, 0).attention if (a.layer, a.branch) == (layer, "phase"))
    share, grey = attention.picture[..., strongest], to_image(studio.image(NIGHT, 0))
    expected = plots.over_grey(grey, share, share.min(), share.max(), studio.backbone().patch_size)
    np.testing.assert_array_equal(board.panel("over the picture"), expected)
    half, full = attention.spectrum[..., strongest], board.panel("over the spectrum")
    centre = plots.in_colour(half[:1, :1], "viridis", half.min(), half.max())[0, 0]
    assert full.shape[:2] == share.shape
    np.testing.assert_array_equal(full[share.shape[0] // 2, share.shape[1] // 2], centre)  # zero frequency


def test_a_silenced_token_is_missing_in_all_that_follows(studio, trained):
    """The one token of a branch that adds anything is silenced: the model is as if its tokens were zero."""
    model, layer = studio.model(trained), studio.experiment.model.refined_layers[-1]
    branch, kept = model.refiner.amplitude, {k: v.clone() for k, v in model.refiner.state_dict().items()}
    try:
        with torch.no_grad():
            branch.token_map.bias.zero_()
            branch.tokens.a[-1, 2:] = 0
            branch.tokens.a[-1, 1] *= 1000
        change, silent = studio._without(trained, NIGHT, 0, layer, "amplitude", 1)
        whole = studio.segment(trained, NIGHT, 0)
        with torch.no_grad():
            branch.tokens.a[-1, 1] = 0
        expected = studio.segment(trained, NIGHT, 0)
    finally:
        model.refiner.load_state_dict(kept)
    np.testing.assert_array_equal(silent.places, expected.places)
    assert change.max() > 0.01 and not np.array_equal(silent.places, whole.places)


# Domains


def test_browse_covers_by_opacity_and_class(studio):
    image, label = to_image(studio.image(GAME, 1)), studio.label(GAME, 1)
    classes, labelled = studio.domain(GAME).class_set, label != 255
    np.testing.assert_array_equal(studio.browse(GAME, 1, 0.0).panel("label"), image)
    whole, road = studio.browse(GAME, 1, 1.0), studio.browse(GAME, 1, 1.0, "road")
    np.testing.assert_array_equal(whole.panel("label")[labelled], classes.palette[label][labelled])
    is_road = label == classes.classes.index("road")
    np.testing.assert_array_equal(road.panel("label: road")[is_road], classes.palette[label][is_road])
    np.testing.assert_array_equal(road.panel("label: road")[~is_road], image[~is_road])
    share = f"{100 * is_road.sum() / labelled.sum():.1f} %"
    assert f"road: {share} of the labelled pixels" in road.words and f"road {share}" in road.legend
    assert "This domain has no labels" in studio.browse(studio.names[-1]).words


def test_find_goes_round_and_stops_at_a_class(studio):
    assert [studio.find(GAME, 3, 1), studio.find(GAME, 0, -1), studio.find(GAME, 1, 1, ALL)] == [0, 3, 2]
    classes = studio.domain(GAME).class_set.classes
    for name in classes:
        holds = [i for i in range(4) if (studio.label(GAME, i) == classes.index(name)).any()]
        if not holds:
            with pytest.raises(ValueError, match=f"No picture of {GAME} holds the class {name}"):
                studio.find(GAME, 0, 1, name)
        else:
            assert studio.find(GAME, 0, 1, name) == min([i for i in holds if i > 0], default=0)


# Atlas


def test_the_atlas_shows_what_was_measured_and_a_swap_names_its_cell(studio, tmp_path):
    own = Studio(Run.open(tmp_path / "run", studio.experiment))
    with pytest.raises(ValueError, match="no atlas yet: notebook 02 or `python -m setlib premise` makes it"):
        own.atlas()
    band, (low, high) = list(SPANS.items())[2]
    rows = [
        {
            "layer": layer,
            "part": part,
            "band": name,
            "closed": 0.01 * layer + 0.3,
            "closed low": 0.2,
            "closed high": 0.4,
        }
        | {"streets": 6, "placebo": 0.1, "gain low": -0.1, "content kept": 0.9}
        for layer in (0, 2)
        for part in analysis.PARTS
        for name in SPANS
    ]
    kept = {"shares": [], "yardstick": [], "atlas": rows, "about": {"done": [0, 1, 2], "readout": 3}}
    for name, content in kept.items():
        own.run.write_json(f"premise/{name}.json", content)
    board = own.atlas(part="phase", layer=2, band=band)
    said = "found, over 6 streets and read out after layer 3, 32 % [20 %, 40 %] of the way closed, 10 % by the placebo"
    assert f"The phase after layer 2, band '{band}': the study {said}, and the content kept in 90 %." in board.words
    assert [(cells.rows, cells.columns) for cells in board.panels[0].cells] == [(2, len(SPANS))] * 2
    assert not equal(board, own.atlas("content kept")) and equal(own.atlas(), own.atlas())
    with pytest.raises(ValueError, match="Unknown measure 'colour': expected one of closed"):
        own.atlas("colour")
    swapped = {"content": GAME, "style": NIGHT, "part": "phase", "space": "layer 2", "low": low, "high": high}
    assert f"Notebook 02 {said}" in own.swap(**swapped).words
    for other in ({"weight": 0.5}, {"high": high + 0.1}, {"space": "layer 3"}, {"part": "amplitude", "low": 0.2}):
        assert "Notebook 02" not in own.swap(**swapped | other).words


# What cannot be

PAIR = {"content": GAME, "style": NIGHT}


@pytest.mark.parametrize(
    ("view", "arguments", "sentence"),
    [
        ("swap", PAIR | {"content": "scenes:dawn"}, "Unknown style 'dawn'"),
        ("swap", PAIR | {"content_index": 4}, "has the pictures 0 to 3, not 4"),
        ("swap", PAIR | {"style_index": -1}, "has the pictures 0 to 3, not -1"),
        ("swap", PAIR | {"part": "colour"}, "Unknown part 'colour'"),
        ("swap", PAIR | {"space": "layer 99"}, "expected pixels or layer 1 to layer"),
        ("swap", PAIR | {"run": "no/such/run"}, "holds no saved model"),
        ("swap", PAIR | {"run": "~nobody-here/x"}, "There is no folder ~nobody-here/x"),
        ("swap", PAIR | {"weight": float("nan")}, "Expected a weight from 0 to 1 .* got nan"),
        ("swap", PAIR | {"patch": 999}, "The patches are 0 to .*, row by row, not 999"),
        ("lens", PAIR | {"part": "colour"}, "Unknown part 'colour'"),
        ("swap", PAIR | {"low": 0.9, "high": 0.2}, "a band from low to high, got .* 0.9 to 0.2"),
        ("layers", {"first": GAME, "second": NIGHT, "space": "layer 0"}, "Unknown space 'layer 0'"),
        ("tokens", {"domain": GAME, "run": ""}, "Tokens learn: choose a trained run"),
        ("tokens", {"domain": GAME, "run": OWN, "layer": 99}, "There are no tokens after layer 99"),
        ("tokens", {"domain": GAME, "run": OWN, "layer": 1, "branch": "patches"}, "no tokens of patches after layer 1"),
        ("tokens", {"domain": GAME, "run": OWN, "token": 999}, "are 0 to .*, not 999"),
        ("browse", {"domain": GAME, "only": "unicorn"}, "Unknown class 'unicorn'"),
        ("browse", {"domain": GAME, "opacity": 5}, "Expected an opacity from 0 to 1, got 5"),
        ("browse", {"domain": GAME, "index": 1.5}, "has the pictures 0 to 3, not 1.5"),
    ],
)
def test_what_does_not_exist_is_a_sentence(studio, trained, view, arguments, sentence):
    arguments = {key: trained if value == OWN else value for key, value in arguments.items()}
    with pytest.raises(ValueError, match=sentence):
        getattr(studio, view)(**arguments)


def test_a_run_without_tokens_is_a_sentence(studio, tmp_path):
    bare = Run.open(tmp_path / "none", studio.experiment.override("model.refiner=none"))
    save_segmenter(build_segmenter(bare.experiment), bare.path / "model")
    with pytest.raises(ValueError, match="refiner 'none' of .* has no tokens"):
        studio.tokens(domain=GAME, run=str(bare.path))


def test_a_missing_backbone_leaves_the_pixels(studio, tmp_path):
    run = Run.open(tmp_path / "run", studio.experiment.override(f"model.backbone={tmp_path / 'gone'}"))
    bare = Studio(run)
    assert equal(bare.swap(GAME, NIGHT), studio.swap(GAME, NIGHT))
    with pytest.raises(ValueError, match="gone"):
        bare.swap(GAME, NIGHT, space="layer 1")
    assert "In the pixels the two lie" in bare.layers(GAME, NIGHT).words


def test_a_narrow_or_a_damaged_picture_is_a_sentence(studio, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for i, size in enumerate(((30, 20), (30, 20), (2000, 3))):
        noise("RGB", size).save(tmp_path / "images" / f"{i}.png")
        Image.new("L", size, i).save(tmp_path / "labels" / f"{i}.png")
    name = f"folder@{tmp_path}"
    assert studio.find(name, 2, 1, "sidewalk") == 1
    with pytest.raises(ValueError, match="Picture 2 of folder@.* is 2000 x 3: it is too narrow"):
        studio.swap(content=GAME, style=name, style_index=2)
    content = (tmp_path / "images" / "0.png").read_bytes()
    (tmp_path / "images" / "0.png").write_bytes(content[: len(content) // 2])
    fresh = Studio(studio.run, [name])
    with pytest.raises(ValueError, match="'0' cannot be decoded"):
        fresh.browse(name, 0)
    assert fresh.find(name, 2, 1, "sidewalk") == 1  # past the damaged one
    with pytest.raises(ValueError, match=r"holds the class sky \(2 cannot be read\)"):  # the narrow one as well
        fresh.find(name, 1, 1, "sky")


def test_a_model_that_is_trained_anew_is_read_anew(studio, tmp_path):
    run = Run.open(tmp_path / "run", studio.experiment)
    model = random_weights(build_segmenter(run.experiment))
    save_segmenter(model, run.path / "model")
    before = studio.swap(**BASE | {"run": str(run.path)})
    torch.nn.init.normal_(next(model.head.parameters()))
    save_segmenter(model, run.path / "model")
    assert not equal(before, studio.swap(**BASE | {"run": str(run.path)}))


# Uploads


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (encoded(noise("RGB"), "JPEG"), ""),
        (encoded(noise("L"), "PNG"), "grey"),
        (encoded(noise("RGBA"), "PNG"), "transparent parts are white"),
        (encoded(noise("LA"), "PNG"), "grey, transparent parts are white"),
        (encoded(noise("CMYK"), "JPEG"), ""),
        (encoded(noise("L").convert("1"), "PNG"), "grey"),
        (
            encoded(noise("RGB"), "GIF", save_all=True, append_images=[noise("RGB").rotate(180)]),
            "first of its 2 frames",
        ),
        (encoded(noise("RGB", (3000, 1000)), "WEBP"), "kept at 1024 x 341"),
        (encoded(Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)), "PNG"), "grey"),
    ],
)
def test_uploads_of_every_kind(studio, content, said):
    name, done = studio.add_upload(content, "my street (1).png")
    assert said in done and bool(said) == bool(done)
    picture = studio.swap(content=name, style=NIGHT).panel("content")
    assert picture.ndim == 3 and picture.dtype == np.uint8
    assert studio.add_upload(content, "my street (1).png")[0] == name  # kept once


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no picture that can be read"),
        (b"no picture", "is no picture that can be read"),
        (encoded(noise("RGB"), "PNG")[:400], "is no picture that can be read"),
        (encoded(noise("RGB", (3, 3)), "PNG"), "is 3 x 3 pixels: choose a picture of at most"),
        (encoded(noise("RGB", (2000, 9)), "PNG"), "is 2000 x 9 pixels: .* neither more than 16 times the other"),
        (encoded(noise("RGB", (200, 150)), "PNG"), "is 200 x 150 pixels: choose a picture of at most 0 million"),
    ],
)
def test_what_cannot_be_taken_leaves_nothing_behind(studio, monkeypatch, content, sentence):
    monkeypatch.setattr(material, "MOST_PIXELS", 20_000)
    before = sorted((studio.run.path / "uploads").glob("**/*"))
    with pytest.raises(ValueError, match=f"'it.png' {sentence}"):
        studio.add_upload(content, "it.png")
    assert sorted((studio.run.path / "uploads").glob("**/*")) == before


def test_transparency_is_white_and_rotation_is_undone(studio):
    name, _ = studio.add_upload(encoded(Image.new("RGBA", (40, 20), (255, 0, 0, 0)), "PNG"), "clear.png")
    assert (studio.browse(name).panel("folder") == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    name, _ = studio.add_upload(encoded(noise("RGB"), "JPEG", exif=exif), "upright.jpg")
    height, width, _ = studio.browse(name).panel("folder").shape
    assert height > width
