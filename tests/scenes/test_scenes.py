"""Rendered scenes: exact shared labels, determinism, all classes, styles that differ, a cache that resumes."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from setlib.scenes import render as scenes

SMALL = (64, 128)


def digest(scene) -> str:
    return hashlib.sha256(b"".join(part.tobytes() for part in (scene.image, scene.label, scene.depth))).hexdigest()


@pytest.fixture(scope="module")
def styles():
    """Scenes 0..3 in all styles at the smoke size."""
    return {style: [scenes.render(0, index, style, SMALL) for index in range(4)] for style in scenes.STYLES}


@pytest.mark.parametrize("size", [SMALL, (32, 32), (90, 120)])
def test_scene_has_the_promised_shapes_and_ranges(size):
    scene = scenes.render(1, 2, "clear", size)
    assert scene.image.shape == (*size, 3) and scene.label.shape == scene.depth.shape == size
    assert (scene.image.dtype, scene.label.dtype, scene.depth.dtype) == (np.uint8, np.uint8, np.float32)
    assert scene.label.max() <= 18
    assert np.array_equal(np.isinf(scene.depth), scene.label == scenes.SKY)
    assert (scene.depth > 0.3).all()


def test_style_never_changes_labels_or_depth(styles):
    for others in styles.values():
        for game, other in zip(styles["game"], others, strict=True):
            assert np.array_equal(game.label, other.label) and np.array_equal(game.depth, other.depth)


def test_same_key_gives_the_same_bytes_here_and_in_a_fresh_process(styles):
    here = [digest(styles[style][1]) for style in ("game", "night", "snow")]
    assert here == [digest(scenes.render(0, 1, style, SMALL)) for style in ("game", "night", "snow")]
    code = (
        "import hashlib\nfrom setlib import scenes\n"
        "for style in ('game', 'night', 'snow'):\n"
        "    s = scenes.render(0, 1, style, (64, 128))\n"
        "    print(hashlib.sha256(b''.join(p.tobytes() for p in (s.image, s.label, s.depth))).hexdigest())\n"
    )
    root = Path(scenes.__file__).parents[2]
    fresh = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert fresh.stdout.split() == here


def test_seed_and_index_change_the_layout():
    base = scenes.render(0, 0, "game", SMALL).label
    for seed, index in ((1, 0), (0, 1)):
        assert (scenes.render(seed, index, "game", SMALL).label != base).mean() > 0.1


def test_another_size_shows_the_same_street():
    small, large = scenes.render(0, 3, "game", SMALL).label, scenes.render(0, 3, "game", (192, 384)).label
    assert (large[1::3, 1::3] == small).mean() > 0.97


def test_sixty_scenes_hold_every_class_often_enough():
    shares = np.stack(
        [np.bincount(scenes.render(0, index, "fog", (96, 192)).label.ravel(), minlength=19) for index in range(60)]
    )
    present = (shares > 0.0005 * 96 * 192).mean(0)
    assert present.min() >= 0.1, dict(enumerate(present))
    assert shares.sum(0).argmax() == scenes.ROAD


def test_depth_of_the_road_grows_upwards():
    scene = scenes.render(0, 0, "game", SMALL)
    for column in range(0, SMALL[1], 8):
        rows = np.flatnonzero(scene.label[:, column] == scenes.ROAD)
        assert (np.diff(scene.depth[rows, column]) < 0).all()


def test_styles_look_different(styles):
    mean = {style: np.mean([s.image.mean() for s in found]) for style, found in styles.items()}
    assert mean["night"] < 0.75 * mean["dusk"] < 0.75 * mean["clear"]
    spread = {
        style: np.mean([np.ptp(s.image.astype(int), axis=2).mean() for s in found]) for style, found in styles.items()
    }
    assert spread["game"] > 1.3 * spread["clear"] > 1.3 * spread["fog"]
    ground = {
        style: np.mean([s.image[(s.label == scenes.TERRAIN) | (s.label == scenes.SIDEWALK)].mean() for s in found])
        for style, found in styles.items()
    }
    assert ground["snow"] > 1.2 * ground["overcast"]


def test_fog_draws_colours_to_the_airlight_with_depth(styles):
    gaps = []
    for scene in styles["fog"]:
        gap = np.abs(scene.image.mean(2) - scene.image[scene.depth > 1e4].mean())
        gaps.append(
            [gap[(scene.depth > low) & (scene.depth <= high)].mean() for low, high in ((0, 10), (20, 40), (90, 400))]
        )
    near, middle, far = np.mean(gaps, axis=0)
    assert near > 1.3 * middle > 1.3 * 1.3 * far


def test_unknown_style_and_small_size_are_refused():
    with pytest.raises(ValueError, match="game, clear, .* nearest: night"):
        scenes.render(0, 0, "nigth")
    with pytest.raises(ValueError, match="at least 32 pixels"):
        scenes.render(0, 0, "game", (16, 128))


def test_cache_renders_only_what_is_missing(tmp_path, monkeypatch):
    found = scenes.cache(tmp_path, "rain", [0, 1, 5], 3, SMALL, progress=False)
    assert [name for _, _, name in found] == ["rain/00000", "rain/00001", "rain/00005"]
    image, label, _ = found[2]
    expected = scenes.render(3, 5, "rain", SMALL)
    assert np.array_equal(np.asarray(Image.open(image)), expected.image) and np.array_equal(
        np.asarray(Image.open(label)), expected.label
    )
    image.unlink()
    (image.parent / ".00005.png.4711").write_bytes(b"\x89PNG trunc")  # of a process that was killed
    rendered, render = [], scenes.render
    monkeypatch.setattr(
        scenes, "render", lambda seed, index, *rest: rendered.append(index) or render(seed, index, *rest)
    )
    assert scenes.cache(tmp_path, "rain", [0, 1, 5], 3, SMALL, progress=False) == found
    assert rendered == [5] and np.array_equal(np.asarray(Image.open(image)), expected.image)
    label.unlink()  # killed between the two files of a scene
    assert scenes.cache(tmp_path, "rain", [0, 1, 5], 3, SMALL, progress=False) == found
    assert rendered == [5, 5] and np.array_equal(np.asarray(Image.open(label)), expected.label)


def test_cache_shares_labels_between_styles_and_leaves_no_temporary_files(tmp_path):
    first = scenes.cache(tmp_path, "game", [0], 0, SMALL, progress=False)[0][1]
    written = first.stat().st_mtime_ns
    assert scenes.cache(tmp_path, "night", [0], 0, SMALL, progress=False)[0][1] == first
    assert first.stat().st_mtime_ns == written
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [*["00000.png"] * 3, "scenes.json"]
    assert json.loads((tmp_path / "scenes.json").read_text()) == {
        "seed": 0,
        "size": [64, 128],
        "version": scenes.VERSION,
    }


def test_cache_in_a_pool_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes.os, "cpu_count", lambda: 2)
    pool = scenes.cache(tmp_path / "pool", "game", range(18), 0, (32, 32), progress=False)
    monkeypatch.setattr(scenes.os, "cpu_count", lambda: 1)
    serial = scenes.cache(tmp_path / "serial", "game", range(18), 0, (32, 32), progress=False)
    assert [image.read_bytes() for image, _, _ in pool] == [image.read_bytes() for image, _, _ in serial]


@pytest.mark.parametrize("seed, size", [(1, SMALL), (0, (32, 64))])
def test_cache_refuses_a_folder_of_other_scenes(tmp_path, seed, size):
    scenes.cache(tmp_path, "game", [], 0, SMALL, progress=False)
    with pytest.raises(ValueError, match="holds rendered scenes of .* name another folder"):
        scenes.cache(tmp_path, "game", [], seed, size, progress=False)


def test_cache_names_the_folder_it_cannot_write(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Cannot write .*file/inside"):
        scenes.cache(tmp_path / "file" / "inside", "game", [0], 0, SMALL, progress=False)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match="No space left on device: choose another folder or free some space"):
        scenes.cache(tmp_path / "full", "game", [0], 0, SMALL, progress=False)
    assert not [path for path in (tmp_path / "full").rglob("*") if path.is_file()]
