"""Linear readings: what is linearly there is read, what is not is chance, and neighbours are never on both sides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from setlib.analysis import probe
from setlib.data import domains
from setlib.experiment import Experiment
from setlib.weights.load import load_backbone

DATA = Experiment.build("smoke").data


def test_lens_reads_what_is_linear_and_ignores_255():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 6, 8, 5, generator=generator)
    labels = features[..., :3].argmax(-1).byte()
    lens = probe.fit_lens(features, labels, 3)
    assert (lens(features).argmax(1) == labels).float().mean() > 0.9
    worse = torch.where(torch.rand(labels.shape, generator=generator) < 0.3, 255, labels.long()).byte()
    other = probe.fit_lens(torch.where((worse == 255)[..., None], 1e3, features), worse, 3)
    assert (other(features).argmax(1) == labels).float().mean() > 0.9


def test_lens_does_not_lose_rare_classes():
    features = torch.randn(1, 40, 50, 2, generator=torch.Generator().manual_seed(1))
    labels = (features[..., 0] > 2).byte()  # one in 40
    assert (probe.fit_lens(features, labels, 2)(features).argmax(1)[labels == 1] == 1).float().mean() > 0.3


def test_labels_are_those_of_the_middle_of_patches():
    label = np.arange(6 * 10, dtype=np.uint8).reshape(6, 10)
    assert probe.at_patches(label, 4).tolist() == [[22, 26, 255], [255, 255, 255]]


def test_a_direction_is_read_across_blocks_and_noise_is_not():
    rng = np.random.default_rng(0)
    block, target = np.arange(80) // 20, np.arange(80) % 2 == 0
    values = rng.normal(size=(80, 30))
    targets = np.stack([target, rng.random(80) < 0.5], 1)
    values[:, 0] += 6 * target
    right = probe.cross_validated(values @ values.T, targets, block)
    found = probe.balanced(right, targets)
    assert found[0] > 85 and 30 < found[1] < 70
    moved = values + 7.0  # a common offset is no evidence
    assert (probe.cross_validated(moved @ moved.T, targets, block) == right).mean() > 0.99


def test_what_only_a_block_shares_is_not_read():
    """Frames of one stretch resemble each other: a label that only tells stretches apart must stay chance."""
    rng = np.random.default_rng(1)
    block, stretch = np.arange(60) // 10, rng.normal(size=(6, 200))
    values = stretch[block] + 0.1 * rng.normal(size=(60, 200))
    target = (block % 2 == 0)[:, None]
    assert probe.balanced(probe.cross_validated(values @ values.T, target, block), target)[0] < 65


def test_balanced_accuracy_of_always_yes_is_half():
    targets = np.array([[True], [True], [True], [False]])
    assert probe.balanced(targets, targets)[0] == 50
    assert probe.balanced(np.ones((4, 1), bool), targets)[0] == 100


def test_two_styles_are_told_apart():
    backbone = load_backbone("tiny-random")
    used = [domains.load(f"scenes:{style}", DATA) for style in ("game", "night")]
    rows = probe.tell_apart(backbone, used, (2,), DATA.long_edge, pictures=4, blocks=2)
    assert {row["layer"] for row in rows} == {0, 2}
    brightness = next(r for r in rows if (r["layer"], r["part"], r["band"]) == (0, "amplitude", "mean"))
    assert brightness["domain"] == 100 and brightness["domain low"] <= brightness["domain high"]
    assert 20 < np.mean([row["shuffled"] for row in rows]) < 80


def test_lenses_take_any_labelled_domain():
    backbone = load_backbone("tiny-random")
    found = probe.fit_lenses(backbone, domains.load("scenes:game", DATA, role="source"), (1, 3), pictures=2)
    assert list(found) == [1, 3]
    assert found[1](torch.randn(1, 8, 16, 32)).shape == (1, 19, 8, 16)
    with pytest.raises(ValueError):
        backbone(torch.rand(1, 3, 64, 128), layers=(9,))
