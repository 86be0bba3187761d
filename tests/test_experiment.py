"""Configuration and run folders: overrides, errors, files written whole or not at all."""

import json
import os

import numpy as np
import pytest

from setlib.experiment import PROFILES, Experiment
from setlib.files import nearest, write_atomic
from setlib.plots import charts as plots
from setlib.run import Run, default_run_folder


@pytest.mark.parametrize("profile", ["smoke", "quick"])
def test_experiment_survives_json(profile):
    experiment = Experiment.build(profile, overrides=["model.refined_layers=1,2", "train.learning_rate=3e-4", "seed=7"])
    assert experiment.model.refined_layers == (1, 2)
    assert experiment.seed == 7
    assert Experiment.from_dict(json.loads(json.dumps(experiment.to_dict()))) == experiment


def test_domains_with_commas_survive_json():
    experiment = Experiment.build("smoke", targets=["folder@a,b"])
    assert Experiment.from_dict(experiment.to_dict()).data.targets == ("folder@a,b",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.refinr=rein", "Unknown option 'model.refinr' .nearest: model.refiner"),
        ("train.steps=many", "train.steps expects int, not 'many'"),
        ("train.steps=0", "train.steps must be above 0"),
        ("train.views=-1", "train.views must not be negative"),
        ("train.learning_rate=nan", "train.learning_rate must be a number"),
        ("train.learning_rate=0", "train.learning_rate must be above 0"),
        ("data.scale_max=inf", "data.scale_max must be a number"),
        ("train.power=nan", "train.power must be a number"),
        ("seed=18446744073709551616", "seed must be a number"),
        ("ablation.seeds=-1", "ablation.seeds must not be negative"),
        ("ablation.variants=", "ablation.variants is empty"),
        ("ablation.overrides=train.stpes=5", "Unknown option 'train.stpes'"),
        ("ablation.overrides=train.steps=0", "train.steps must be above 0"),
        ("train.ema=1", "train.ema must lie in"),
        ("model.num_tokens=1", "at least 2"),
        ("data.scale_max=0.1", "below data.scale_min"),
        ("model.refiner", "is not KEY=VALUE"),
        ("model.any_batch=maybe", "model.any_batch expects bool, not 'maybe'"),
        ("profile=paper", "Unknown option 'profile'"),
    ],
)
def test_bad_override_is_one_sentence(override, message):
    with pytest.raises(ValueError, match=message):
        Experiment.build("smoke", overrides=[override])


def test_an_override_of_the_ablation_may_be_a_list():
    text = "ablation.overrides=train.steps=5,model.refined_layers=1,2"
    experiment = Experiment.build("smoke", overrides=[text])
    assert experiment.ablation.overrides == ("train.steps=5", "model.refined_layers=1,2")
    assert experiment.override(*experiment.ablation.overrides).model.refined_layers == (1, 2)


def test_unknown_profile_names_the_profiles():
    with pytest.raises(ValueError, match="smoke, quick, paper"):
        Experiment.build("quik")


def test_paper_profile_asks_for_domains():
    with pytest.raises(ValueError, match="--source"):
        Experiment.build("paper")
    experiment = Experiment.build("paper", source="folder@x", targets=["folder@y"])
    assert experiment.train.steps == 40_000
    assert experiment.model.patch_size == 16 and experiment.data.height == experiment.data.width == 512


def test_run_folder_refuses_another_configuration(tmp_path):
    Run.open(tmp_path / "run", Experiment.build("smoke"))
    assert Run.open(tmp_path / "run", Experiment.build("smoke")).experiment == PROFILES["smoke"]
    Run.open(tmp_path / "run", Experiment.build("smoke", seed=2))  # nothing was made yet: a mistake can be mended
    Run.open(tmp_path / "run", Experiment.build("smoke")).write_json("results/x.json", {})
    for option in ("train.checkpointing=true", "data.workers=2"):  # cost time or memory only
        Run.open(tmp_path / "run", Experiment.build("smoke", overrides=[option]))
    with pytest.raises(ValueError, match="holds another configuration .seed is 0, not 3"):
        Run.open(tmp_path / "run", Experiment.build("smoke", seed=3))


