"""Killed at any moment, a command that is given again ends with the bits of one that was never killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import faults
import network
import pytest
from faults import SMALL, Command
from safetensors import safe_open

STEPS = ("train.steps=8", "train.views=4", "train.checkpoint_every=2")
ABLATION = ("ablation.variants=none,set", "ablation.seeds=0", "ablation.overrides=train.steps=3")


def domain_of(folder: Path, count: int = 4, size: tuple[int, int] = (64, 32)) -> str:
    """The domain beside the folder that a command is started in, made once."""
    path = folder.parent / "domain"
    return f"folder@{path}" if path.exists() else faults.make_domain(path, count, size)


def train(folder: Path, *options: str, **more) -> Command:
    source = domain_of(folder)
    words = ["train", "--profile", "smoke", "--run", "run", "--source", source, "--target", source]
    return Command(folder, *words, "-o", *SMALL, *STEPS, *options, **more)


def ablate(folder: Path, *options: str) -> Command:
    source = domain_of(folder)
    words = ["ablate", "--profile", "smoke", "--run", "run", "--source", source, "--target", source]
    return Command(folder, *words, "-o", *SMALL, "train.views=4", *ABLATION, *options)


def evaluate(folder: Path) -> Command:
    if not (folder / "run").exists():
        shutil.copytree(folder.parent / "trained" / "run", folder / "run")
    return Command(folder, "evaluate", "run", "--target", domain_of(folder), "scenes:fog", "-o", "data.eval_images=3")


def prepare(folder: Path, **more) -> Command:
    return Command(folder, "prepare", domain_of(folder, 20, (128, 64)), "--out", "out", "--short-edge", 32, **more)


def render(folder: Path) -> Command:
    return Command(folder, "check", "scenes:fog@scenes", "--profile", "smoke", "-o", "data.eval_images=20", *SMALL)


def premise(folder: Path) -> Command:
    words = ["premise", "--profile", "smoke", "--run", "run", "--layouts", 3, "--places", 1]
    return Command(folder, *words, "-o", *SMALL)


PATHS = {
    "train": (train, "run"),
    "train with two workers": (lambda folder: train(folder, "train.views=0", "data.workers=2"), "run"),
    "evaluate": (evaluate, "run"),
    "ablate": (ablate, "run"),
    "ablate with two workers": (lambda folder: ablate(folder, "train.views=0", "data.workers=2"), "run"),
    "prepare": (prepare, "out"),
    "scenes": (render, "scenes"),
    "premise": (premise, "run/premise"),
}


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        *((name, 1) for name in ("train", "train with two workers", "evaluate", "ablate", "prepare")),
        *(pytest.param(name, 8 if name == "premise" else 20, marks=pytest.mark.reliability) for name in PATHS),
    ],
)
def test_at_random_moments(tmp_path, name, kills):
    make, kept = PATHS[name]
    if name == "evaluate":
        (tmp_path / "trained").mkdir()
        assert train(tmp_path / "trained").end() == 0
    assert faults.survive(make, kept, tmp_path, kills, random.Random(kills)) >= kills


@pytest.mark.parametrize("kills", [pytest.param(6, marks=pytest.mark.reliability)])
def test_while_the_backbone_is_fetched(tmp_path, kills):
    with network.index(tmp_path / "index") as (url, sha256, _):
        own = partial(network.use_index, url, sha256)

        def fetch(folder):
            return train(folder, "model.backbone=dinov2-small-saliency", "train.steps=1", prepare=own)

        assert faults.survive(fetch, "cache", tmp_path, kills, random.Random(0)) >= kills
        left = [path for path in (tmp_path / "place" / "cache").iterdir() if path.is_dir()]
        assert [path.name for path in left] == ["dinov2-small-saliency"]  # what a killed fetch left is gone


# At every write


def die_at(number: int) -> None:
    """Lets this process kill itself before it opens, renames or removes a file in its folder for the nth time."""
    here, count = os.getcwd(), 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if (writes or event in ("os.rename", "os.remove")) and str(os.path.abspath(arguments[0])).startswith(here):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.reliability
@pytest.mark.parametrize(("make", "kept"), [(train, "run"), (prepare, "out")])
def test_at_every_write(tmp_path, make, kept):
    (tmp_path / "whole").mkdir()
    assert make(tmp_path / "whole").end() == 0
    expected, number = faults.digest(tmp_path / "whole" / kept), 0
    code = None
    while code != 0:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        command = make(folder, prepare=partial(die_at, number))
        code = command.end()
        assert code in (0, -signal.SIGKILL), command.output
        faults.check_whole(folder / kept)
        last = make(folder)
        assert last.end() == 0, last.output
        found = {name.replace(str(folder), ""): value for name, value in faults.digest(folder / kept).items()}
        differing = {name for name in {*found, *expected} if found.get(name) != expected.get(name)}
        assert differing <= {"prepared.json"}, f"killed before write {number}"  # it names its folder
        assert not list((folder / kept).rglob(".*.safetensors.*")), "a part of a file is left"
        shutil.rmtree(folder)
    assert number > 15


# Asked to stop

LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0".split()
LAUNCH += "--mixed_precision no --dynamo_backend no".split()
LONG = ("train.steps=300", "train.checkpoint_every=100000", "train.views=4")


WITH_WORKERS = pytest.param(("train.views=0", "data.workers=2"), marks=pytest.mark.reliability, id="two workers")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [(), WITH_WORKERS])
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(tmp_path, kind, options):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    command = train(tmp_path / "cut", *LONG, *options)
    command.wait_for(", loss=")
    command.kill(kind, group=True)
    assert command.end() == 130
    assert "python -m setlib train --profile smoke --run run" in command.error
    assert (tmp_path / "cut" / "run" / "checkpoint.safetensors").is_file()
    again = train(tmp_path / "cut", *LONG, *options)
    assert again.end() == 0 and "goes on after step" in again.output
    assert train(tmp_path / "whole", *LONG, *options).end() == 0
    assert faults.digest(tmp_path / "cut" / "run") == faults.digest(tmp_path / "whole" / "run")


@pytest.mark.reliability
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_of_one_training_stop_together(tmp_path, kind):
    """A batch system asks the launcher to stop, which asks its processes one after the other."""
    (tmp_path / "run").mkdir()
    words = [sys.executable, *LAUNCH, "-m", "setlib", "train", "--profile", "smoke", "--run", "run"]
    words += ["--source", faults.make_domain(tmp_path / "domain"), "-o", *SMALL, *LONG, "train.steps=20000"]
    place = {
        "cwd": tmp_path,
        "env": os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    }
    with (tmp_path / "log").open("w") as log:
        launched = subprocess.Popen(words, stdout=log, stderr=log, **place)
    try:
        while ", loss=" not in (tmp_path / "log").read_text() and launched.poll() is None:
            time.sleep(0.1)
        launched.send_signal(kind)
        launched.wait(60)
    finally:
        launched.kill()
    told = (tmp_path / "log").read_text()
    assert told.count("error: stopped; what is finished is kept; go on with") == 2, told
    with safe_open(tmp_path / "run" / "checkpoint.safetensors", "np") as saved:
        step = int(saved.metadata()["step"])
    assert step == len((tmp_path / "run" / "history.jsonl").read_bytes().splitlines()) > 0


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(tmp_path, kind):
    (tmp_path / "place").mkdir()
    slow = ("train.batch_size=512", "train.accumulate=256", "train.views=0")  # many short calls: none can be cut
    command = train(tmp_path / "place", *slow)
    command.wait_for("step/s")
    time.sleep(1)
    command.kill(kind)
    time.sleep(0.3)
    assert command.process.exitcode is None, "the step should take longer"
    command.kill(kind)
    assert command.wait(2) in (130, -kind)
    faults.check_whole(tmp_path / "place" / "run")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_any_other_command_stops_at_once_and_says_how_to_go_on(tmp_path, kind):
    (tmp_path / "place").mkdir()
    words = ["check", "scenes:fog@scenes", "--profile", "smoke", "-o", "data.eval_images=400"]
    command = Command(tmp_path / "place", *words)
    command.wait_for("render fog")
    command.kill(kind)
    assert command.wait(10) == 130 and "python -m setlib check scenes:fog@scenes" in command.error
    faults.check_whole(tmp_path / "place" / "scenes")
