"""The dry run: what a training needs is told, what is missing is named, nothing is trained, fetched or written."""

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from setlib import __main__ as cli
from setlib.bench import gpu, measure, needs
from setlib.experiment import Experiment

sys.path.append(str(Path(__file__).parents[1] / "data"))
from test_layouts import SETS, make  # noqa: E402

SMALL = ["-o", "train.steps=40", "data.height=32", "data.width=64", "data.long_edge=64"]


def dry(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main([*words, "--dry"])
    said = capsys.readouterr()
    return code, said.out, said.err


def at_once(monkeypatch, memory: float = 1e9, learns: float = 1e8) -> None:
    """A step is not taken: it needs so much, and a second."""
    monkeypatch.setattr(needs, "FRESH", partial(ThreadPoolExecutor, 1))
    monkeypatch.setattr(needs, "one_step", lambda _: {"seconds": 1.0, "memory": memory, "learns": learns})


@pytest.fixture
def sets(tmp_path, monkeypatch) -> Path:
    """The trees of the paper's benchmarks, three pictures each, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for text in ("gtav", "cityscapes:val", "cityscapes:train", "bdd100k:val", "mapillary:val", "acdc:night-val"):
        make(tmp_path / text.partition(":")[0], *SETS[text])
    return tmp_path


def test_a_training_on_the_papers_trees_is_told_and_nothing_is_written(sets, capsys):
    before = sorted(sets.rglob("*"))
    targets = ["cityscapes:val@cityscapes", "bdd100k:val@bdd100k", "mapillary:val@mapillary", "acdc:night-val@acdc"]
    words = ["train", "--profile", "smoke", "--run", "run", "--source", "gtav@gtav", "--target", *targets]
    code, told, _ = dry(capsys, *words, *SMALL)
    assert code == 0 and sorted(sets.rglob("*")) == before
    for text in ("gtav@gtav", *targets):
        assert any(line.startswith(text) and "3 pictures" in line for line in told.splitlines()), told
    rows = {line.split()[0]: line for line in told.splitlines() if line.strip()}
    assert "on this machine" in rows["tiny-random"] and "40 steps x 1: " in rows["set"] and "s a step" in rows["set"]
    assert rows["memory"].count("GB") == rows["disk"].count("GB") == 2


def test_what_is_missing_is_named_and_the_rest_is_told(sets, capsys, monkeypatch):
    at_once(monkeypatch)
    words = ["train", "--profile", "paper", "--source", "gtav@nowhere", "--target", "cityscapes:val@cityscapes"]
    code, told, error = dry(capsys, *words)
    assert code == 1 and "gtav@nowhere': folder nowhere does not exist" in error and "facebook/dinov2-large" in error
    assert "1.22 GB are fetched; licence: Apache-2.0" in told and "cannot be used" in told
    assert "40,000 steps x 1: 11:06:40" in told and "3 pictures" in told


def test_a_backbone_that_nobody_knows_is_not_fetched(sets, capsys, monkeypatch):
    monkeypatch.setattr(needs, "hub_answers", lambda address: True)
    code, told, error = dry(capsys, "train", "--profile", "smoke", *SMALL, "model.backbone=nobody/none")
    assert code == 1 and "not here" in told and "steps in all" not in told
    assert error == "error: nobody/none is not on this machine: fetch it first, then what it needs can be told.\n"


REFUSED = [
    ("train", ["train.refiner_rates=nope=0.1"], "Unknown refiner 'nope'"),
    ("train", ["model.refiner=nope"], "Unknown refiner 'nope'"),
    ("train", ["train.batch_size=3", "train.accumulate=2"], "train.batch_size (3) must be a multiple of 2"),
    ("train", ["train.batch_size=2", "train.accumulate=3"], "train.batch_size (2) must be a multiple of 3"),
    ("train", ["data.eval_edges=nope=960"], "unknown data set 'nope'"),
    ("train", ["train.validate_every=2", "train.validate_on=gtav:val@nowhere"], "folder nowhere does not exist"),
    ("ablate", ["ablation.variants=none,none"], "has 'none' twice"),
    ("ablate", ["ablation.variants=none,set data.source=scenes:fog"], "which all variants must share"),
]


@pytest.mark.parametrize(("command", "options", "message"), REFUSED)
def test_what_a_start_refuses_is_refused(sets, capsys, monkeypatch, command, options, message):
    own = needs.one_step
    at_once(monkeypatch)
    if "must be a multiple" in message:  # which a step says
        monkeypatch.setattr(needs.constants, "HF_HUB_OFFLINE", False)  # and put back
        monkeypatch.setattr(needs, "one_step", own)
    words = [command, "--profile", "smoke", "--run", "run", *SMALL, *options]
    code, _, error = dry(capsys, *words)
    assert code == 1 and message in error and not (sets / "run").exists()
    assert cli.main(words) == 2 and message in capsys.readouterr().err


def test_a_folder_of_another_configuration_and_a_file_stand_in_the_way(sets, trained, capsys, monkeypatch):
    at_once(monkeypatch)
    before = sorted((path, path.stat().st_mtime_ns) for path in trained.path.rglob("*"))
    code, _, error = dry(capsys, "train", "--profile", "smoke", "--run", str(trained.path), "--seed", "77", *SMALL)
    assert code == 1 and "holds another configuration" in error
    assert sorted((path, path.stat().st_mtime_ns) for path in trained.path.rglob("*")) == before
    (sets / "file").touch()
    code, _, error = dry(capsys, "train", "--profile", "smoke", "--run", "file", *SMALL)
    assert code == 1 and "file cannot be made or written" in error


def test_memory_and_disk_that_are_not_there_stand_in_the_way(sets, capsys, monkeypatch):
    at_once(monkeypatch, memory=9e15, learns=9e15)
    code, _, error = dry(capsys, "train", "--profile", "smoke", *SMALL)
    assert code == 1 and "memory: 9000000.00 GB are needed" in error and "disk: " in error


def test_an_ablation_counts_all_its_trainings(sets, capsys, monkeypatch):
    at_once(monkeypatch)
    words = ["ablate", "--profile", "smoke", "--source", "gtav@gtav", "--target", "cityscapes:val@cityscapes", *SMALL]
    options = ["ablation.variants=none,set", "ablation.seeds=0,1,2", "ablation.overrides=train.steps=20"]
    code, told, _ = dry(capsys, *words, *options)
    assert code == 0 and told.count("20 steps x 3: ") == 2 and not (sets / "runs").exists()


def test_the_study_for_a_gpu_runs_small_and_tells_all_in_one_file(tmp_path, capsys):
    tiny = [
        "model.backbone=tiny-random",
        "model.refined_layers=3,4",
        "model.feature_layers=1,2,3,4",
        "train.views=8",
        "data.train_images=4",
    ]
    small = [*SMALL, *tiny, "train.steps=1", "ablation.seeds=0", "ablation.overrides=data.eval_images=1"]
    transfers = "ablation.transfers=scenes:game -> scenes:night,scenes:snow -> scenes:fog"
    words = ["ablate", "--profile", "gpu-10min", "--run", str(tmp_path), *small, "train.warmup=0", transfers]
    assert cli.main(words) == 0 and "set-style" in capsys.readouterr().out
    rows = json.loads((tmp_path / "ablation" / "differences.json").read_text())
    assert {(row["variant"], row["domain"].partition(" ->")[0]) for row in rows} == {
        (variant, source) for variant in ("rein", "set", "set-style") for source in ("scenes:game", "scenes:snow")
    }
    asked = Experiment.build("gpu-10min")
    assert (asked.train.steps, len(asked.ablation.seeds), asked.model.backbone) == (3000, 5, "dinov2-small-saliency")
    assert [source for source, _ in asked.transfers] == ["scenes:game", "camvid:day-train@camvid"]


@pytest.mark.parametrize("options", [(), ("train.views=0", "train.accumulate=2"), ("model.backbone=dinov2-small",)])
def test_a_step_has_its_numbers(options, monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(needs.constants, "HF_HUB_OFFLINE", False)  # and put back
    if "dinov2" in str(options):
        options += ("data.height=28", "data.width=28", "model.feature_layers=", "model.refined_layers=")
    found = needs.one_step(Experiment.build("smoke", overrides=["train.batch_size=2", *options]))
    assert set(found) == {"seconds", "memory", "learns"} and min(found.values()) >= 0
    assert found["seconds"] > 0 and found["learns"] > 1000


def test_random_numbers_of_the_users_stay_as_they_were(sets):
    import setlib

    def states() -> list:
        return [torch.get_rng_state().tolist(), random.getstate(), *map(str, np.random.get_state())]

    before = states()
    setlib.train(setlib.Run.open("run", Experiment.build("smoke", overrides=["train.steps=2"])), progress=False)
    gpu.backbone.cache_clear()
    gpu.compared("set", "model.head=per-pixel")
    gpu.paper_step("step", "S", "rein", 1, 64)
    measure.refiner_step("set", (1, 2, 3, 8))
    assert states() == before