def test_run_load_says_what_is_missing_or_broken(tmp_path):
    with pytest.raises(ValueError, match="no run folder"):
        Run.load(tmp_path)
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Run.load(tmp_path)
    (tmp_path / "experiment.json").write_text('{"profile": "smoke", "colour": 1}')
    with pytest.raises(ValueError, match="not one of this version"):
        Run.load(tmp_path)


def test_default_folder_names_what_differs():
    experiment = Experiment.build("quick", source="camvid:day-train@x/y", seed=2, overrides=["model.refiner=rein"])
    assert default_run_folder(experiment).name == "quick-camvid-day-train-rein-seed2"


def test_write_atomic_leaves_nothing_half_written(tmp_path, monkeypatch):
    target = tmp_path / "file.json"
    write_atomic(target, "old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(ValueError, match=r"Cannot write .*No space left on device"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_run_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write"):
        Run.open(tmp_path / "file" / "run", Experiment.build("smoke"))


def test_json_takes_numpy_and_writes_nan_as_null(tmp_path):
    run = Run.open(tmp_path, Experiment.build("smoke"))
    run.write_json("results/x.json", {"a": np.float32(0.5), "b": [float("nan"), np.int64(3)], "c": np.arange(2)})
    assert run.read_json("results/x.json") == {"a": 0.5, "b": [None, 3], "c": [0, 1]}


def test_files_are_readable_for_others(tmp_path):
    write_atomic(tmp_path / "file", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.head=masks", "model.head must be per-pixel or mask2former, got 'masks'"),
        ("model.head_channels=48 model.head=mask2former", "multiple of 32 and of model.attention_heads"),
        ("model.attention_heads=0", "model.attention_heads must be above 0"),
        ("train.warmup=12", r"train.warmup \(12\) must be below train.steps"),
        ("model.refiner=set-released train.validate_every=1", "set-released needs model.any_batch=true"),
        ("train.accumulate=0", "train.accumulate must be above 0"),
        ("inference.stride=0", "inference.stride above 0 and at most 1"),
        ("inference.stride=1.5", "inference.stride above 0 and at most 1"),
        ("inference.scales=", "at least one of inference.scales, none above 16"),
        ("inference.scales=1,1e9", "none above 16"),
        ("inference.scales=1,-1", "inference.scales must be above 0"),
        ("inference.windows=0", "inference.windows must be above 0"),
        ("data.eval_edges=acdc", "NAME=PIXELS"),
        ("data.eval_edges=acdc=0", "NAME=PIXELS"),
        ("data.eval_edges=acdc=-5", "NAME=PIXELS"),
    ],
)
def test_bad_options_of_head_and_inference_are_one_sentence(override, message):
    with pytest.raises(ValueError, match=message):
        Experiment.build("smoke", overrides=override.split())


def test_the_papers_profiles_have_the_released_settings():
    paper, large = (Experiment.build(name, "gtav@x", ["acdc@y"]) for name in ("paper", "paper-1024"))
    assert (paper.data.height, paper.data.width, large.data.height, large.data.width) == (512, 512, 1024, 1024)
    assert (paper.model.head, paper.model.head_channels, paper.model.num_tokens) == ("mask2former", 256, 100)
    assert paper.model.feature_layers == (8, 12, 16, 24) and paper.model.patch_size == 16
    train = paper.train
    assert (train.steps, train.batch_size, train.learning_rate, train.weight_decay) == (40_000, 4, 1e-4, 0.05)
    assert (train.power, train.clip_norm, train.views, train.ema, train.warmup) == (0.9, 0.0, 0, 0.0, 0)
    train = large.train
    assert (train.steps, train.batch_size, train.learning_rate, train.warmup) == (40_000, 8, 6e-5, 10_000)
    assert [round(e.inference.stride * e.data.width) for e in (paper, large)] == [341, 683]
    # Cityscapes 2048 x 1024, BDD 1280 x 720, Mapillary 4000 x 3000, ACDC 1920 x 1080: released test sizes
    edges = {"cityscapes": 2048, "bdd100k": 1280, "mapillary": 4000, "acdc": 1920, "folder": 700}
    assert [paper.data.edge(*pair) for pair in edges.items()] == [1024, 1280, 2000, 960, 1024]
    assert [large.data.edge(*pair) for pair in edges.items()] == [2048, 2560, 4000, 1920, 2048]


