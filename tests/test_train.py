"""The loop: what it does in ten lines, same seed same numbers, killed and resumed alike, clear failure."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from setlib import training as train
from setlib.analysis import scores as shown
from setlib.analysis.ablation import train_together
from setlib.checkpoint import build_segmenter
from setlib.data import crops
from setlib.data.crops import RandomCrops, batch_indices
from setlib.data.domains import load
from setlib.experiment import Experiment
from setlib.features import KeptCrops
from setlib.inference import predict
from setlib.run import Run
from setlib.segmenter import Segmenter

MASKS = ("model.head=mask2former", "model.head_channels=32", "model.pixel_layers=1", "model.decoder_layers=2")


def experiment(source, *overrides):
    return Experiment.build("smoke", source=source, targets=[source], overrides=overrides)


def start(folder, source, *overrides):
    """Trains a run in a folder; its model and its history."""
    return train.train(Run.open(folder, experiment(source, *overrides)), progress=False)


def losses(history):
    return [entry["loss"] for entry in history]


def same_weights(model, other):
    state = other.trainable_state()
    return all(torch.equal(tensor, state[name]) for name, tensor in model.trainable_state().items())


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the shared run."""
    shutil.copytree(trained.path, tmp_path / "run")
    return Run.load(tmp_path / "run")


# The loop itself


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("train.ema=0.5", "train.warmup=2"),
        ("train.last=3",),
        (*MASKS, "train.precision=bfloat16"),
        ("model.refiner=full",),
    ],
)
def test_the_loop_is_these_ten_lines(source, tmp_path, options):
    settings = experiment(source, "train.steps=7", *options)
    domain = load(source, settings.data, role="source")
    model = build_segmenter(settings).train()
    learns = [p for p in model.parameters() if p.requires_grad]
    average, seen = [p.detach().clone() for p in learns], []

    optimiser, crops, found = train.make_optimiser(model), KeptCrops([model], RandomCrops(domain, settings), False), []
    for step in range(settings.train.steps):
        batch = next(crops.batches([batch_indices(settings, step)]))
        images, labels, frozen = batch.to(model.device)
        train.set_learning_rate(optimiser, settings.train, step)
        optimiser.zero_grad()
        loss = model.loss(model(images, frozen), labels, seeds=train.point_seeds(settings, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learns, settings.train.clip_norm)
        optimiser.step()
        found.append(loss.item())
        for mean, value in zip(average, learns, strict=True):
            mean.lerp_(value.detach(), 1 - settings.train.ema)
        seen.append([value.detach().clone() for value in learns])
    if last := settings.train.last:
        average = [torch.stack(values).mean(0) for values in zip(*seen[-last:], strict=True)]

    trained, history = train.train(Run.open(tmp_path, settings), progress=False)
    assert losses(history) == found
    for mean, p in zip(average, (p for p in trained.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(p, mean, rtol=1e-6, atol=1e-7)


FAST = "train.learning_rate=3e-3"
SMALL = (*MASKS, "model.pixel_width=64", "model.decoder_width=64", "train.clip_norm=0")
LEARNING = [  # options, the loss at the end in units of that at the start, share of right pixels
    ((FAST,), 0.5, 0.9),
    ((FAST, "train.precision=bfloat16"), 0.6, 0.9),
    ((FAST, "data.height=61", "data.width=107", "model.patch_size=10"), 0.5, 0.9),  # does not divide into patches
    ((*SMALL, "model.refiner=none"), 0.8, 0),
    ((*SMALL, "model.refiner=set"), 0.8, 0),
]


@pytest.mark.parametrize(("options", "share", "right"), LEARNING)
def test_it_learns(source, tmp_path, options, share, right):
    model, history = start(tmp_path, source, "train.steps=40", *options)
    assert np.mean(losses(history)[-5:]) < share * np.mean(losses(history)[:3])
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    sample = load(source, model.experiment.data).sample(0)
    assert (predict(model, sample.image) == sample.label).mean() >= right


@pytest.mark.parametrize("option", ["train.checkpointing=true", "train.checkpoint_every=1"])
def test_what_saves_memory_or_work_changes_no_number(trained, tmp_path, option):
    run = Run.open(tmp_path, trained.experiment.override(option))
    assert losses(train.train(run, progress=False)[1]) == losses(trained.history)


@pytest.mark.parametrize("options", [(), ("model.refiner=full",), (*MASKS, "model.refiner=none")])
def test_a_step_in_parts_is_the_step(source, tmp_path, options):
    found = []
    for parts in (1, 2, 4):
        settings = (*options, "train.batch_size=4", "train.steps=4", f"train.accumulate={parts}")
        found.append(losses(start(tmp_path / str(parts), source, *settings)[1]))
    rounding = 1e-5 if MASKS[0] in options else 0.0  # a mask head chooses its points by values that rounding moves
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=rounding, atol=1e-4)


def test_runs_trained_together_share_crops_and_nothing_that_learns(source, tmp_path):
    """Refiners that start later, and one that changes its own copy of the backbone, beside a head alone."""
    runs, alone = {}, {}
    for name in ("none", "rein", "set", "full"):
        settings = experiment(source, "train.steps=2", f"model.refiner={name}")
        runs[name] = Run.open(tmp_path / name, settings)
        alone[name], _ = train.train(Run.open(tmp_path / f"{name} alone", settings), progress=False)
    frozen = build_segmenter(experiment(source)).backbone
    weights = frozen.state_dict()
    for name, (model, _) in train_together(runs).items():
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, alone[name].state_dict()[key], rtol=1e-4, atol=1e-6)
        changed = any(not torch.equal(value, weights[key]) for key, value in model.backbone.state_dict().items())
        assert changed == (name == "full") and model.backbone.fingerprint == frozen.fingerprint


# Killed, resumed, finished, damaged


def kill(run, monkeypatch, step):
    """Trains until a step begins, and is killed."""

    def killed(optimiser, settings, number):
        if number == step:
            raise KeyboardInterrupt
        return own(optimiser, settings, number)

    own = train.set_learning_rate
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "set_learning_rate", killed)
        train.train(run, progress=False)


