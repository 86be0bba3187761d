"""Run folders: one configuration each, whatever changes no number may change, JSON and figures written whole."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from setlib.experiment import PROFILES, Experiment
from setlib.run import Run, default_run_folder

SMOKE = PROFILES["smoke"]


def test_a_folder_refuses_another_configuration(tmp_path):
    Run.open(tmp_path, SMOKE)
    assert Run.open(tmp_path, SMOKE).experiment == Run.load(tmp_path).experiment == SMOKE
    Run.open(tmp_path, SMOKE.override("seed=2"))  # nothing was made yet: a mistake can be mended
    Run.open(tmp_path, SMOKE).write_json("results/x.json", {})
    with pytest.raises(ValueError, match="holds another configuration .seed is 0, not 3"):
        Run.open(tmp_path, SMOKE.override("seed=3"))


SAME_NUMBERS = ["data.on_error=skip", "train.checkpoint_every=1", "data.workers=1", "train.checkpointing=true"]


@pytest.mark.parametrize("option", SAME_NUMBERS)
def test_what_changes_no_number_already_made_may_change_when_a_run_goes_on(option, tmp_path):
    Run.open(tmp_path, SMOKE).write_json("metrics.json", {})
    again = SMOKE.override(option)
    assert Run.load(Run.open(tmp_path, again).path).experiment == again


def test_one_folder_is_one_folder_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds").mkdir()
    for number, text in enumerate(("folder@{}", "camvid:day@{}~noise3", "hub:{}")):
        first = Experiment.build("smoke", text.format("ds"), [text.format("ds/")])
        run = Run.open(tmp_path / f"run{number}", first)
        run.write_json("metrics.json", {})
        for folder in ("ds/", "./ds", str(tmp_path / "ds")):
            Run.open(run.path, Experiment.build("smoke", text.format(folder), [text.format("ds")]))
        with pytest.raises(ValueError, match="holds another configuration .data.source is"):
            Run.open(run.path, Experiment.build("smoke", text.format("other"), [text.format("ds")]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run folder .no experiment.json.: python -m setlib run --run .* makes it"),
        ("{", "cannot be read .*: delete the folder or restore the file"),
        ('{"profile": "smoke", "colour": 1}', "not one of this version"),
    ],
)
def test_what_is_missing_or_broken_is_one_sentence(tmp_path, content, message):
    if content:
        (tmp_path / "experiment.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Run.load(tmp_path)


def test_a_folder_of_an_older_version_opens_and_goes_on(tmp_path):
    """What it does not say has its default; options that changed no result are passed over; one rate for all."""
    values = SMOKE.to_dict()
    values["train"] |= {"shard": False, "compile": True, "cache_gb": 4.0}
    del values["inference"], values["model"]["head"], values["train"]["refiner_rates"]
    (tmp_path / "experiment.json").write_text(json.dumps(values))
    (tmp_path / "metrics.json").write_text("{}")
    Run.open(tmp_path, SMOKE.override("train.refiner_rates="))


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write"):
        Run.open(tmp_path / "file" / "run", SMOKE)


def test_default_folder_names_what_differs():
    experiment = Experiment.build("quick", source="camvid:day-train@x/y", seed=2, overrides=["model.refiner=rein"])
    assert default_run_folder(experiment).name == "quick-camvid-day-train-rein-seed2"
    assert default_run_folder(SMOKE).name == "smoke" and default_run_folder(SMOKE).parent.name == "runs"


def test_json_takes_numpy_and_writes_nan_as_null(tmp_path):
    run = Run.open(tmp_path, SMOKE)
    run.write_json("results/x.json", {"a": np.float32(0.5), "b": [float("nan"), np.int64(3)], "c": np.arange(2)})
    assert run.read_json("results/x.json") == {"a": 0.5, "b": [None, 3], "c": [0, 1]}
    with pytest.raises(ValueError, match="y.json is missing: run the notebook or command that writes it first"):
        run.read_json("results/y.json")
    assert run.finish("04", {"miou": 5})["seed"] == 0
    assert run.read_json("results/04.json").keys() == {"miou", "profile", "seed", "peak_bytes"}


def test_a_figure_that_is_left_out_leaves_no_file(tmp_path):
    run, figure = Run.open(tmp_path, SMOKE), Figure()
    assert run.save_figure(figure, "04_x") is figure and (tmp_path / "figures" / "04_x.png").is_file()
    assert run.save_figure(None, "04_x") is None and list((tmp_path / "figures").iterdir()) == []
