"""Two processes against one: the same losses, the same tables. Started as a user starts them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from setlib import __main__ as cli
from setlib import distributed
from setlib.run import Run
from setlib.training import read_history

LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0".split()
LAUNCH += "--mixed_precision no --dynamo_backend no".split()
COMMANDS = """import json, sys
from setlib import __main__ as cli
sys.exit(max(cli.main(words) for words in json.loads(sys.argv[1])))"""
MASKS = "train.steps=12 model.head=mask2former model.head_channels=32 model.pixel_layers=1 model.pixel_width=48"
MASKS += " model.decoder_layers=2 model.decoder_width=64"
SETTINGS = {
    "per-pixel": "train.steps=12 train.validate_every=6 data.eval_images=3",
    "mask2former": f"{MASKS} model.refiner=none",
    "linked": f"{MASKS} model.refiner=set",
    "fresh": "train.steps=4 train.views=0 train.validate_every=2 data.eval_images=3 train.mix=1 train.mix_layer=3",
}
# of the loss: where a mask head draws points by values, or queries nearly alike compete, rounding can move a choice
ROUNDING = {"per-pixel": 0.0, "mask2former": 1e-5, "linked": 1e-4, "fresh": 0.0}


def launch(*words):
    """A program in two processes; its output. A hang is an error."""
    done = subprocess.run([sys.executable, *LAUNCH, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{setting: (run of one process, run of two)}; the two are started once for all settings."""
    folder, commands = tmp_path_factory.mktemp("processes"), []
    for name, options in SETTINGS.items():
        words = ["train", "--profile", "smoke", "-o", "train.batch_size=4", *options.split()]
        assert cli.main([*words, "--run", str(folder / f"{name}-1")]) == 0
        commands.append([*words, "--run", str(folder / f"{name}-2")])
    (folder / "commands.py").write_text(COMMANDS)
    printed = launch(str(folder / "commands.py"), json.dumps(commands))
    assert printed.count("Score it with") == len(SETTINGS)  # one process speaks
    return {name: [Run.load(folder / f"{name}-{count}") for count in (1, 2)] for name in SETTINGS}


@pytest.mark.first
def test_losses_and_validation_are_equal(trained):
    for name, runs in trained.items():
        one, two = (read_history(run) for run in runs)
        assert len(one) == len(two) > 0
        losses = [[entry["loss"] for entry in history] for history in (two, one)]
        np.testing.assert_allclose(*losses, rtol=ROUNDING[name], atol=1e-4, err_msg=name)
        scores = [[e["source_miou"] for e in history if "source_miou" in e] for history in (one, two)]
        assert len(scores[0]) == 2 * (name in ("per-pixel", "fresh"))
        np.testing.assert_allclose(scores[1], scores[0], atol=0.1, err_msg=name)  # weights differ by rounding


@pytest.mark.first
def test_the_table_is_the_same(trained):
    run = trained["per-pixel"][0]
    words = ["evaluate", str(run.path), "--target", "scenes:night", "scenes:fog", "-o", "data.eval_images=3"]
    assert cli.main(words) == 0
    expected = json.loads((run.path / "metrics.json").read_text())
    (run.path / "metrics.json").unlink()
    assert launch("-m", "setlib", *words).count("scenes:fog") == 1
    assert json.loads((run.path / "metrics.json").read_text()) == expected


def test_the_group_is_left_before_the_process_ends(monkeypatch):
    """A thread of it that still ran would abort the process: one evaluation in ten ended so."""
    registered = []
    monkeypatch.setattr(distributed.atexit, "register", registered.append)
    distributed.state.cache_clear()
    left = distributed.state()
    assert distributed.state() is left and registered == [left.destroy_process_group]


@pytest.mark.parametrize(
    ("variable", "value", "command", "words"),
    [
        ("WORLD_SIZE", "2", "run --profile smoke", "accelerate launch is for train and evaluate"),
        ("WORLD_SIZE", "2", "backbones", "accelerate launch is for train and evaluate"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train --profile smoke --run {}", "train.precision=bfloat16"),
        ("ACCELERATE_USE_FSDP", "true", "train --profile smoke --run {}", "without accelerate's FSDP"),
    ],
)
def test_what_is_not_for_several_processes_says_so(monkeypatch, tmp_path, capsys, variable, value, command, words):
    monkeypatch.setenv(variable, value)
    assert cli.main(command.format(tmp_path).split()) == 2
    assert words in capsys.readouterr().err
