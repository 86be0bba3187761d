"""Another processor: answers that differ by rounding, a relative 1e-6, give the same pictures, tables and training."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from setlib import backbone, evaluate, spectral, train
from setlib.analysis import spectra as analysis
from setlib.analysis import survey
from setlib.analysis import tokens as attention
from setlib.data import domains
from setlib.experiment import Experiment
from setlib.explorer.studio import Studio
from setlib.run import Run

ROUNDING = 1e-6  # relative; a kernel that sums in another order differs by less
GAME, NIGHT = "scenes:game", "scenes:night"


@contextlib.contextmanager
def another_processor(seed: int = 0) -> Iterator[None]:
    """Every frozen layer's answer, and all that is transformed or transformed back, is rounded otherwise."""
    generator = torch.Generator().manual_seed(seed)

    def rounded(x: Tensor) -> Tensor:
        return x * (1 + ROUNDING * torch.randn(x.shape, generator=generator))

    def answer(_: nn.Module, __: tuple, output: Any) -> Any:
        return (rounded(output[0]), *output[1:]) if isinstance(output, tuple) else rounded(output)

    def load(*args: Any) -> nn.Module:
        model = own_load(*args)
        for layer in backbone._find_layers(model):
            layer.register_forward_hook(answer)
        return model

    own_load, own_check = backbone.load_model, spectral._checked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "load_model", load)
        patch.setattr(spectral, "_checked", lambda x: rounded(own_check(x)))
        yield


def work(folder: Path) -> dict[str, Any]:
    """Everything that is drawn, measured, predicted and learnt of one small run, by what it is."""
    run = Run.open(folder, Experiment.build("smoke"))
    model, history = train.train(run, progress=False)
    studio, data = Studio(run), run.experiment.data
    boards = {"tokens": studio.tokens(domain=NIGHT, run=str(folder), layer=3, branch="phase")}
    boards |= {
        f"layers, {space}": studio.layers(first=GAME, second=NIGHT, space=space) for space in ("pixels", "layer 3")
    }
    for space in ("pixels", "layer 2"):
        for part in analysis.PARTS:
            swapped = studio.swap(content=GAME, style=NIGHT, part=part, space=space, high=0.8, run=str(folder))
            boards[f"swap of {part}, {space}"] = swapped
    night = domains.load(NIGHT, data, role="target")
    reading = attention.read_tokens(model, night.sample(0).image)
    rows = {
        "movement": analysis.movement(model.backbone, survey.styled_scenes(data, 2, ("game", "night")), [2, 4]),
        "distances": studio.distances("", GAME, 0, NIGHT, 0),
        "attention": attention.attention_table(reading),
        "changes": reading.changes,
        "leak": attention.batch_leak(attention.frozen_features(model, night)),
    }
    scores = evaluate.evaluate_models({"": model}, night, progress=False)
    return {
        "boards": boards,
        "rows": rows,
        "mIoU": scores[""].miou,
        "losses": [entry["loss"] for entry in history],
        "predictions": model.predict(night.sample(0).image),
    }


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> dict[str, Any]:
    return work(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> dict[str, Any]:
    with another_processor():
        return work(tmp_path_factory.mktemp("there"))


def test_the_rounding_is_another(here, there):
    assert here["losses"] != there["losses"]


def test_a_person_sees_the_same_pictures(here, there):
    for name, board in here["boards"].items():
        panels = ([panel for row in b.rows for panel in row if panel] for b in (board, there["boards"][name]))
        for one, other in zip(*panels, strict=True):
            same_words(one.title, other.title)
            drawn = (
                np.asarray(b.panel(p.title)).astype(int) for b, p in ((board, one), (there["boards"][name], other))
            )
            apart = np.abs(np.subtract(*drawn))
            assert apart.mean() < 1 and (apart > 8).mean() < 1e-3, (name, one.title)
        same_words(board.words, there["boards"][name].words)


def test_spectra_are_drawn_alike():
    images = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    images[..., 32:] = images[..., :32]  # every other column of its spectrum is nothing
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    one, other = (analysis.spectrum_pictures(x) for x in (images, images * (1 + ROUNDING * noise)))
    for name in one:
        assert np.array_equal(np.isnan(one[name]), np.isnan(other[name]))
        turn = np.exp(1j * one[name]) - np.exp(1j * other[name]) if "phase" in name else one[name] - other[name]
        assert np.nanmax(np.abs(turn)) < 0.05, name
    assert np.isnan(one["phase (rad)"]).any()


def same_words(one: str, other: str) -> None:
    """Equal but for numbers, which may differ by one in their last place."""
    number = r"-?\d+\.?\d*"
    assert re.sub(number, "n", one) == re.sub(number, "n", other)
    for x, y in zip(*(re.findall(number, text) for text in (one, other)), strict=True):
        decimals = len(x.partition(".")[2])
        assert abs(float(x) - float(y)) <= (1.01 * 10.0**-decimals if decimals else 0), (one, other)


def test_tables_are_the_same(here, there):
    for name, rows in here["rows"].items():
        for one, other in zip(rows, there["rows"][name], strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                same = other[key] if isinstance(value, str) else pytest.approx(other[key], rel=1e-3, abs=1e-3)
                assert value == same, (name, key)


def test_training_and_predictions_are_the_same(here, there):
    np.testing.assert_allclose(here["losses"], there["losses"], rtol=1e-4)
    assert abs(here["mIoU"] - there["mIoU"]) < 0.1
    assert (here["predictions"] == there["predictions"]).mean() > 0.999
