"""Crops of the source by number: the same whoever makes them, every picture in every epoch, damaged ones named."""

import math

import pytest
import torch
from PIL import Image

from setlib.data.crops import RandomCrops
from setlib.data.domains import load
from setlib.experiment import Experiment


@pytest.fixture
def folder(tmp_path):
    """Six flat pictures, the class is the number of the picture."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (160, 80), (40 * i, 90, 90)).save(tmp_path / "images" / f"{i}.jpg")
        Image.new("L", (160, 80), i).save(tmp_path / "labels" / f"{i}.png")
    return tmp_path


def crops(folder, *overrides):
    experiment = Experiment.build("smoke", f"folder@{folder}", overrides=["train.views=0", *overrides])
    return RandomCrops(load(experiment.data.source, experiment.data, role="source"), experiment)


def test_a_crop_is_the_same_at_every_call_and_another_in_the_next_epoch(folder):
    made = crops(folder)
    one, same, next_epoch = made[2], made[2], made[8]
    assert torch.equal(one.image, same.image) and torch.equal(one.label, same.label)
    assert not torch.equal(one.image, next_epoch.image)
    for first in (0, 6):  # every epoch shows every picture
        shown = {i for crop in map(made.__getitem__, range(first, first + 6)) for i in crop.label.unique().tolist()}
        assert shown - {255} == set(range(6))


def test_kept_crops_are_shared_by_all_seeds_and_fresh_ones_are_not(folder):
    for views, shared in ((4, True), (0, False)):
        one, other = (crops(folder, f"train.views={views}", f"seed={seed}")[1] for seed in (0, 1))
        assert torch.equal(one.image, other.image) == shared


def test_worker_processes_change_nothing(folder):
    chosen = [[0, 3], [8, 5], [2, 2]]
    one, other = (list(crops(folder, f"data.workers={workers}").batches(chosen)) for workers in (0, 2))
    for (images, labels, _), (same_images, same_labels, _) in zip(one, other, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_stops_the_training_or_is_passed_over_and_named(folder, capsys, workers):
    stopping, skipping = (crops(folder, f"data.workers={workers}", f"data.on_error={do}") for do in ("stop", "skip"))
    for i in (1, 4):
        path = folder / "images" / f"{i}.jpg"
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="'[14]' cannot be decoded"):
        list(stopping.batches([list(range(6))]))
    _, labels, _ = zip(*skipping.batches([list(range(6)), list(range(6, 12))]), strict=True)
    assert set(torch.cat(labels).unique().tolist()) - {255} == {0, 2, 3, 5}
    if not workers:  # these print for themselves
        assert capsys.readouterr().out.count("cannot be decoded") == 2  # each once
    for path in (folder / "images").iterdir():
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="No picture of folder.* can be decoded"):
        skipping[0]


def test_a_large_jpeg_is_decoded_no_larger_than_the_crop_needs(folder):
    Image.new("RGB", (2000, 1000), "red").save(folder / "images" / "0.jpg")
    Image.new("L", (2000, 1000), 7).save(folder / "labels" / "0.png")
    made = crops(folder)
    data = made.experiment.data
    least = data.long_edge * data.scale_max
    sizes = [max(made.domain.sample(0, edge).image.shape) for edge in (0, math.ceil(least), 1200)]
    assert sizes[0] == sizes[2] == 2000 and least <= sizes[1] <= 2 * least
    seen = [crop for crop in map(made.__getitem__, range(6)) if 7 in crop.label]
    assert seen and seen[0].image.shape[1:] == seen[0].label.shape == (data.height, data.width)
