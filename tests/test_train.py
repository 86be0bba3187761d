"""The loop: same seed same numbers, killed and resumed alike, frozen features once, clear failure."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from setlib.model import Segmenter

from setlib import training as train
from setlib.data.domains import load
from setlib.experiment import Experiment
from setlib.run import Run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Pictures whose colour tells the class: left road, right sky."""
    root = tmp_path_factory.mktemp("source")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        label = np.where(np.arange(128) < 40 + 10 * i, 0, 10)[None].repeat(64, 0).astype(np.uint8)
        image = np.where(label[..., None] == 0, [90, 80, 90], [120, 180, 250]) + rng.integers(-9, 9, (64, 128, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"images/{i}.png")
        Image.fromarray(label).save(root / f"labels/{i}.png")
    return f"folder@{root}"


def experiment(source, *overrides):
    return Experiment.build("smoke", source=source, targets=[source], overrides=overrides)


def losses(history):
    return [entry["loss"] for entry in history]


def test_it_learns(source, tmp_path):
    run = Run.open(tmp_path, experiment(source, "train.steps=40", "train.learning_rate=3e-3"))
    model, history = train.train(run, progress=False)
    assert np.mean(losses(history)[-5:]) < 0.5 * np.mean(losses(history)[:3])
    sample = load(source, run.experiment.data).sample(0)
    assert (model.predict(sample.image) == sample.label).mean() > 0.9
    assert not model.training


def test_same_seed_same_numbers(source, tmp_path):
    for name in "ab":
        run = Run.open(tmp_path / name, experiment(source, "train.steps=4"))
        train.train(run, progress=False)
    one, other = (losses(train.read_history(Run.load(tmp_path / name))) for name in "ab")
    assert one == other
    assert (tmp_path / "a/model/model.safetensors").read_bytes() == (
        tmp_path / "b/model/model.safetensors"
    ).read_bytes()


RESUMED = [
    (),
    ("train.views=0",),
    ("train.ema=0.5",),
    ("train.precision=bfloat16", "model.refiner=full"),
    ("train.checkpointing=true",),
    ("model.refiner=set-released", "train.precision=bfloat16"),
]


@pytest.mark.parametrize("options", RESUMED)
def test_killed_and_resumed_is_as_never_killed(source, tmp_path, monkeypatch, options):
    settings = experiment(source, "train.steps=7", "train.checkpoint_every=3", *options)
    whole, _ = train.train(Run.open(tmp_path / "whole", settings), progress=False)
    step, run = train.Trainer.step, Run.open(tmp_path / "cut", settings)

    def killed(self, *inputs):
        if self.next_step == 5:
            raise KeyboardInterrupt
        return step(self, *inputs)

    monkeypatch.setattr(train.Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(run, progress=False)
    monkeypatch.setattr(train.Trainer, "step", step)
    assert (run.path / "checkpoint.safetensors").is_file()
    model, history = train.train(run, progress=False)
    assert [entry["step"] for entry in history] == list(range(1, 8))
    expected = whole.trainable_state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.trainable_state().items())
    assert not (run.path / "checkpoint.safetensors").exists()


def test_resumed_without_its_history_ends_with_the_same_weights(source, tmp_path, monkeypatch):
    settings = experiment(source, "train.steps=4", "train.checkpoint_every=2")
    whole, _ = train.train(Run.open(tmp_path / "whole", settings), progress=False)
    run, save = Run.open(tmp_path / "cut", settings), train.Trainer.save

    def killed(self):
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(run, progress=False)
    monkeypatch.setattr(train.Trainer, "save", save)
    (run.path / "history.jsonl").unlink()
    model, history = train.train(run, progress=False)
    assert [entry["step"] for entry in history] == [3, 4]
    expected = whole.trainable_state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.trainable_state().items())


def test_a_finished_run_is_loaded_not_trained_again(source, tmp_path, monkeypatch):
    run = Run.open(tmp_path, experiment(source, "train.steps=2"))
    model, history = train.train(run, progress=False)
    monkeypatch.setattr(train.Trainer, "step", None)
    again, same = train.train(run, progress=False)
    assert same == history and torch.equal(again.head.classify.weight, model.head.classify.weight)


def test_a_damaged_checkpoint_is_named(source, tmp_path):
    run = Run.open(tmp_path, experiment(source))
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be resumed .* delete it"):
        train.train(run, progress=False)