RESUMED = [
    (),
    ("train.views=0",),
    ("train.ema=0.5",),
    ("train.last=3",),
    ("train.precision=bfloat16", "model.refiner=full"),
    ("train.checkpointing=true",),
    ("model.refiner=set-released", "train.precision=bfloat16"),
    MASKS,
    ("train.mix=0.5", "train.views=0"),
    ("train.mix=0.5", "train.mix_layer=3", "train.agree=1"),
]


@pytest.mark.parametrize("options", RESUMED)
def test_killed_and_resumed_is_as_never_killed(trained, tmp_path, monkeypatch, options):
    settings = trained.experiment.override(*options)
    whole, expected = train.train(Run.open(tmp_path / "whole", settings), progress=False)
    run = Run.open(tmp_path / "cut", settings)
    kill(run, monkeypatch, step=4)
    assert (run.path / "checkpoint.safetensors").is_file() and not (run.path / "model").exists()
    with (run.path / "history.jsonl").open("a") as file:  # the history is written before the checkpoint
        file.write('{"step": 4, "loss": 0, "seconds": 0}\n')
    model, history = train.train(run, progress=False)
    assert [entry["step"] for entry in history] == list(range(1, 8)) and losses(history) == losses(expected)
    assert same_weights(model, whole) and train.read_history(run) == history
    assert not (run.path / "checkpoint.safetensors").exists()


def test_resumed_without_its_history_ends_with_the_same_weights(trained, tmp_path, monkeypatch):
    run = Run.open(tmp_path, trained.experiment)
    kill(run, monkeypatch, step=3)
    (run.path / "history.jsonl").unlink()
    model, history = train.train(run, progress=False)
    assert [entry["step"] for entry in history] == [4, 5, 6, 7] and same_weights(model, trained.model)


def test_a_finished_run_is_loaded_not_trained_again(copied, trained, monkeypatch):
    monkeypatch.setattr(train, "make_optimiser", None)
    model, history = train.train(copied, progress=False)
    assert history == trained.history and same_weights(model, trained.model) and not model.training


def test_same_seed_same_numbers_and_a_run_without_its_weights_is_trained_again(copied, trained):
    weights = copied.path / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    assert losses(train.train(copied, progress=False)[1]) == losses(trained.history)
    assert weights.read_bytes() == content


