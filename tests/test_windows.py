"""Windows: they cover a picture, blend without a seam, and equal whole tiles where they do not overlap."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from setlib.experiment import Experiment
from setlib.model import Segmenter
from setlib.windows import blend, cut

SIDES = st.integers(1, 40)


def build(*overrides):
    return Segmenter(Experiment.build("smoke", overrides=overrides)).eval()


def picture(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


@given(SIDES, SIDES, SIDES, SIDES, SIDES, SIDES)
def test_a_map_of_single_pixels_is_blended_without_a_seam(h, w, height, width, down, right):
    """Whatever size, window and stride: windows that a linear map of pixels changed are the changed picture."""
    pixels = torch.rand(3, h, w, generator=torch.Generator().manual_seed(h * w))
    windows = cut(pixels, (height, width), (min(down, height), min(right, width)))
    mixed = torch.einsum("kc,nchw->nkhw", torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]), windows.images)
    expected = torch.einsum("kc,chw->khw", torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]), pixels)
    torch.testing.assert_close(blend(mixed, windows), expected)
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
    found = tiled.probabilities(tiled.windows(image))
    for y in (0, 64):
        for x in (0, 128):
            tile = image[y : y + 64, x : x + 128]
            expected = whole.probabilities(whole.windows(tile))
            torch.testing.assert_close(found[:, y : y + 64, x : x + 128], expected)


@pytest.mark.parametrize("head", ["per-pixel", "mask2former"])
def test_how_many_windows_run_at_once_changes_nothing(head):
    options = ["data.long_edge=256", "model.head_channels=32", f"model.head={head}", "model.pixel_layers=1"]
    one, many = (build(*options, f"inference.windows={n}") for n in (1, 50))
    views = one.windows(picture(128, 256))
    assert len(views[0].images) == 9
    torch.testing.assert_close(one.probabilities(views), many.probabilities(views), rtol=1e-4, atol=1e-5)


def test_a_whole_picture_is_one_window():
    (view,) = build("data.long_edge=200", "inference.whole=true").windows(picture(100, 150))
    assert view.images.shape == (1, 3, 136, 200) and view.size == (133, 200)  # 133 padded to patches of 8


def test_flip_and_scales_are_averaged():
    image = picture(64, 128)
    model = build("inference.flip=true")
    found = model.probabilities(model.windows(image))
    mirrored = model.probabilities(model.windows(image[:, ::-1].copy()))
    torch.testing.assert_close(mirrored.flip(-1), found, rtol=1e-4, atol=1e-5)
    plain = build()
    assert not torch.allclose(plain.probabilities(plain.windows(image)), found)
    several = build("inference.scales=1,0.5,2")
    views = several.windows(image)
    assert [view.size for view in views] == [(64, 128), (32, 64), (128, 256)]
    parts = [several.probabilities([view]) for view in views]
    parts = [torch.nn.functional.interpolate(p[None], (64, 128), mode="bilinear")[0] for p in parts]
    torch.testing.assert_close(several.probabilities(views), sum(parts) / 3)
