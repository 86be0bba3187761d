"""Corruptions: stronger with severity, the same each time, sizes kept, names taken apart."""

import numpy as np
import pytest

from setlib.data import corruptions, domains
from setlib.data.corruptions import CORRUPTIONS, corrupt, take_apart
from setlib.experiment import Data


@pytest.fixture(scope="module")
def picture():
    rows = np.linspace(40, 200, 256)[:, None, None] * np.ones((1, 320, 3))
    rows[80:160, 100:220] = (200, 60, 40)
    rows[::8, :, 1] = 20
    return (rows + np.random.default_rng(0).normal(0, 8, rows.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_severity_grows_and_a_repeat_is_the_same(picture, kind):
    made = [corrupt(picture, kind, severity, "a") for severity in range(1, 6)]
    assert all(x.shape == picture.shape and x.dtype == np.uint8 for x in made)
    distance = [np.abs(x.astype(float) - picture).mean() for x in made]
    assert distance[0] > 0.5 and all(b > a * 0.9 for a, b in zip(distance, distance[1:], strict=False))
    assert distance[4] > 1.1 * distance[0]
    assert np.array_equal(made[2], corrupt(picture, kind, 3, "a"))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_small_pictures_stay_pictures(kind):
    for size in ((1, 1), (3, 50)):
        assert corrupt(np.full((*size, 3), 90, np.uint8), kind, 5).shape == (*size, 3)


def test_what_a_corruption_is(picture):
    assert corrupt(picture, "brightness", 3).mean() > picture.mean() > corrupt(picture, "dark", 3).mean()
    assert corrupt(picture, "contrast", 5).std() < picture.std() / 4
    soft, sharp = (np.diff(x.astype(float), axis=1).std() for x in (corrupt(picture, "blur", 3), picture))
    assert soft < sharp / 2
    assert not np.array_equal(corrupt(picture, "noise", 3, "a"), corrupt(picture, "noise", 3, "b"))


def test_names_are_taken_apart():
    assert take_apart("scenes:night~fog2") == ("scenes:night", "fog", 2)
    assert take_apart("folder@/a/b~jpeg") == ("folder@/a/b", "jpeg", 3)
    for plain in ("scenes:night", "folder@~/photos", "folder@~someone", "folder@/a/~b"):
        assert take_apart(plain) == (plain, "", 0)
    with pytest.raises(ValueError, match="Unknown corruption 'foog2' .* .nearest: fog"):
        take_apart("scenes:night~foog2")
    with pytest.raises(ValueError, match="write DOMAIN~KIND.1-5."):
        take_apart("scenes:night~fog9")


def test_a_corrupted_domain_keeps_its_labels():
    data = Data(height=32, width=64, eval_images=2)
    plain, foggy = domains.load("scenes:clear", data), domains.load("scenes:clear~fog5", data)
    assert foggy.spec.text == "scenes:clear~fog5" and len(foggy) == 2
    one, other = plain.sample(1), foggy.sample(1)
    assert np.array_equal(one.label, other.label) and not np.array_equal(one.image, other.image)
    assert np.array_equal(other.image, corruptions.corrupt(one.image, "fog", 5, one.name))