@pytest.mark.parametrize("content", [b"nothing", None])
def test_a_checkpoint_that_does_not_fit_is_named(trained, tmp_path, content):
    run, path = Run.open(tmp_path, trained.experiment), tmp_path / "checkpoint.safetensors"
    path.write_bytes(content or (trained.path / "model" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="checkpoint.safetensors cannot be resumed .* delete it"):
        train.train(run, progress=False)


@pytest.mark.parametrize("content", [None, b"", b'{"step": 1, "lo', b"\xff\xfe", b"[1]\n", b'"text"\n'])
def test_a_history_that_is_missing_or_damaged_costs_the_curve_alone(content, copied, capsys):
    (copied.path / "history.jsonl").unlink()
    if content is not None:
        (copied.path / "history.jsonl").write_bytes(content)
    model, history = train.train(copied, progress=False)
    assert history == [] and ("history.jsonl is damaged" in capsys.readouterr().out) == bool(content)
    other = [{"step": i, "loss": 2.0, "seconds": 1.0} for i in (1, 2)]
    rows = shown.training_summary({"none": (model, other), "set": (model, history)})
    assert rows[0]["last loss"] == 2 and math.isnan(rows[1]["last loss"]) and rows[1]["steps"] == 7
    assert "none from 2.00 to 2.00" in shown.say_training(rows) and "nan" not in shown.say_training(rows)
    assert shown.say_training(rows[1:]).startswith("A low loss")


def test_a_loss_that_is_not_finite_stops_at_once(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Segmenter, "loss", lambda self, logits, *_: logits.sum() * float("nan"))
    with pytest.raises(ValueError, match="stopped at step 1: the loss is nan.*lower train.learning_rate"):
        start(tmp_path, source)
    assert not (tmp_path / "model").exists()


def test_a_step_that_cannot_be_parted_is_one_sentence(source, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size \(4\) must be a multiple of 3: 1 processes x train.accumulate"):
        start(tmp_path, source, "train.batch_size=4", "train.accumulate=3")


# Order, rates, decay


def test_every_epoch_takes_every_kept_crop_in_an_order_of_its_own(source):
    settings = experiment(source, "train.batch_size=4")
    epochs = [sum((batch_indices(settings, step) for step in steps), []) for steps in ((0, 1), (2, 3))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(8)) and epochs[0] != epochs[1]
    assert batch_indices(settings.override("seed=1"), 0) != batch_indices(settings, 0)
    assert batch_indices(settings.override("train.views=0"), 3) == [12, 13, 14, 15]
    seeds = [seed for step in range(5) for seed in train.point_seeds(settings, step)]
    assert len(set(seeds)) == 20


@pytest.mark.parametrize(
    ("refiner", "rates", "share"),
    [
        ("set", "", 1),
        ("set-phase", "set=0.1", 0.1),
        ("set-released", "set=0.1,set-released=3", 3),
        ("rein", "set=0.1", 1),
        ("full", "", 0.1),  # source: Rein's released backbone rate
        ("full", "full=1", 1),
    ],
)
def test_a_refiners_rate_is_its_own_entry_or_its_familys(refiner, rates, share):
    model = build_segmenter(experiment("", f"model.refiner={refiner}", f"train.refiner_rates={rates}"))
    optimiser = train.make_optimiser(model)
    rate = train.set_learning_rate(optimiser, model.experiment.train, 3)
    given = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert given.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert given[id(p)] == rate * (1 if name.startswith("head.") else share), name


def test_matrices_decay_and_tokens_norms_and_biases_do_not():
    model = build_segmenter(experiment("", *MASKS))
    decays = {id(p): g["weight_decay"] for g in train.make_optimiser(model).param_groups for p in g["params"]}
    decaying = {name for name, p in model.named_parameters() if decays.get(id(p))}
    assert {decays[id(p)] for name, p in model.named_parameters() if name in decaying} == {0.05}
    assert all(name.endswith("weight") for name in decaying)
    layer = "head.decoder.layers.0."
    assert {f"{layer}cross_attn.in_proj_weight", f"{layer}self_attn.q_proj.weight", f"{layer}fc1.weight"} <= decaying
    assert "refiner.phase.delta_map.weight" in decaying
    others = {
        "refiner.phase.tokens.a",
        "head.level_embed.weight",
        f"{layer}fc1.bias",
        f"{layer}final_layer_norm.weight",
    }
    assert others <= dict(model.named_parameters()).keys() - decaying


def test_the_learning_rate_rises_and_falls():
    settings = replace(experiment("").train, steps=10, warmup=4, learning_rate=1.0, power=1.0)
    found = [train.learning_rate(settings, step) for step in range(10)]
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    plain = [train.learning_rate(replace(settings, warmup=0, power=0.9), step) for step in range(10)]
    np.testing.assert_allclose(plain, (1 - np.arange(10) / 10) ** 0.9)


# Validation


def test_validation_looks_at_the_source_alone_and_changes_nothing(source, tmp_path, monkeypatch):
    loaded, found = [], []
    monkeypatch.setattr(train.domains, "load", lambda text, *a, **k: loaded.append(text) or load(text, *a, **k))
    for every in (0, 2):
        options = ("train.steps=5", f"train.validate_every={every}", "data.train_images=3", "data.eval_images=0")
        found.append(start(tmp_path / str(every), source, *options)[1])
    assert losses(found[0]) == losses(found[1])
    scores = {entry["step"]: entry["source_miou"] for entry in found[1] if "source_miou" in entry}
    assert list(scores) == [2, 4, 5] and all(0 <= score <= 100 for score in scores.values())
    assert set(loaded) == {source}


def test_validation_takes_no_picture_that_is_trained_on(source):
    options = ("train.validate_every=1", "data.train_images=2", "data.eval_images=0")
    some, every = (experiment(source, *options, f"data.train_images={count}") for count in (2, 0))
    trained_on = load(source, some.data, role="source")
    held_out = crops.held_out(some, trained_on)
    assert len(held_out) == 2 and not set(held_out.dataset["name"]) & set(trained_on.dataset["name"])
    with pytest.raises(ValueError, match="has no labelled picture that is not trained on: name a part .*validate_on"):
        crops.held_out(every, load(source, every.data, role="source"))
    with pytest.raises(ValueError, match="validate_on is for the source's own data set folder, not 'scenes:game'"):
        crops.held_out(some.override("train.validate_on=scenes:game"), trained_on)
