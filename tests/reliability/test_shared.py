"""Two processes with one folder: the second waits or is refused by name, and nothing is mixed."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import faults
import network
import pytest
from faults import SMALL, Command

TRAINING = ("train.steps=60", "train.views=4", "train.checkpoint_every=1")


def words_of(folder: Path, command: str = "train", *options: str) -> list[str]:
    path = folder / "domain"
    source = f"folder@{path}" if path.exists() else faults.make_domain(path, 12)
    return [command, "--profile", "smoke", "--source", source, "--target", source, "-o", *SMALL, *options]


ABLATION = ("ablation.variants=none,set", "ablation.seeds=0", "ablation.overrides=train.steps=20", "train.views=4")


@pytest.mark.parametrize(("command", "options"), [("train", TRAINING), ("ablate", ABLATION)])
def test_two_in_one_run_folder(tmp_path, command, options):
    words = words_of(tmp_path, command, *options)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert faults.run(tmp_path / "one", *words, "--run", "run").wait() == 0
    both = [Command(tmp_path / "two", *words, "--run", "run") for _ in range(2)]
    codes = sorted(one.end() for one in both)
    assert codes in ([0, 0], [0, 2]), [one.output for one in both]
    for refused in (one for one in both if one.wait()):
        assert "is in use by process" in refused.error
    assert faults.digest(tmp_path / "two" / "run") == faults.digest(tmp_path / "one" / "run")


def test_a_folder_is_kept_to_its_process_and_free_when_that_is_gone(tmp_path):
    words = words_of(tmp_path, "train", "train.steps=4000", "train.views=4", "train.checkpoint_every=1")
    first = Command(tmp_path, *words, "--run", "run")
    first.wait_for("step/s")
    refused = faults.run(tmp_path, *words, "train.checkpoint_every=5", "--run", "run")
    assert refused.wait() == 2 and f"run is in use by process {first.process.pid}" in refused.error
    first.kill()
    first.wait()
    again = Command(tmp_path, *words, "--run", "run")
    again.wait_for("goes on after step")
    again.kill()


def test_two_configurations_are_not_mixed(tmp_path):
    words = words_of(tmp_path, "train", "train.steps=20000", "train.views=4", "train.checkpoint_every=20000")
    first = Command(tmp_path, *words, "--run", "run", "--seed", 0)
    first.wait_for(", loss=")
    stored = (tmp_path / "run" / "experiment.json").read_bytes()
    assert faults.run(tmp_path, *words, "--run", "run", "--seed", 1).wait() == 2  # nothing is saved yet, but it runs
    assert (tmp_path / "run" / "experiment.json").read_bytes() == stored
    first.kill(signal.SIGINT)
    assert first.end() == 130
    refused = faults.run(tmp_path, *words, "--run", "run", "--seed", 1)
    assert refused.wait() == 2 and "another configuration (seed is 0, not 1)" in refused.error


@pytest.mark.parametrize(
    "command", ["check scenes:fog@place --profile smoke", "prepare {} --out place --short-edge 16"]
)
def test_two_that_fill_one_folder_of_pictures(tmp_path, command):
    domain, made = faults.make_domain(tmp_path / "domain", 12), {}
    words = [*command.format(domain).split(), "-o", "data.eval_images=12", *SMALL]
    for name, number in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        both = [Command(tmp_path / name, *words) for _ in range(number)]
        assert {one.end() for one in both} <= {0, 2} and any(one.wait() == 0 for one in both)
        assert all("is in use by process" in one.error for one in both if one.wait())
        made[name] = faults.digest(tmp_path / name / "place")
    assert made["one"] == made["two"]


@pytest.mark.reliability
def test_two_that_fetch_one_backbone(tmp_path):
    words = words_of(tmp_path, "train", "model.backbone=dinov2-small-saliency", "train.steps=1", "train.views=4")
    with network.index(tmp_path / "index") as (url, sha256, server):
        own = partial(network.use_index, url, sha256)
        both = [Command(tmp_path, *words, "--run", name, prepare=own) for name in ("one", "two")]
        assert [one.end() for one in both] == [0, 0], [one.output for one in both]
        assert len([path for path in server.asked if path.endswith(".whl")]) == 1, "the second waits for the first"
    models = [faults.digest(tmp_path / name / "model") for name in ("one", "two")]
    assert models[0]["model.safetensors"] == models[1]["model.safetensors"]
