"""Augmentation: picture and label stay together, nothing outside the picture is learnt from."""

import numpy as np
import pytest
import torch

from setlib.data.augment import augment, choose_crop, distort, fit, to_image, to_tensor
from setlib.experiment import Data

DATA = Data(height=32, width=64, long_edge=64, photometric=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(8))
def test_label_follows_the_picture(seed):
    label = torch.zeros(60, 100, dtype=torch.int64)
    label[:, 50:], label[30:] = 7, 13
    image = label.float().expand(3, -1, -1) / 20
    cut, ids = augment(image, label, DATA, generator(seed))
    assert cut.shape == (3, 32, 64) and ids.shape == (32, 64) and ids.dtype == torch.int64
    agree = (cut[0] * 20 - ids).abs()[ids != 255] < 0.5
    assert agree.float().mean() > 0.85  # all but the blurred borders
    assert set(ids.unique().tolist()) <= {0, 7, 13, 255}


def test_outside_the_picture_is_grey_and_ignored():
    data = Data(height=64, width=64, long_edge=32, scale_min=1, scale_max=1, photometric=0)
    image, label = augment(torch.ones(3, 16, 32), torch.full((16, 32), 3), data, generator())
    outside = label == 255
    assert outside.sum() == 64 * 64 - 16 * 32
    assert (image[:, outside] == 0.5).all() and (image[:, ~outside] == 1).all()


def test_a_crop_of_one_class_is_avoided():
    label = torch.zeros(32, 640, dtype=torch.int64)
    label[:, 300:340] = torch.arange(40) % 5
    shares = []
    for seed in range(30):
        top, left = choose_crop(label, Data(height=32, width=64), generator(seed))
        shares.append((label[:, left : left + 64] == 0).float().mean().item())
    plain = torch.randint(0, 577, (30,), generator=generator())
    naive = [(label[:, x : x + 64] == 0).float().mean().item() for x in plain.tolist()]
    assert sum(s <= 0.75 for s in shares) > 2 * sum(s <= 0.75 for s in naive)


def test_same_generator_same_crop_and_the_global_one_is_left_alone():
    image, label = torch.rand(3, 60, 100), torch.randint(0, 19, (60, 100))
    state = torch.random.get_rng_state()
    one, same = (augment(image, label, Data(height=32, width=64), generator(4)) for _ in range(2))
    assert torch.equal(one[0], same[0]) and torch.equal(one[1], same[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_distortion_stays_in_range_and_can_be_off():
    image = torch.rand(3, 8, 8)
    changed = [distort(image, 1.0, generator(seed)) for seed in range(20)]
    assert all(0 <= c.min() and c.max() <= 1 for c in changed)
    assert sum(not torch.equal(c, image) for c in changed) > 15
    assert torch.equal(distort(image, 0.0, generator()), image)


@pytest.mark.parametrize(("size", "expected"), [((100, 200), (32, 64)), ((200, 100), (64, 32)), ((1, 1000), (1, 64))])
def test_fit_keeps_the_aspect(size, expected):
    assert fit(torch.zeros(3, *size), 64) == expected


def test_images_become_tensors_and_come_back():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, 5, 7) and tensor.dtype == torch.float32 and tensor.max() <= 1
    assert np.array_equal(to_image(tensor), image) and to_image(2 * tensor + 1).min() == 255
