"""Frozen features on disk: the same numbers, never those of something else, bounded, and no loss when it goes wrong."""

import copy
import os

import pytest
import torch
from safetensors.torch import save_file

from setlib.backbone import FrozenBackbone
from setlib.experiment import Experiment
from setlib.features import FeatureCache
from setlib.model import Segmenter


@pytest.fixture(scope="module")
def backbone():
    return FrozenBackbone.load("tiny-random")


def images(count=3, seed=0, size=(64, 128)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def files(cache):
    return sorted(cache.folder.glob("*.safetensors"))


def same(one, other):
    assert one.stop == other.stop and list(one.maps) == list(other.maps) and one.is_tuple == other.is_tuple
    torch.testing.assert_close(one.hidden, other.hidden, rtol=1e-5, atol=1e-5)
    for layer in one.maps:
        torch.testing.assert_close(one.maps[layer], other.maps[layer], rtol=1e-5, atol=1e-5)


def test_what_is_kept_is_what_is_computed_and_is_not_computed_again(backbone, tmp_path, monkeypatch):
    cache, plain = FeatureCache(1e9, tmp_path), backbone.prefix(images(), 3, (1, 2))
    same(cache.prefix(backbone, images(), 3, (2, 1)), plain)
    assert len(files(cache)) == 3
    more = torch.cat([images(), images(2, seed=5)])
    ran = []
    own = backbone.prefix
    monkeypatch.setattr(backbone, "prefix", lambda pixels, *args: ran.append(len(pixels)) or own(pixels, *args))
    again = FeatureCache(1e9, tmp_path)
    same(again.prefix(backbone, more[[4, 0, 3, 2]], 3, (1, 2)), own(more[[4, 0, 3, 2]], 3, (1, 2)))
    same(again.prefix(backbone, more, 3, (1, 2)), own(more, 3, (1, 2)))
    assert ran == [2]  # the two new pictures, once


CHANGES = ("weights", "heads", "colours", "pixel", "size", "stop", "layers", "precision", "type")


@pytest.mark.parametrize("change", CHANGES)
def test_anything_that_decides_the_features_makes_new_ones(backbone, tmp_path, change):
    cache, pixels = FeatureCache(1e9, tmp_path), images(1)
    cache.prefix(backbone, pixels, 3, (1, 2))
    other, stop, layers, precision = backbone, 3, (1, 2), "float32"
    if change == "weights":
        other = FrozenBackbone.load("tiny-random", seed=1)
    if change == "heads":  # the same weights, another function
        model = copy.deepcopy(backbone.model)
        model.config.num_attention_heads = 2
        for layer in model.encoder.layer:
            layer.attention.num_attention_heads, layer.attention.head_dim = 2, 16
        other = FrozenBackbone(model)
    if change == "colours":
        other = FrozenBackbone(backbone.model, "", mean=(0.5, 0.5, 0.5))
    pixels = pixels.clone()
    if change == "pixel":
        pixels[0, 0, 0, 0] += 1e-3
    if change == "size":
        pixels = pixels.reshape(1, 3, 128, 64)
    if change == "type":
        pixels = pixels.double()
    stop = 2 if change == "stop" else stop
    layers = (2,) if change == "layers" else layers
    precision = "bfloat16" if change == "precision" else precision
    same(cache.prefix(other, pixels, stop, layers, precision), other.prefix(pixels, stop, layers))
    assert len(files(cache)) == 2


def test_the_folder_is_bounded_and_forgets_what_was_used_longest_ago(backbone, tmp_path):
    cache = FeatureCache(1e9, tmp_path)
    cache.prefix(backbone, images(1), 3, (1,))
    (first,) = files(cache)
    size = first.stat().st_size
    cache = FeatureCache(3.5 * size, tmp_path)
    for seed in (1, 2):
        cache.prefix(backbone, images(1, seed), 3, (1,))
    second = next(path for path in files(cache) if path != first)
    for age, path in enumerate([second, *(path for path in files(cache) if path not in (first, second)), first]):
        os.utime(path, (1000 + age, 1000 + age))
    cache.prefix(backbone, images(1), 3, (1,))  # the first is used again
    cache.prefix(backbone, images(1, 9), 3, (1,))
    assert first.exists() and not second.exists() and len(files(cache)) == 3
    for seed in range(20, 30):
        cache.prefix(backbone, images(2, seed), 3, (1,))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3.5 * size
    small = FeatureCache(size // 2, tmp_path / "small")
    same(small.prefix(backbone, images(1), 3, (1,)), backbone.prefix(images(1), 3, (1,)))
    assert not files(small)


def test_what_a_killed_process_leaves_does_no_harm(backbone, tmp_path):
    cache = FeatureCache(1e9, tmp_path)
    cache.prefix(backbone, images(2), 3, (1,))
    damaged, whole = files(cache)
    damaged.write_bytes(damaged.read_bytes()[:100])
    (tmp_path / ".half.safetensors.1").write_bytes(b"x" * 1000)
    same(FeatureCache(1e9, tmp_path).prefix(backbone, images(2), 3, (1,)), backbone.prefix(images(2), 3, (1,)))
    assert damaged.stat().st_size == whole.stat().st_size
    half = tmp_path / ".half.safetensors.1"
    small = FeatureCache(2 * whole.stat().st_size + 1000, tmp_path)
    small.prefix(backbone, images(1, 5), 3, (1,))
    assert half.exists() and len(files(small)) == 2  # it counts; somebody may be writing it
    os.utime(half, (1000, 1000))
    small.prefix(backbone, images(1, 6), 3, (1,))
    assert not half.exists() and len(files(small)) == 2


def test_an_entry_of_something_else_and_a_folder_are_passed_by(backbone, tmp_path):
    cache = FeatureCache(1e9, tmp_path)
    cache.prefix(backbone, images(1), 3, (1,))
    (path,) = files(cache)
    save_file({"x": torch.ones(1)}, path)
    (tmp_path / "folder").mkdir()
    same(cache.prefix(backbone, images(1), 3, (1,)), backbone.prefix(images(1), 3, (1,)))


def test_processes_side_by_side_keep_the_bound(backbone, tmp_path):
    one = FeatureCache(1e9, tmp_path)
    one.prefix(backbone, images(1), 3, (1,))
    size = files(one)[0].stat().st_size
    caches = [FeatureCache(3.5 * size, tmp_path) for _ in range(3)]
    for seed in range(1, 7):
        for number, cache in enumerate(caches):
            cache.prefix(backbone, images(1, 10 * seed + number), 3, (1,))
            assert len(files(cache)) <= 3


def test_a_folder_that_cannot_be_written_only_warns(backbone, tmp_path):
    (tmp_path / "file").write_text("")
    cache = FeatureCache(1e9, tmp_path / "file" / "folder")
    with pytest.warns(UserWarning, match="Frozen features are no longer kept: Cannot write"):
        same(cache.prefix(backbone, images(), 3, (1,)), backbone.prefix(images(), 3, (1,)))


@pytest.mark.parametrize("refiner", ["none", "set", "vpt"])
def test_a_model_with_the_cache_says_what_it_says_without(refiner, monkeypatch, tmp_path):
    monkeypatch.setenv("SETLIB_CACHE", str(tmp_path))
    options = [f"model.refiner={refiner}", "train.cache_gb=0.1"]
    model = Segmenter(Experiment.build("smoke", overrides=options)).eval()
    for p in model.refiner.parameters():
        torch.nn.init.normal_(p, std=0.1)
    for _ in range(2):
        with torch.no_grad():
            found = model(images(), model.prefix(images()))
            torch.testing.assert_close(found, model(images()), rtol=1e-5, atol=1e-5)
    assert len(list((tmp_path / "features").glob("*"))) == 3
