"""Another processor: answers that differ by rounding, a relative 1e-6, give the same pictures, tables and training."""

import contextlib
import re
import zlib

import numpy as np
import pytest
import torch

from setlib import checkpoint, spectral
from setlib import evaluation as evaluate
from setlib import training as train
from setlib.analysis import ablation, spectra, tokens
from setlib.data import domains
from setlib.experiment import Experiment
from setlib.explorer import material
from setlib.explorer.studio import Studio
from setlib.inference import predict
from setlib.run import Run

ROUNDING = 1e-6  # relative; a kernel that sums in another order differs by less
GAME, NIGHT = "scenes:game", "scenes:night"


@contextlib.contextmanager
def another_processor():
    """Every frozen layer's answer, and all that is transformed or transformed back, is rounded otherwise."""

    def rounded(x):
        generator = torch.Generator().manual_seed(zlib.crc32(x.detach().numpy().tobytes()))  # one input, one answer
        return x * (1 + ROUNDING * torch.randn(x.shape, generator=generator))

    def hook(_, layers):
        for layer in layers:
            layer.register_forward_hook(lambda _, __, answer: rounded(answer))

    own_load, own_check = checkpoint.load_backbone, spectral._checked
    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint, ablation, material):
            patch.setattr(module, "load_backbone", lambda *args, **options: own_load(*args, **options).adapted(hook))
        patch.setattr(spectral, "_checked", lambda x: rounded(own_check(x)))
        yield


def work(folder):
    """Everything that is drawn, measured, predicted and learnt of one small run, by what it is."""
    run = Run.open(folder, Experiment.build("smoke"))
    model, history = train.train(run, progress=False)
    studio, data = Studio(run), run.experiment.data
    boards = {"tokens": studio.tokens(domain=NIGHT, run=str(folder), layer=3, branch="phase")}
    for space in ("pixels", "layer 3"):
        boards[f"layers, {space}"] = studio.layers(first=GAME, second=NIGHT, space=space)
    for space in ("pixels", "layer 2"):
        for part in spectra.PARTS:
            swapped = studio.swap(content=GAME, style=NIGHT, part=part, space=space, high=0.8, run=str(folder))
            boards[f"swap of {part}, {space}"] = swapped
    night = domains.load(NIGHT, data, role="target")
    reading = tokens.read_tokens(model, night.sample(0).image)
    rows = {
        "shares": studio.shares("", (GAME, NIGHT), (0, 1)),
        "distances": studio.distances("", (GAME, 0), (NIGHT, 0)),
        "attention": tokens.attention_table(reading),
        "changes": reading.changes,
    }
    return {
        "boards": boards,
        "rows": rows,
        "mIoU": evaluate.evaluate({"": model}, night, progress=False)[""].miou,
        "losses": [entry["loss"] for entry in history],
        "predictions": predict(model, night.sample(0).image),
    }


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return work(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    with another_processor():
        return work(tmp_path_factory.mktemp("there"))


def test_training_and_predictions_are_the_same(here, there):
    assert here["losses"] != there["losses"]  # the rounding is another
    np.testing.assert_allclose(here["losses"], there["losses"], rtol=1e-4)
    assert abs(here["mIoU"] - there["mIoU"]) < 0.1
    assert (here["predictions"] == there["predictions"]).mean() > 0.999


def test_a_person_sees_the_same_pictures(here, there):
    for name, board in here["boards"].items():
        twin = there["boards"][name]
        same_words(board.words, twin.words)
        panels = ([panel for row in b.rows for panel in row if panel] for b in (board, twin))
        for one, other in zip(*panels, strict=True):
            same_words(one.title, other.title)
            drawn = (np.asarray(b.panel(p.title)).astype(int) for b, p in ((board, one), (twin, other)))
            apart = np.abs(np.subtract(*drawn))
            assert apart.mean() < 1 and (apart > 8).mean() < 1e-3, (name, one.title)


def same_words(one, other):
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


def test_spectra_are_drawn_alike():
    images = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    images[..., 32:] = images[..., :32]  # every other column of its spectrum is nothing
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    one, other = (spectra.spectrum_pictures(x) for x in (images, images * (1 + ROUNDING * noise)))
    for name in one:
        assert np.array_equal(np.isnan(one[name]), np.isnan(other[name]))
        turn = np.exp(1j * one[name]) - np.exp(1j * other[name]) if "phase" in name else one[name] - other[name]
        assert np.nanmax(np.abs(turn)) < 0.05, name
    assert np.isnan(one["phase (rad)"]).any()