def test_kept_features_give_the_same_loss_as_the_plain_path(source):
    settings = experiment(source)
    model, domain = Segmenter(settings), load(source, settings.data, role="source")
    bank = train.make_bank(model, domain, progress=False)
    images, labels, prefix = bank.batch([5, 1])
    ((again, same_labels),) = train.Views(domain, settings).batches([[5, 1]])
    assert torch.equal(images, again) and torch.equal(labels, same_labels)
    torch.testing.assert_close(model(images, prefix), model(images), rtol=1e-5, atol=1e-5)


def test_a_head_alone_reads_kept_features_and_runs_no_layer(source, monkeypatch):
    settings = experiment(source, "model.refiner=none")
    model, domain = Segmenter(settings), load(source, settings.data, role="source")
    bank = train.make_bank(model, domain, progress=False)
    images, _, prefix = bank.batch([5, 1])
    expected = model(images)
    shared = train.make_bank(model, domain, progress=False, stop=3)  # where others go on
    monkeypatch.setattr(model.backbone, "_run", None)
    torch.testing.assert_close(model(images, prefix), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(images, shared.batch([5, 1])[2]), expected, rtol=1e-5, atol=1e-5)


def test_a_bank_serves_refiners_that_start_later_and_layers_from_the_first(source, tmp_path):
    runs = {
        name: Run.open(tmp_path / name, experiment(source, "train.steps=2", f"model.refiner={name}"))
        for name in ("none", "rein", "set")
    }
    assert all(len(history) == 2 for _, history in train.train_together(runs, progress=False).values())
    alone, _ = train.train(Run.open(tmp_path / "alone", runs["none"].experiment), progress=False)
    shared = Segmenter.load(tmp_path / "none" / "model")
    torch.testing.assert_close(shared.head.classify.weight, alone.head.classify.weight, rtol=1e-4, atol=1e-6)
    every = Run.open(tmp_path / "every", experiment(source, "train.steps=2", "model.refined_layers="))
    assert train.train(every, progress=False)[0].frozen_until == 1


def test_a_loss_that_is_not_finite_stops_at_once(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Segmenter, "loss", lambda self, logits, *_: logits.sum() * float("nan"))
    with pytest.raises(ValueError, match="stopped at step 1: the loss is nan.*lower train.learning_rate"):
        train.train(Run.open(tmp_path, experiment(source)), progress=False)
    assert not (tmp_path / "model").exists()


def test_only_matrices_decay_and_the_refiner_learns_at_its_own_rate(source):
    model = Segmenter(experiment(source, "train.refiner_rates=set=0.3"))
    groups = train.make_optimiser(model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    settings = {names[id(p)]: (g["weight_decay"], g["share"]) for g in groups for p in g["params"]}
    assert settings.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith("weight") for name, (decay, _) in settings.items() if decay)
    assert not settings["refiner.phase.tokens.a"][0] and not settings["head.maps.0.0.weight"][0]
    assert any(decay and name.startswith("refiner.") for name, (decay, _) in settings.items())
    for name, (_, share) in settings.items():
        assert share == (1 if name.startswith("head.") else 0.3), name


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
def test_a_refiners_rate_is_its_own_entry_or_its_familys(source, refiner, rates, share):
    model = Segmenter(experiment(source, f"model.refiner={refiner}", f"train.refiner_rates={rates}"))
    groups = train.make_optimiser(model).param_groups
    learning = {id(p) for name, p in model.named_parameters() if not name.startswith("head.")}
    assert {g["share"] for g in groups for p in g["params"] if id(p) in learning} == {share}


def test_views_repeat_and_every_epoch_shows_every_picture(source):
    views = train.Views(load(source, experiment(source).data, role="source"), experiment(source))
    one, same, next_epoch = views[2], views[2], views[6]
    assert torch.equal(one[0], same[0]) and not torch.equal(one[0], next_epoch[0])
    order = train.batch_indices(experiment(source, "train.batch_size=8"), 3)
    assert sorted(order) == list(range(8)) != order


def make_folder(root, count=6, suffix="jpg"):
    """A labelled folder domain of flat pictures, the class is the number of the picture."""
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (160, 80), (40 * i, 90, 90)).save(root / "images" / f"{i}.{suffix}")
        Image.new("L", (160, 80), i).save(root / "labels" / f"{i}.png")
    return f"folder@{root}"


