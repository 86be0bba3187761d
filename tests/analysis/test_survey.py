"""What domains hold is counted as it is there, in a class set that all share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from setlib.analysis import survey
from setlib.data import domains
from setlib.data.augment import to_image
from setlib.data.labels import CAMVID, CITYSCAPES
from setlib.experiment import Experiment


def make_domain(folder, name: str = "folder", count: int = 3, size: tuple = (16, 32), label: int | None = 3):
    """A folder domain of grey pictures 10, 20, ...; every label pixel has one id."""
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size[::-1], (10 * (i + 1),) * 3).save(folder / "images" / f"{i}.png")
        if label is not None:
            (folder / "labels").mkdir(exist_ok=True)
            Image.new("L", size[::-1], label).save(folder / "labels" / f"{i}.png")
    return domains.load(f"{name}@{folder}", Experiment.build("smoke").data)


def test_survey_counts_what_is_there(tmp_path):
    source = make_domain(tmp_path / "a", label=3)
    found = survey.survey(source, CITYSCAPES)
    assert (found.pictures, found.size, found.brightness, found.contrast) == (3, "32 x 16", 20, 0)
    assert found.shares.argmax() == 3 and found.shares.sum() == 1
    assert survey.survey(make_domain(tmp_path / "b", label=None), CITYSCAPES).shares is None
    assert survey.survey(source, CITYSCAPES, limit=1).brightness == 10


def test_mixed_domains_are_counted_in_the_smaller_class_set(tmp_path):
    rendered, camvid = make_domain(tmp_path / "a", label=3), make_domain(tmp_path / "b", "camvid", label=8)
    assert survey.common_class_set([rendered, camvid]) is CAMVID
    assert survey.survey(rendered, CAMVID).shares.argmax() == CAMVID.classes.index("Building")  # a wall
    assert survey.survey(camvid, CAMVID).shares.argmax() == CAMVID.classes.index("Car")
    image, label = survey.examples(camvid, [0], CAMVID)
    assert image.shape == label.shape == (16, 32, 3) and (image != label).any()
    assert survey.examples(make_domain(tmp_path / "c", label=None), [0, 1], CAMVID)[1::2] == [None, None]


def test_the_survey_sentences_follow_the_numbers():
    shares = np.zeros(11)
    shares[:3] = 0.7, 0.295, 0.005
    source = survey.Survey("scenes:game", 3, "8 x 4", 120.0, 9.0, shares)
    dark = source._replace(domain="camvid:dusk@/x", brightness=30.0, shares=shares[[1, 0, *range(2, 11)]])
    said = survey.say_survey(source, [dark], CAMVID)
    assert "120 (scenes:game) in the source, 30 (camvid:dusk) in the targets" in said
    assert "Sky (70 %) and Building (30 %); 1 of 11 classes hold less than 1 % each (Pole); 8 of 11" in said
    assert "shares, 40 % of a target's" in said
    unlabelled = dark._replace(domain="folder@/y", brightness=50.0, shares=None)
    said = survey.say_survey(source, [dark, unlabelled], CAMVID)
    assert "30 (camvid:dusk) to 50 (folder:y) in the targets" in said
    assert "would have to" not in survey.say_survey(source, [unlabelled], CAMVID)


def test_profile_of_a_domain_is_the_mean_over_its_pictures(tmp_path):
    domain = make_domain(tmp_path / "a", count=2, size=(32, 64))
    radii, profile = survey.domain_profile(domain, 64)
    assert len(radii) == len(profile) == 32 and (np.diff(radii) > 0).all()
    assert profile[0] > profile[1] and profile[1:] == pytest.approx(0, abs=1e-3)  # flat pictures: only a mean


def test_styled_scenes_are_the_targets_streets():
    data = replace(Experiment.build("smoke").data, height=32, width=64)
    styled = survey.styled_scenes(data, 2, ("game", "night"))
    assert {style: tuple(images.shape) for style, images in styled.items()} == dict.fromkeys(
        ("game", "night"), (2, 3, 32, 64)
    )
    assert (to_image(styled["night"]) == domains.load("scenes:night", data).sample(0).image).all()
