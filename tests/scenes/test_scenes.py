"""Rendered scenes: exact shared labels, determinism, all classes, styles that differ, a cache that resumes."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from setlib.files import PROJECT
from setlib.scenes import STYLES, VERSION, cache, cached_scenes, render_scene
from setlib.scenes.street import ROAD, SIDEWALK, SKY, TERRAIN

SMALL = (64, 128)


@pytest.fixture(scope="module")
def styles():
    """Scenes 0..3 in all styles at the smoke size."""
    return {style: [render_scene(0, index, style, SMALL) for index in range(4)] for style in STYLES}


@pytest.mark.parametrize("size", [SMALL, (32, 32), (91, 121)])
def test_scene_has_the_promised_shapes_and_ranges(size):
    scene = render_scene(1, 2, "clear", size)
    assert scene.image.shape == (*size, 3) and scene.label.shape == scene.depth.shape == size
    assert (scene.image.dtype, scene.label.dtype, scene.depth.dtype) == (np.uint8, np.uint8, np.float32)
    assert scene.label.max() <= 18
    assert np.array_equal(np.isinf(scene.depth), scene.label == SKY)
    assert (scene.depth > 0.3).all()


def test_style_never_changes_labels_or_depth(styles):
    for others in styles.values():
        for game, other in zip(styles["game"], others, strict=True):
            assert np.array_equal(game.label, other.label) and np.array_equal(game.depth, other.depth)


def test_same_key_gives_the_same_bytes_in_a_fresh_process(styles):
    code = (
        "import hashlib\nfrom setlib.scenes import STYLES, render_scene\n"
        "for style in STYLES:\n"
        "    s = render_scene(0, 1, style, (64, 128))\n"
        "    print(hashlib.sha256(s.image.tobytes() + s.label.tobytes() + s.depth.tobytes()).hexdigest())\n"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=60
    )
    parts = [(s.image.tobytes() + s.label.tobytes() + s.depth.tobytes()) for _, s, *_ in styles.values()]
    assert fresh.stdout.split() == [hashlib.sha256(part).hexdigest() for part in parts]


def test_seed_and_index_change_the_layout(styles):
    for seed, index in ((1, 0), (0, 1)):
        assert (render_scene(seed, index, "game", SMALL).label != styles["game"][0].label).mean() > 0.1


def test_another_size_shows_the_same_street(styles):
    large = render_scene(0, 3, "game", (192, 384)).label
    assert (large[1::3, 1::3] == styles["game"][3].label).mean() > 0.97


def test_sixty_scenes_hold_every_class_often_enough():
    labels = [render_scene(0, index, "fog", (96, 192)).label for index in range(60)]
    shares = np.stack([np.bincount(label.ravel(), minlength=19) for label in labels])
    present = (shares > 0.0005 * 96 * 192).mean(0)
    assert present.min() >= 0.1, dict(enumerate(present))
    assert shares.sum(0).argmax() == ROAD


def test_depth_of_the_road_grows_upwards(styles):
    scene = styles["game"][0]
    for column in range(0, SMALL[1], 8):
        rows = np.flatnonzero(scene.label[:, column] == ROAD)
        assert (np.diff(scene.depth[rows, column]) < 0).all()


def test_styles_look_different(styles):
    def average(measure):
        return {style: np.mean([measure(scene) for scene in found]) for style, found in styles.items()}

    light = average(lambda scene: scene.image.mean())
    assert light["night"] < 0.75 * light["dusk"] < 0.75 * light["clear"]
    spread = average(lambda scene: np.ptp(scene.image.astype(int), axis=2).mean())
    assert spread["game"] > 1.3 * spread["clear"] > 1.3 * spread["fog"]
    ground = average(lambda scene: scene.image[np.isin(scene.label, (TERRAIN, SIDEWALK))].mean())
    assert ground["snow"] > 1.2 * ground["overcast"]


def test_fog_draws_colours_to_the_airlight_with_depth(styles):
    gaps = []
    for scene in styles["fog"]:
        gap = np.abs(scene.image.mean(2) - scene.image[scene.depth > 1e4].mean())
        at = [(scene.depth > low) & (scene.depth <= high) for low, high in ((0, 10), (20, 40), (90, 400))]
        gaps.append([gap[where].mean() for where in at])
    near, middle, far = np.mean(gaps, axis=0)
    assert near > 1.3 * middle > 1.3 * 1.3 * far


def test_unknown_style_and_small_size_are_refused():
    with pytest.raises(ValueError, match="game, clear, .* nearest: night"):
        render_scene(0, 0, "nigth")
    with pytest.raises(ValueError, match="at least 32 pixels"):
        render_scene(0, 0, "game", (16, 128))


# The cache


def test_cache_renders_only_what_is_missing(tmp_path, monkeypatch):
    found = cached_scenes(tmp_path, "rain", [0, 1, 5], 3, SMALL)
    assert [name for _, _, name in found] == ["rain/00000", "rain/00001", "rain/00005"]
    image, label, _ = found[2]
    (image.parent / ".00005.png.4711").write_bytes(b"\x89PNG trunc")  # of a process that was killed
    expected, rendered = render_scene(3, 5, "rain", SMALL), []
    monkeypatch.setattr(cache, "render_scene", lambda *key: rendered.append(key[1]) or render_scene(*key))
    for lost, pixels in ((image, expected.image), (label, expected.label)):
        assert np.array_equal(np.asarray(Image.open(lost)), pixels)
        lost.unlink()
        assert cached_scenes(tmp_path, "rain", [0, 1, 5], 3, SMALL) == found
        assert np.array_equal(np.asarray(Image.open(lost)), pixels)
    assert rendered == [5, 5]


def test_cache_shares_labels_between_styles_and_leaves_no_temporary_files(tmp_path):
    [(_, first, _)] = cached_scenes(tmp_path, "game", [0], 0, SMALL)
    written = first.stat().st_mtime_ns
    [(_, second, _)] = cached_scenes(tmp_path, "night", [0], 0, SMALL)
    assert first == second and first.stat().st_mtime_ns == written
    assert sorted(path.name for path in tmp_path.rglob("*.*") if not path.match("*.lock")) == [
        *["00000.png"] * 3,
        "scenes.json",
    ]
    assert json.loads((tmp_path / "scenes.json").read_text()) == {"seed": 0, "size": [64, 128], "version": VERSION}


def test_workers_write_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache.os, "cpu_count", lambda: 1)
    serial = cached_scenes(Path("serial"), "game", range(18), 0, (32, 32))
    monkeypatch.setattr(cache.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(cache, "render_scene", lambda *_: pytest.fail("a worker left a scene to its caller"))
    pool = cached_scenes(Path("pool"), "game", range(18), 0, (32, 32))
    assert [image.read_bytes() for image, _, _ in pool] == [image.read_bytes() for image, _, _ in serial]


@pytest.mark.parametrize("seed, size", [(1, SMALL), (0, (32, 64))])
def test_cache_refuses_a_folder_of_other_scenes(tmp_path, seed, size):
    cached_scenes(tmp_path, "game", [], 0, SMALL)
    with pytest.raises(ValueError, match="holds rendered scenes of .* name another folder"):
        cached_scenes(tmp_path, "game", [], seed, size)


def test_cache_names_the_folder_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Cannot write .*file/inside.*: free space or change the folder"):
        cached_scenes(tmp_path / "file" / "inside", "game", [0], 0, SMALL)