def test_worker_processes_change_nothing(tmp_path):
    source = make_folder(tmp_path)
    found = []
    for workers in (0, 2):
        settings = experiment(source, "train.views=0", f"data.workers={workers}")
        views = train.Views(load(source, settings.data, role="source"), settings)
        found.append(list(views.batches([[0, 3], [8, 5], [2, 2]])))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_stops_the_training_or_is_skipped_and_counted(tmp_path, capsys, workers):
    source = make_folder(tmp_path / "set")
    settings = experiment(source, "train.views=0", f"data.workers={workers}", "data.train_images=0")
    domain = load(source, settings.data, role="source")
    for i in (1, 4):
        path = tmp_path / "set" / "images" / f"{i}.jpg"
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="'[14]' cannot be decoded"):
        list(train.Views(domain, settings).batches([list(range(6))]))
    settings = settings.override("data.on_error=skip")
    ((_, labels),) = train.Views(domain, settings).batches([list(range(12))])
    assert set(labels.unique().tolist()) - {255} == {0, 2, 3, 5}
    out = capsys.readouterr().out
    assert out.count("cannot be decoded") == 2 and "skipped (2)" in out
    with pytest.raises(ValueError, match="data.on_error must be stop or skip, got 'go'"):
        settings.override("data.on_error=go")


def test_a_large_jpeg_is_decoded_no_larger_than_the_crop_needs(tmp_path, monkeypatch):
    source = make_folder(tmp_path)
    Image.new("RGB", (2000, 1000), "red").save(tmp_path / "images" / "0.jpg")
    Image.new("L", (2000, 1000), 7).save(tmp_path / "labels" / "0.png")
    settings = experiment(source, "train.views=0")
    domain = load(source, settings.data, role="source")
    data = settings.data
    least = data.long_edge * data.scale_max
    sizes = [max(domain.sample(0, edge).image.shape) for edge in (0, math.ceil(least), 1200)]
    assert sizes[0] == sizes[2] == 2000 and least <= sizes[1] <= 2 * least
    seen = [view for view in map(train.Views(domain, settings).__getitem__, range(6)) if 7 in view.label]
    assert seen and seen[0].image.shape[1:] == seen[0].label.shape == (data.height, data.width)


def test_a_source_without_labels_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match="Source .* has no labels"):
        train.train(Run.open(tmp_path / "run", experiment(f"folder@{tmp_path}")), progress=False)


def test_lower_precision_learns_alike(source, tmp_path):
    found = []
    for kind in ("float32", "bfloat16"):
        options = ("train.steps=30", "train.learning_rate=3e-3", f"train.precision={kind}")
        model, history = train.train(Run.open(tmp_path / kind, experiment(source, *options)), progress=False)
        found.append(losses(history))
        assert all(p.dtype == torch.float32 for p in model.parameters())
    np.testing.assert_allclose(found[1], found[0], rtol=0.05, atol=0.02)
    assert np.mean(found[1][-5:]) < 0.6 * np.mean(found[1][:3])


def test_checkpointing_changes_no_number(source, tmp_path):
    found = []
    for options in ((), ("train.checkpointing=true",)):
        run = Run.open(tmp_path / f"run{len(found)}", experiment(source, "train.steps=4", *options))
        found.append(losses(train.train(run, progress=False)[1]))
    assert found[0] == found[1]


