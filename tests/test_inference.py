"""Whole pictures: windows cover them, blend without a seam, and every picture is answered at its own size."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from setlib import _memory
from setlib._memory import label_map
from setlib.checkpoint import build_segmenter
from setlib.data.augment import augment, to_tensor
from setlib.experiment import Experiment
from setlib.inference import blend, class_probabilities, cut, cut_picture, predict
from setlib.spectral import PIXELS, band_mask, transform

SIDES = st.integers(1, 40)


def build(*overrides):
    return build_segmenter(Experiment.build("smoke", overrides=overrides)).eval()


@pytest.fixture(scope="module")
def model():
    return build()


def picture(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def probabilities(model, image):
    return class_probabilities(model, cut_picture(model, image))


@pytest.mark.parametrize("size", [(64, 128), (1, 1), (3, 700), (700, 3), (97, 131), (300, 200)])
def test_any_size_is_predicted_at_its_own_size(model, size):
    labels = predict(model, picture(*size))
    assert labels.shape == size and labels.dtype == np.uint8 and labels.max() < 19


def test_strips_equal_plain_interpolation(monkeypatch):
    scores = torch.randn(5, 9, 13, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(_memory, "STRIP_PIXELS", 200)
    for size in [(9, 13), (50, 41), (4, 5), (1, 1), (100, 3)]:
        expected = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)
        assert np.array_equal(label_map(scores, size), expected.numpy())


@given(SIDES, SIDES, SIDES, SIDES, SIDES, SIDES)
def test_a_map_of_single_pixels_is_blended_without_a_seam(h, w, height, width, down, right):
    """Whatever size, window and stride: windows that a linear map of pixels changed are the changed picture."""
    pixels = torch.rand(3, h, w, generator=torch.Generator().manual_seed(h * w))
    windows = cut(pixels, (height, width), (min(down, height), min(right, width)))
    weights = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
    mixed = torch.einsum("kc,nchw->nkhw", weights, windows.images)
    torch.testing.assert_close(blend(mixed, windows), torch.einsum("kc,chw->khw", weights, pixels))
    mirrored = cut(pixels.flip(-1), (height, width), (height, width))._replace(flipped=True)
    torch.testing.assert_close(blend(mirrored.images, mirrored), pixels)


def test_the_fields_windows():
    """512-pixel windows by 341 over 1024 x 2048, as the released configurations slide them."""
    corners = cut(torch.zeros(3, 1024, 2048), (512, 512), (341, 341)).corners
    assert sorted({y for y, _ in corners}) == [0, 341, 512]
    assert sorted({x for _, x in corners}) == [0, 341, 682, 1023, 1364, 1536]


def test_without_overlap_windows_are_whole_tiles():
    tiled, whole = build("data.long_edge=256", "inference.stride=1"), build("inference.whole=true")
    image = picture(128, 256)
    found = probabilities(tiled, image)
    for y in (0, 64):
        for x in (0, 128):
            expected = probabilities(whole, image[y : y + 64, x : x + 128])
            torch.testing.assert_close(found[:, y : y + 64, x : x + 128], expected)


@pytest.mark.parametrize("head", ["per-pixel", "mask2former"])
def test_how_many_windows_run_at_once_changes_nothing(head):
    options = ["data.long_edge=256", "model.head_channels=32", f"model.head={head}", "model.pixel_layers=1"]
    one, many = (build(*options, f"inference.windows={n}") for n in (1, 50))
    passes = cut_picture(one, picture(128, 256))
    assert len(passes[0].images) == 9
    found, expected = (class_probabilities(model, passes) for model in (one, many))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_whole_picture_is_one_window():
    (windows,) = cut_picture(build("data.long_edge=200", "inference.whole=true"), picture(100, 150))
    assert windows.images.shape == (1, 3, 136, 200) and windows.size == (133, 200)  # 133 padded to patches of 8


def test_flip_and_scales_are_averaged(model):
    image = picture(64, 128)
    flipping = build("inference.flip=true")
    found, mirrored = (probabilities(flipping, pixels) for pixels in (image, image[:, ::-1].copy()))
    torch.testing.assert_close(mirrored.flip(-1), found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(probabilities(model, image), found)
    several = build("inference.scales=1,0.5,2")
    passes = cut_picture(several, image)
    assert [windows.size for windows in passes] == [(64, 128), (32, 64), (128, 256)]
    parts = [class_probabilities(several, [windows]) for windows in passes]
    parts = [F.interpolate(p[None], (64, 128), mode="bilinear")[0] for p in parts]
    torch.testing.assert_close(class_probabilities(several, passes), sum(parts) / 3)


def test_attenuation_weakens_its_band_alone_in_training_and_in_prediction():
    image, columns = picture(64, 128) // 4 + 96, torch.arange(128).expand(64, 128) % 19  # nothing is clipped
    model = build("data.attenuate=0.75", "data.attenuate_below=0.25", "data.scale_min=1", "data.scale_max=1")
    data, own = replace(model.experiment.data, photometric=0.0), transform(to_tensor(image), PIXELS)
    crop, label = augment(to_tensor(image)[0], columns, data, torch.Generator().manual_seed(0))
    expected = own * (1 - 0.75 * band_mask((64, 128), 0.001, 0.25))
    for seen in (cut_picture(model, image)[0].images[0], crop.flip(-1) if label[0, 0] else crop):
        torch.testing.assert_close(transform(seen[None], PIXELS), expected, atol=1e-4, rtol=0)
