"""What is measured is what the docstrings define: identities of movement, swaps and surveys."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from setlib import spectral
from setlib.analysis import spectra as analysis
from setlib.backbone import FrozenBackbone
from setlib.data import domains
from setlib.data.labels import CAMVID, CITYSCAPES
from setlib.experiment import Experiment
from setlib.weights.load import load_backbone

AXES = pytest.mark.parametrize("axes, shape", [(spectral.GRID, (2, 6, 8, 5)), (spectral.PIXELS, (2, 3, 7, 9))])


@pytest.fixture(scope="module")
def backbone() -> FrozenBackbone:
    return load_backbone("tiny-random")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_domain(folder, name: str = "folder", count: int = 3, size: tuple = (16, 32), label: int | None = 3):
    """A folder domain of grey pictures 10, 20, ...; every label pixel has one id."""
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size[::-1], (10 * (i + 1),) * 3).save(folder / "images" / f"{i}.png")
        if label is not None:
            (folder / "labels").mkdir(exist_ok=True)
            Image.new("L", size[::-1], label).save(folder / "labels" / f"{i}.png")
    return domains.load(f"{name}@{folder}", Experiment.build("smoke").data)


@AXES
def test_the_same_does_not_move(axes, shape):
    x = noise(*shape)
    assert analysis.compare(x, x, axes) == pytest.approx({"amplitude": 0, "phase": 0}, abs=1e-12)


@AXES
def test_doubling_moves_the_amplitude_alone_by_ln_2(axes, shape):
    x = noise(*shape)
    assert analysis.compare(x, 2 * x, axes) == pytest.approx({"amplitude": math.log(2), "phase": 0}, abs=1e-9)


@AXES
def test_a_pure_change_of_amplitude_leaves_the_phase(axes, shape):
    x, y = noise(*shape), noise(*shape, seed=1)
    found = analysis.compare(x, spectral.mix_amplitude(x, y, axes=axes), axes)
    assert found["phase"] == pytest.approx(0, abs=1e-9) and found["amplitude"] > 0.1


@AXES
def test_a_pure_change_of_phase_leaves_the_amplitude(axes, shape):
    x, y = noise(*shape), noise(*shape, seed=1)
    found = analysis.compare(x, spectral.mix_phase(x, y, axes=axes), axes)
    assert found["amplitude"] == pytest.approx(0, abs=1e-9) and found["phase"] > 0.1
    assert analysis.compare(x, -x, axes) == pytest.approx({"amplitude": 0, "phase": 2}, abs=1e-9)


def test_movement_is_symmetric_ignores_the_mean_and_stands_empty_pictures():
    x, y = noise(1, 6, 8, 5), noise(1, 6, 8, 5, seed=1)
    assert analysis.compare(x, y) == pytest.approx(analysis.compare(y, x))
    assert analysis.compare(x, y + 7) == pytest.approx(analysis.compare(x, y))
    assert analysis.compare(torch.zeros_like(x), y) == {"amplitude": 0, "phase": 0}


def test_half_spectrum_columns_count_as_often_as_in_the_full_one():
    x, y = noise(1, 5, 8, 2), noise(1, 5, 8, 2, seed=1)
    one, other = (torch.fft.fft2(z, dim=(1, 2), norm="ortho")[0].flatten(0, 1)[1:] for z in (x, y))
    weights = (one.abs() * other.abs()).sqrt()
    moved = (weights * (one.abs() / other.abs()).log().abs()).sum() / weights.sum()
    assert analysis.compare(x, y)["amplitude"] == pytest.approx(moved.item())


@AXES
def test_round_trip_loses_nothing_and_keeps_the_energy(axes, shape):
    found = analysis.round_trip(noise(*shape), axes)
    assert found["largest error"] < 1e-12
    assert found["energy of the spectrum"] == pytest.approx(found["energy"])


def test_movement_tells_style_from_content(backbone):
    layouts = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    rows = analysis.movement(backbone, {"dark": 0.25 * layouts, "bright": layouts}, (1, 4))
    found = {(row["layer"], row["part"]): row for row in rows}
    assert list(found) == [(layer, part) for layer in ("pixels", 1, 4) for part in ("amplitude", "phase")]
    assert found["pixels", "amplitude"]["style"] == pytest.approx(math.log(4), rel=1e-5)
    assert found["pixels", "phase"]["style"] == pytest.approx(0, abs=1e-5)
    assert found["pixels", "phase"]["content"] > 0.5
    assert all(row["ratio"] == pytest.approx(row["style"] / row["content"]) for row in rows)
    same = analysis.movement(backbone, {"a": layouts, "b": layouts}, (1,))
    assert all(row["style"] == pytest.approx(0, abs=1e-6) for row in same)


def test_movement_needs_two_of_each(backbone):
    with pytest.raises(ValueError, match="two styles and two layouts"):
        analysis.movement(backbone, {"a": torch.rand(2, 3, 32, 64)}, (1,))
    with pytest.raises(ValueError, match="two styles and two layouts"):
        analysis.movement(backbone, {"a": torch.rand(1, 3, 32, 64), "b": torch.rand(1, 3, 32, 64)}, (1,))


def test_the_sentence_follows_the_numbers():
    row = {"layer": "pixels", "part": "amplitude", "style": 0.8, "content": 0.4, "ratio": 2.0}
    rows = [row, {"layer": "pixels", "part": "phase", "style": 0.1, "content": 0.9, "ratio": 0.11}]
    said = analysis.say_movement(rows)
    assert "log amplitude moved by 0.80 between styles and 0.40 between layouts, the phase by 0.10 and 0.90" in said
    assert "amplitude more than the phase in 1 of 1 places, and the phase more than the amplitude in 0." in said
    said = analysis.say_movement([row | {"ratio": 0.1}, rows[1]])
    assert "amplitude more than the phase in 0 of 1 places, and the phase more than the amplitude in 1." in said


@AXES
def test_mix_phase_keeps_what_it_should(axes, shape):
    x, y = noise(*shape), noise(*shape, seed=1)
    assert spectral.mix_phase(x, y, weight=0, axes=axes) == pytest.approx(x)
    assert spectral.mix_phase(x, x, weight=0.5, axes=axes) == pytest.approx(x)
    assert spectral.mix_phase(x, y, axes=axes) == pytest.approx(spectral.mix_amplitude(y, x, axes=axes))
    assert spectral.mix_phase(x, y, low=9, high=10, axes=axes) == pytest.approx(x)


def test_feature_pictures_share_their_colours():
    x = noise(1, 4, 6, 5).float()
    same, again, other = analysis.feature_pictures([x, x, x + noise(1, 4, 6, 5, seed=1).float()])
    assert same.shape == (4, 6, 3) and same.min() >= 0 and same.max() <= 1
    assert (same == again).all() and not np.allclose(same, other)


def test_spectrum_pictures_are_full_spectra_with_zero_frequency_amid():
    x = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    amplitude, phase, against = analysis.spectrum_pictures(x).values()
    assert amplitude.shape == phase.shape == against.shape == (2, 8, 12)
    assert np.unravel_index(amplitude[0].argmax(), (8, 12)) == (4, 6)
    assert against[0] == pytest.approx(0, abs=1e-6)
    assert np.cos(against[1]) == pytest.approx(np.cos(phase[1] - phase[0]), abs=1e-5)


def test_survey_counts_what_is_there(tmp_path):
    source = make_domain(tmp_path / "a", label=3)
    found = analysis.survey(source, CITYSCAPES)
    assert (found.pictures, found.size, found.brightness, found.contrast) == (3, "32 x 16", 20, 0)
    assert found.shares.argmax() == 3 and found.shares.sum() == 1
    assert analysis.survey(make_domain(tmp_path / "b", label=None), CITYSCAPES).shares is None
    assert analysis.survey(source, CITYSCAPES, limit=1).brightness == 10


def test_mixed_domains_are_counted_in_the_smaller_class_set(tmp_path):
    rendered, camvid = make_domain(tmp_path / "a", label=3), make_domain(tmp_path / "b", "camvid", label=8)
    assert analysis.common_class_set([rendered, camvid]) is CAMVID
    assert analysis.survey(rendered, CAMVID).shares.argmax() == CAMVID.classes.index("Building")  # a wall
    assert analysis.survey(camvid, CAMVID).shares.argmax() == CAMVID.classes.index("Car")
    image, label = analysis.examples(camvid, [0], CAMVID)
    assert image.shape == label.shape == (16, 32, 3) and (image != label).any()
    assert analysis.examples(make_domain(tmp_path / "c", label=None), [0, 1], CAMVID)[1::2] == [None, None]


def test_the_survey_sentences_follow_the_numbers(tmp_path):
    shares = np.zeros(11)
    shares[:3] = 0.7, 0.295, 0.005
    source = analysis.Survey("scenes:game", 3, "8 x 4", 120.0, 9.0, shares)
    dark = replace_survey(source, domain="camvid:dusk@/x", brightness=30.0, shares=shares[[1, 0, *range(2, 11)]])
    said = analysis.say_survey(source, [dark], CAMVID)
    assert "120 (scenes:game) in the source, 30 (camvid:dusk) in the targets" in said
    assert "Sky (70 %) and Building (30 %); 1 of 11 classes hold less than 1 % each (Pole); 8 of 11" in said
    assert "shares, 40 % of a target's" in said
    unlabelled = replace_survey(dark, domain="folder@/y", brightness=50.0, shares=None)
    said = analysis.say_survey(source, [dark, unlabelled], CAMVID)
    assert "30 (camvid:dusk) to 50 (folder:y) in the targets" in said
    assert "would have to" not in analysis.say_survey(source, [unlabelled], CAMVID)


def replace_survey(survey: analysis.Survey, **changes) -> analysis.Survey:
    return survey._replace(**changes)


def test_profile_of_a_domain_is_the_mean_over_its_pictures(tmp_path):
    domain = make_domain(tmp_path / "a", count=2, size=(32, 64))
    radii, profile = analysis.domain_profile(domain, 64)
    assert len(radii) == len(profile) == 32 and (np.diff(radii) > 0).all()
    assert profile[0] > profile[1] and profile[1:] == pytest.approx(0, abs=1e-3)  # flat pictures: only a mean


def test_styled_scenes_are_the_targets_streets():
    data = replace(Experiment.build("smoke").data, height=32, width=64)
    styled = analysis.styled_scenes(data, 2, ("game", "night"))
    assert {style: tuple(images.shape) for style, images in styled.items()} == dict.fromkeys(
        ("game", "night"), (2, 3, 32, 64)
    )
    assert (analysis.as_picture(styled["night"]) == domains.load("scenes:night", data).sample(0).image).all()