def test_the_backbones_own_weights_learn_slower(source):
    model = Segmenter(experiment(source, "model.refiner=full"))
    shares = {id(p): group["share"] for group in train.make_optimiser(model).param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert shares[id(p)] == (0.1 if name.startswith("backbone.") else 1.0)
    trainer = train.Trainer(model, None)
    trainer.step(torch.rand(2, 3, 64, 128), torch.zeros(2, 64, 128, dtype=torch.int64), None)
    rates = {round(group["lr"] / trainer.history[0]["lr"], 6) for group in trainer.optimiser.param_groups}
    assert rates == {0.1, 1.0}


def test_full_fine_tuning_changes_only_its_own_copy(source, tmp_path):
    runs = {
        name: Run.open(tmp_path / name, experiment(source, "train.steps=2", f"model.refiner={name}"))
        for name in ("none", "full")
    }
    trained = {name: model for name, (model, _) in train.train_together(runs, progress=False).items()}
    frozen = Segmenter(experiment(source)).backbone.state_dict()
    assert all(torch.equal(value, frozen[name]) for name, value in trained["none"].backbone.state_dict().items())
    assert not torch.equal(
        trained["full"].backbone.model.encoder.layer[0].mlp.fc1.weight, frozen["model.encoder.layer.0.mlp.fc1.weight"]
    )
    assert trained["full"].backbone.fingerprint == trained["none"].backbone.fingerprint


def test_pictures_need_not_divide_into_patches(source, tmp_path):
    options = ("train.steps=40", "train.learning_rate=3e-3", "data.height=61", "data.width=107", "model.patch_size=10")
    model, history = train.train(Run.open(tmp_path, experiment(source, *options)), progress=False)
    assert model.backbone.patch_size == 10 and np.mean(losses(history)[-5:]) < 0.5 * np.mean(losses(history)[:3])
    sample = load(source, model.experiment.data).sample(0)
    assert (model.predict(sample.image) == sample.label).mean() > 0.9


MASKS = ("model.head=mask2former", "model.head_channels=32", "model.pixel_layers=1", "model.decoder_layers=2")


@pytest.mark.parametrize("refiner", ["none", "rein", "set"])
def test_a_mask_head_learns(source, tmp_path, refiner):
    options = (*MASKS, f"model.refiner={refiner}", "train.steps=40", "train.learning_rate=1e-3", "train.clip_norm=0")
    _, history = train.train(Run.open(tmp_path, experiment(source, *options)), progress=False)
    assert np.mean(losses(history)[-5:]) < 0.8 * np.mean(losses(history)[:3])


def test_a_mask_head_goes_on_after_a_kill_as_if_there_was_none(source, tmp_path):
    whole = Run.open(tmp_path / "whole", experiment(source, *MASKS, "train.steps=6", "train.checkpoint_every=3"))
    expected = losses(train.train(whole, progress=False)[1])
    cut = Run.open(tmp_path / "cut", whole.experiment)
    model = Segmenter(cut.experiment).train()
    trainer = train.Trainer(model, cut)
    bank = train.make_bank(model, load(source, cut.experiment.data, role="source"), progress=False)
    for step in range(3):
        images, labels, prefix = bank.batch(train.batch_indices(cut.experiment, step))
        trainer.step(images, labels, prefix)
    trainer.save()
    assert losses(train.train(cut, progress=False)[1]) == expected


@pytest.mark.parametrize("options", [(), ("model.refiner=full",), (*MASKS, "model.refiner=none")])
def test_a_step_in_parts_is_the_step(source, tmp_path, options):
    found = []
    for parts in (1, 2, 4):
        settings = (*options, "train.batch_size=4", "train.steps=6", f"train.accumulate={parts}")
        run = Run.open(tmp_path / str(parts), experiment(source, *settings))
        found.append(losses(train.train(run, progress=False)[1]))
    rounding = 1e-5 if MASKS[0] in options else 0.0  # a mask head chooses its points by values that rounding moves
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=rounding, atol=1e-4)


def test_a_step_that_cannot_be_parted_is_one_sentence(source, tmp_path):
    run = Run.open(tmp_path, experiment(source, "train.batch_size=4", "train.accumulate=3"))
    with pytest.raises(ValueError, match=r"batch_size \(4\) must be a multiple of 3: 1 processes x train.accumulate"):
        train.train(run, progress=False)


def test_validation_looks_at_the_source_alone_and_changes_nothing(source, tmp_path, monkeypatch):
    loaded, own = [], load
    monkeypatch.setattr(train.domains, "load", lambda text, *a, **k: loaded.append(text) or own(text, *a, **k))
    found = []
    for every in (0, 2):
        options = ("train.steps=5", f"train.validate_every={every}", "data.train_images=3", "data.eval_images=0")
        run = Run.open(tmp_path / str(every), experiment(source, *options))
        found.append(train.train(run, progress=False)[1])
    assert losses(found[0]) == losses(found[1])
    assert [entry["step"] for entry in found[1] if "source_miou" in entry] == [2, 4, 5]
    assert all(0 <= entry["source_miou"] <= 100 for entry in train.read_history(run) if "source_miou" in entry)
    assert set(loaded) == {source}


