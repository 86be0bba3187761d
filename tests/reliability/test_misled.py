"""What does not belong together is refused, and the sentence says what differs and what to do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import faults
import numpy as np
import pytest
from faults import SMALL, Command
from PIL import Image
from safetensors.numpy import load_file, save_file

TRAINING = ("train.steps=8", "train.views=4", "train.checkpoint_every=2")


def words_of(folder: Path, *options: str) -> list[str]:
    path = folder / "domain"
    source = f"folder@{path}" if path.exists() else faults.make_domain(path)
    domains = ["--source", source, "--target", source]
    return ["train", "--profile", "smoke", "--run", "run", *domains, "-o", *SMALL, *options]


def cut_training(folder: Path, *options: str) -> list[str]:
    """A training that is killed behind its first checkpoint; the words that go on with it."""
    words = words_of(folder, "train.steps=3000", *TRAINING[1:], *options)
    command = Command(folder, *words)
    command.wait_for_file(folder / "run" / "checkpoint.safetensors")
    command.kill()
    command.wait()
    return words


@pytest.mark.parametrize(("rate", "clip"), [("1e4", 0), ("1e30", 0), ("10", 1)])
def test_a_loss_that_explodes_names_the_step_the_last_checkpoint_and_the_cause(tmp_path, rate, clip):
    options = (f"train.learning_rate={rate}", f"train.clip_norm={clip}", "train.refiner_rates=")
    stopped = faults.run(tmp_path, *words_of(tmp_path, "train.steps=400", *TRAINING[1:], *options))
    assert stopped.wait() == 2 and "Training stopped at step" in stopped.error
    assert "learning_rate" in stopped.error and "checkpoint" in stopped.error
    assert not (tmp_path / "run" / "model").exists()
    if (tmp_path / "run" / "checkpoint.safetensors").exists():
        values = load_file(tmp_path / "run" / "checkpoint.safetensors")
        assert all(np.isfinite(value).all() for value in values.values()), "the last checkpoint is no good one"


def test_labels_of_another_set_are_refused_with_the_ids_that_are_unknown(tmp_path):
    words = words_of(tmp_path, *TRAINING)
    for path in (tmp_path / "domain" / "labels").iterdir():
        Image.fromarray(np.full((32, 64), 33, np.uint8)).save(path)
    refused = faults.run(tmp_path, *words)
    assert refused.wait() == 2 and "unknown ids [33]" in refused.error and "label ids, not train ids" in refused.error


def test_a_model_of_another_architecture_is_refused_with_what_differs(trained, tmp_path):
    run = shutil.copytree(trained.path, tmp_path / "run")
    path = run / "model" / "model.safetensors"
    values = load_file(path)
    lost, other = sorted(values)[0], sorted(values)[1]
    values["refiner.of.another"], values[other] = values.pop(lost), np.zeros((3, 5), np.float32)
    save_file(values, path)
    refused = faults.run(tmp_path, "evaluate", run)
    assert refused.wait() == 2
    for words in (lost, "refiner.of.another", f"{other} is (3, 5), expected "):
        assert words in refused.error, refused.error


def test_a_checkpoint_of_another_architecture_is_refused_with_what_differs(tmp_path):
    words = cut_training(tmp_path)
    path = tmp_path / "run" / "checkpoint.safetensors"
    values = load_file(path)
    wide = next(name for name in sorted(values) if name.startswith("model.") and values[name].ndim == 2)
    values[wide] = values[wide][:1]  # would be spread over all rows
    lost = next(name for name in sorted(values) if name.startswith("model.") and name != wide)
    del values[lost]
    save_file(values, path, {"step": "2"})
    refused = faults.run(tmp_path, *words)
    assert refused.wait() == 2 and "checkpoint.safetensors cannot be resumed" in refused.error
    assert wide.removeprefix("model.") in refused.error and lost.removeprefix("model.") in refused.error


@pytest.mark.parametrize("part", ["average.", "optimiser."])
def test_a_checkpoint_with_another_average_or_optimiser_is_refused(tmp_path, part):
    words = cut_training(tmp_path, "train.ema=0.9")
    path = tmp_path / "run" / "checkpoint.safetensors"
    values = load_file(path)
    wide = next(name for name in sorted(values) if name.startswith(part) and values[name].ndim == 2)
    values[wide] = values[wide][:1]  # would be spread over all rows
    save_file(values, path, {"step": "2"})
    refused = faults.run(tmp_path, *words)
    assert refused.wait() == 2 and "checkpoint.safetensors cannot be resumed" in refused.error
    assert wide.removeprefix(part).partition(".exp_avg")[0] in refused.error


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_one_sentence_with_and_without_workers(tmp_path, workers):
    words = words_of(tmp_path, *TRAINING, "train.views=0", f"data.workers={workers}")
    for path in (tmp_path / "domain" / "images").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    refused = faults.run(tmp_path, *words)
    assert refused.wait() == 2 and len(refused.error) < 400 and "images/p" in refused.error


def test_a_backbone_that_was_exchanged_is_refused(tmp_path):
    import torch
    from transformers import Dinov2Config, Dinov2Model

    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, patch_size=8, image_size=64)
    for seed in (0, 1):
        torch.manual_seed(seed)
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / f"backbone{seed}")
    shutil.copytree(tmp_path / "backbone0", tmp_path / "backbone")
    words = cut_training(tmp_path, "model.backbone=./backbone")
    shutil.copytree(tmp_path / "backbone1", tmp_path / "backbone", dirs_exist_ok=True)
    refused = faults.run(tmp_path, *words)
    assert refused.wait() == 2 and "backbone" in refused.error and "checkpoint.safetensors" in refused.error


def test_a_folder_of_a_later_version_is_refused_by_version(trained, tmp_path):
    run = shutil.copytree(trained.path, tmp_path / "run")
    content = json.loads((run / "experiment.json").read_text())
    (run / "experiment.json").write_text(json.dumps(content | {"setlib": "9.9.9", "quantum": 1}))
    refused = faults.run(tmp_path, "evaluate", run)
    assert refused.wait() == 2 and "made by setlib 9.9.9" in refused.error


@pytest.mark.parametrize("when", [0, 4_000_000_000])
def test_files_of_any_date_change_nothing(tmp_path, when):
    words = [*cut_training(tmp_path, "train.steps=300"), "train.steps=300"]
    for path in [*(tmp_path / "run").rglob("*"), *(tmp_path / "domain").rglob("*")]:
        os.utime(path, (when, when))
    again = faults.run(tmp_path, *words)
    assert again.wait() == 0 and "goes on after step" in again.output
    (tmp_path / "run").rename(tmp_path / "cut")
    assert faults.run(tmp_path, *words).wait() == 0
    assert faults.digest(tmp_path / "cut") == faults.digest(tmp_path / "run")