def test_what_an_older_file_does_not_say_has_its_default():
    values = Experiment.build("smoke").to_dict()
    del values["inference"], values["model"]["head"]
    assert Experiment.from_dict(values) == Experiment.build("smoke")
    with pytest.raises(ValueError, match="not one of this version"):
        Experiment.from_dict(values | {"optics": {}})
    for group, field, value in (("data", "height", "64"), ("inference", "scales", 1.0), ("train", "precision", "foo")):
        with pytest.raises(ValueError, match=f"{group}.{field}"):
            Experiment.from_dict(values | {group: values.get(group, {}) | {field: value}})


def test_an_older_file_was_trained_at_one_rate_for_all():
    values = Experiment.build("smoke").to_dict()
    del values["train"]["refiner_rates"]
    assert Experiment.from_dict(values).train.refiner_rates == ()


def test_a_file_of_an_older_version_may_name_options_that_changed_no_result():
    values = Experiment.build("smoke").to_dict()
    values["train"] |= {"shard": False, "compile": True, "cache_gb": 4.0}
    assert Experiment.from_dict(values) == Experiment.build("smoke")


@pytest.mark.parametrize("text", ["set", "set=", "set=0", "set=fast", "=0.1", "set=-1", "set:0.1"])
def test_a_refiners_rate_is_a_name_and_a_number_above_0(text):
    with pytest.raises(ValueError, match="train.refiner_rates expects NAME=RATE"):
        Experiment.build("smoke", overrides=[f"train.refiner_rates={text}"])


def test_rates_are_those_of_the_quick_profile_and_one_for_all_as_released_in_the_papers():
    assert Experiment.build("quick").train.refiner_rate("set-phase", 1.0) < 1
    for profile in ("paper", "paper-1024"):
        train = Experiment.build(profile, "gtav@x", ["acdc@y"]).train
        assert {train.refiner_rate(name, 1.0) for name in ("none", "rein", "set", "set-released")} == {1.0}


@pytest.mark.parametrize("profile", ["paper", "paper-1024"])
def test_profiles_without_domains_ask_for_them(profile):
    with pytest.raises(ValueError, match=f"Profile {profile} has no domains of its own"):
        Experiment.build(profile, source="gtav@x")


@pytest.mark.parametrize("options", [["data.on_error=skip"], ["train.checkpoint_every=1"], ["data.workers=1"]])
def test_what_changes_no_number_already_made_may_change_when_a_run_goes_on(options, tmp_path):
    Run.open(tmp_path, Experiment.build("smoke")).write_json("metrics.json", {})
    again = Experiment.build("smoke", overrides=options)
    assert Run.load(Run.open(tmp_path, again).path).experiment == again


def test_one_text_is_a_list_of_one():
    texts = Experiment.build("smoke", None, "scenes:night", None, "train.steps=3")
    assert texts == Experiment.build("smoke", targets=["scenes:night"], overrides=["train.steps=3"])
    assert Experiment.build("smoke", "", "", 0, "") == Experiment.build("smoke")


def test_a_figure_that_is_left_out_leaves_no_file(tmp_path):
    run = Run.open(tmp_path, Experiment.build("smoke"))
    figure = plots.Figure()
    assert run.save_figure(figure, "04_x") is figure and (tmp_path / "figures" / "04_x.png").is_file()
    assert run.save_figure(None, "04_x") is None and not (tmp_path / "figures" / "04_x.png").exists()


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


def test_nothing_near_is_a_sentence_too():
    assert nearest("a", []) == "known: none"