def test_validation_takes_no_picture_that_is_trained_on(source, tmp_path):
    options = ("train.steps=2", "train.validate_every=1", "data.train_images=2", "data.eval_images=0")
    run = Run.open(tmp_path / "some", experiment(source, *options))
    trained = load(source, run.experiment.data, role="source")
    own = train.validation_pictures(run.experiment, trained)
    assert len(own) == 2 and not set(own.dataset["name"]) & set(trained.dataset["name"])
    assert all("source_miou" in entry for entry in train.train(run, progress=False)[1])
    every = experiment(source, *options, "data.train_images=0")
    with pytest.raises(ValueError, match="has no labelled picture that is not trained on: name a part .*validate_on"):
        train.train(Run.open(tmp_path / "all", every), progress=False)
    with pytest.raises(ValueError, match="validate_on is for the source's own data set folder, not 'scenes:game'"):
        train.validation_pictures(experiment(source, *options, "train.validate_on=scenes:game"), trained)


def test_the_learning_rate_rises_and_falls():
    settings = replace(experiment("scenes:game").train, steps=10, warmup=4, learning_rate=1.0, power=1.0)
    found = [train.learning_rate(settings, step) for step in range(10)]
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    plain = [train.learning_rate(replace(settings, warmup=0, power=0.9), step) for step in range(10)]
    np.testing.assert_allclose(plain, (1 - np.arange(10) / 10) ** 0.9)


def test_attention_maps_decay(source):
    model = Segmenter(experiment(source, *MASKS))
    groups = {id(p): g["weight_decay"] for g in train.make_optimiser(model).param_groups for p in g["params"]}
    layer = model.head.decoder.layers[0]
    for p in (layer.cross_attn.in_proj_weight, layer.self_attn.q_proj.weight, layer.fc1.weight):
        assert groups[id(p)] == 0.05
    others = (
        layer.fc1.bias,
        layer.final_layer_norm.weight,
        model.head.level_embed.weight,
        model.refiner.phase.tokens.a,
    )
    assert {groups[id(p)] for p in others} == {0.0}


@pytest.mark.parametrize("refiner", ["none", "set"])
def test_the_papers_head_learns_at_its_size(source, tmp_path, refiner):
    """256 channels, 6 + 9 layers, 100 queries."""
    options = ("model.head=mask2former", "model.head_channels=256", "model.num_tokens=100", f"model.refiner={refiner}")
    rest = ("train.batch_size=1", "train.views=0", "train.steps=5", "train.learning_rate=1e-4", "train.clip_norm=0")
    _, history = train.train(Run.open(tmp_path, experiment(source, *options, *rest)), progress=False)
    assert np.mean(losses(history)[-2:]) < 0.9 * losses(history)[0]


def test_a_finished_run_without_its_weights_is_trained_again(source, tmp_path):
    run = Run.open(tmp_path, experiment(source, "train.steps=2"))
    first = train.train(run, progress=False)[1]
    (run.path / "model" / "model.safetensors").unlink()
    assert losses(train.train(run, progress=False)[1]) == losses(first)


@pytest.mark.parametrize("content", [None, b"", b'{"step": 1, "lo', b"\xff\xfe", b"[1]\n", b'"text"\n'])
def test_a_history_that_is_missing_or_damaged_costs_the_curve_alone(content, source, tmp_path, capsys):
    run = Run.open(tmp_path, experiment(source, "train.steps=2"))
    model, _ = train.train(run, progress=False)
    (tmp_path / "history.jsonl").unlink()
    if content is not None:
        (tmp_path / "history.jsonl").write_bytes(content)
    _, history = train.train(run, progress=False)
    assert history == [] and ("history.jsonl is damaged" in capsys.readouterr().out) == bool(content)
    other = [{"step": i, "loss": 2.0, "seconds": 1.0} for i in (1, 2)]
    rows = train.summary({"none": (model, other), "set": (model, history)})
    assert rows[0]["last loss"] == 2 and math.isnan(rows[1]["last loss"]) and rows[1]["steps"] == 2
    assert "none from 2.00 to 2.00" in train.verdict(rows) and "nan" not in train.verdict(rows)
    assert train.verdict(rows[1:]).startswith("A low loss")
