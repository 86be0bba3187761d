"""No room, no right to write, no memory, no network: one sentence, and the last good state is kept."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import time
from functools import partial
from pathlib import Path

import faults
import network
import pytest
from faults import SMALL, Command

TRAINING = ("train.steps=6", "train.views=4", "train.checkpoint_every=1")


def words_of(folder: Path, command: str = "train") -> list[str]:
    source = faults.make_domain(folder / "domain")
    return [command, "--profile", "smoke", "--source", source, "--target", source, "-o", *SMALL, *TRAINING]


def fill(folder: Path, left: int) -> Path:
    """A file that leaves so many bytes of a small disk."""
    size = shutil.disk_usage(folder).free - left
    (folder / ".filler").write_bytes(bytes(size))
    return folder / ".filler"


# No room


def test_a_full_disk_keeps_the_last_checkpoint_and_the_same_command_goes_on(tmp_path):
    words = words_of(tmp_path)
    assert faults.run(tmp_path, *words, "--run", "whole").wait() == 0
    with faults.small_disk(tmp_path / "disk", "2m") as disk:
        filler = fill(disk, 300_000)  # one checkpoint, and not a second one beside it
        cut = faults.run(tmp_path, *words, "--run", "disk/run")
        assert cut.wait() == 2 and "No space left on device" in cut.error and "free space" in cut.error
        assert (disk / "run" / "checkpoint.safetensors").is_file()
        faults.check_whole(disk / "run")
        assert not [path for path in (disk / "run").rglob(".*") if path.stat().st_size > 1000]
        filler.unlink()
        assert faults.run(tmp_path, *words, "--run", "disk/run").wait() == 0
        same = [faults.digest(tmp_path / name) for name in ("disk/run", "whole")]
    for found in same:
        found.pop("experiment.json")
    assert same[0] == same[1]


def test_a_full_disk_keeps_the_last_scores_and_report(trained, tmp_path):
    with faults.small_disk(tmp_path / "disk", "2m") as disk:
        run = shutil.copytree(trained.path, disk / "run")
        (run / "report.html").write_text("earlier")
        filler = fill(disk, 9_000)  # the scores, and no report
        cut = faults.run(tmp_path, "evaluate", run)
        assert cut.wait() == 2 and "Cannot write" in cut.error and "report.html" in cut.error
        assert (run / "report.html").read_text() == "earlier"
        scores = (run / "metrics.json").read_bytes()
        filler.unlink()
        fill(disk, 0)
        cut = faults.run(tmp_path, "evaluate", run)
        assert cut.wait() == 2 and "Cannot write" in cut.error and "metrics.json" in cut.error
        assert (run / "metrics.json").read_bytes() == scores
        faults.check_whole(run)


@pytest.mark.parametrize("command", ["check scenes:fog@disk --profile smoke", "prepare {} --out disk --short-edge 24"])
def test_a_full_disk_keeps_the_pictures_that_are_whole(tmp_path, command):
    domain = faults.make_domain(tmp_path / "domain", 30)
    with faults.small_disk(tmp_path / "disk", "60k") as disk:
        cut = faults.run(tmp_path, *command.format(domain).split(), "-o", "data.eval_images=40")
        assert cut.wait() in (1, 2) and "No space left on device" in cut.error
        faults.check_whole(disk)


def own_cache(folder: Path, url: str, sha256: str) -> None:
    network.use_index(url, sha256)
    os.environ |= {"SETLIB_CACHE": str(folder)}


def test_a_full_disk_leaves_no_half_backbone(tmp_path):
    words = [*words_of(tmp_path), "model.backbone=dinov2-small-saliency", "--run", "run"]
    with network.index(tmp_path / "index") as (url, sha256, _), faults.small_disk(tmp_path / "disk", "1m") as disk:
        cut = faults.run(tmp_path, *words, prepare=partial(own_cache, disk, url, sha256))
        assert cut.wait() == 2 and "space" in cut.error, cut.output
        assert not faults.visible(disk) and not any(path.is_dir() for path in disk.iterdir())


def test_output_that_nobody_takes_is_no_traceback(tmp_path):
    for place in ("/dev/full", "pipe"):
        command = f"{faults.sys.executable} -m setlib backbones"
        command = f"{command} | true" if place == "pipe" else f"{command} > {place}"
        place = {"env": os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, "cwd": tmp_path}
        ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, **place)
        assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr, ended.stderr


# No right to write

NO_RIGHT = "(Cannot write|Read-only file system|Permission denied).*(run|place)/"


@pytest.mark.parametrize("command", ["train", "run", "ablate", "premise"])
def test_a_run_folder_that_is_read_only_is_one_sentence(tmp_path, command):
    words = words_of(tmp_path, command)
    (tmp_path / "run").mkdir()
    with faults.read_only(tmp_path / "run"):
        refused = faults.run(tmp_path, *words, "--run", "run")
    assert refused.wait() == 2 and re.search(NO_RIGHT, refused.error)


def test_a_finished_run_that_is_read_only_can_be_used(trained, tmp_path):
    run = shutil.copytree(trained.path, tmp_path / "run")
    faults.make_domain(tmp_path / "domain")
    picture = next((tmp_path / "domain").rglob("*.png"))
    with faults.read_only(run):
        assert faults.run(tmp_path, "predict", run, picture, "--out", "out").wait() == 0
        refused = faults.run(tmp_path, "evaluate", run)
    assert refused.wait() == 2 and re.search(NO_RIGHT, refused.error)


@pytest.mark.parametrize("command", ["check scenes:fog@place --profile smoke", "prepare {} --out place --short-edge 9"])
def test_a_folder_of_pictures_that_is_read_only_is_one_sentence(tmp_path, command):
    domain = faults.make_domain(tmp_path / "domain")
    (tmp_path / "place").mkdir()
    with faults.read_only(tmp_path / "place"):
        refused = faults.run(tmp_path, *command.format(domain).split())
    assert refused.wait() in (1, 2) and re.search(NO_RIGHT, refused.error)


# No memory


@pytest.mark.parametrize(
    ("command", "options", "setting"),
    [
        ("train", ["train.batch_size=128", "data.height=512", "data.width=1024", "train.views=0"], "train.batch_size"),
        pytest.param(
            *("evaluate", ["inference.whole=true", "inference.scales=16"], "inference."),
            marks=pytest.mark.reliability,
        ),
    ],
)
def test_too_little_memory_names_the_setting_to_lower(trained, tmp_path, command, options, setting):
    if command == "train":
        words = [*words_of(tmp_path), *options, "--run", "run"]
    else:
        words = ["evaluate", shutil.copytree(trained.path, tmp_path / "run"), "-o", *options]
    starved = faults.run(tmp_path, *words, prepare=partial(faults.little_memory, 200_000_000))
    assert starved.wait() == 2 and "memory" in starved.error and setting in starved.error


def test_a_worker_that_is_killed_names_the_setting_to_lower(tmp_path):
    words = [*words_of(tmp_path), "train.views=0", "data.workers=1", "train.steps=2000", "--run", "run"]
    command = Command(tmp_path, *words)
    command.wait_for("step/s")
    time.sleep(0.5)
    own = [int(one) for one in os.listdir("/proc") if one.isdigit() and parent_of(one) == command.process.pid]
    for worker in own:
        os.kill(worker, 9)
    assert own and command.end() == 2 and "data.workers" in command.error
    faults.check_whole(tmp_path / "run")


def little_shared_memory() -> None:
    """Gives this process a /dev/shm of its own, of 64 kB: what a container has is little too."""
    ctypes.CDLL(None).unshare(0x20000)  # its mounts are its own
    for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"]):
        subprocess.run(["mount", *words], check=True)


@pytest.mark.reliability
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_workers_without_shared_memory_name_the_setting_to_lower(tmp_path):
    words = [
        *words_of(tmp_path),
        "train.views=0",
        "data.workers=2",
        "data.height=512",
        "data.width=512",
        "--run",
        "run",
    ]
    began = time.monotonic()
    starved = faults.run(tmp_path, *words, prepare=little_shared_memory)
    assert starved.wait() == 2 and "/dev/shm" in starved.error and "lower data.workers" in starved.error
    assert time.monotonic() - began < 60


def parent_of(process: str) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


# No network


def get_backbone(folder: Path, name: str, endpoint: str, **environment: str):
    words = [*words_of(folder), f"model.backbone={name}", "train.steps=1", "--run", "run"]
    own = {"HF_HOME": str(folder / "hub"), "SETLIB_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    own |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    began = time.monotonic()
    ended = faults.outside(folder, *words, **(own | environment))
    assert ended.returncode == 2 and ended.stderr.count("error: ") == 1, ended.stderr
    return ended.stderr.partition("error: ")[2], time.monotonic() - began


CONFIG = json.dumps({"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1})
WEIGHTS = struct.pack("<Q", 64) + b" " * 64 + bytes(200_000)


def hub(sent: int | None):
    """A hub whose weights are cut off after some bytes."""

    def answer(handler):
        named = {"X-Repo-Commit": "a" * 40, "ETag": '"' + "b" * 40 + '"'}
        if handler.path.endswith("/config.json"):
            handler.send(CONFIG.encode(), "application/json", **named)
        elif handler.path.endswith("/model.safetensors"):
            handler.send(WEIGHTS, "application/octet-stream", sent, **(named | {"ETag": '"' + "c" * 64 + '"'}))
        elif handler.path == "/":
            handler.send(b"")
        else:
            handler.send_error(404)

    return answer


@pytest.mark.reliability
@pytest.mark.parametrize("how", ["none", "page", "cut"])
def test_a_bad_network_is_one_sentence_and_no_storm(tmp_path, how):
    if how == "none":
        error, _ = get_backbone(tmp_path, "facebook/dinov2-small", "http://127.0.0.1:9")
        assert "does not answer" in error
        return
    page = lambda handler: handler.send(network.PAGE)  # noqa: E731
    with network.serve(page if how == "page" else hub(sent=50_000)) as server:
        error, seconds = get_backbone(tmp_path, "facebook/dinov2-small", server.url)
    assert "facebook/dinov2-small cannot be loaded from" in error and seconds < 120
    assert len(server.asked) < 60, server.asked
    assert not [path for path in (tmp_path / "hub").rglob("*.safetensors") if path.exists()], (
        "a half file counts as whole"
    )
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.reliability
@pytest.mark.parametrize("how", ["none", "page", "cut", "other"])
def test_a_package_index_that_fails_leaves_no_half_backbone(tmp_path, how):
    with network.index(tmp_path / "index", sent=10_000 if how == "cut" else None) as (url, sha256, server):
        if how == "page":
            server.answer = lambda handler: handler.send(network.PAGE)
        url = "http://127.0.0.1:9" if how == "none" else url
        own = partial(network.use_index, url, sha256 if how != "other" else "0" * 64)
        words = [*words_of(tmp_path), "model.backbone=dinov2-small-saliency", "--run", "run"]
        cut = faults.run(tmp_path, *words, prepare=own)
        assert cut.wait() == 2 and "dinov2-small-saliency" in cut.error, cut.output
        assert not faults.visible(tmp_path / "cache") and len(server.asked) < 20
