"""What tokens attend to and change is read as the model uses it; the released code's faults are shown in numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from setlib import spectral
from setlib.analysis import tokens as attention
from setlib.backbone import FrozenBackbone
from setlib.checkpoint import build_segmenter
from setlib.experiment import Experiment
from setlib.inference import predict
from setlib.segmenter import Segmenter
from setlib.weights.load import load_backbone


@pytest.fixture(scope="module")
def backbone() -> FrozenBackbone:
    return load_backbone("tiny-random")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)


def make_model(backbone: FrozenBackbone, refiner: str) -> Segmenter:
    """A smoke model whose refiner does something."""
    model = build_segmenter(Experiment.build("smoke", overrides=[f"model.refiner={refiner}"]), backbone)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.refiner.named_parameters():
            if "delta_map.weight" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def features(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "refiner, branches",
    [
        ("rein", ["patches"]),
        ("set", ["amplitude", "phase"]),
        ("set-amplitude", ["amplitude"]),
        ("set-phase", ["phase"]),
        ("set-unnormalised", ["amplitude", "phase"]),
        ("set-channels", ["amplitude", "phase"]),
        ("set-released", ["amplitude", "phase"]),
        ("fada", ["low", "high"]),
    ],
)
def test_tokens_are_read_as_the_model_uses_them(backbone, picture, refiner, branches):
    model = make_model(backbone, refiner)
    before = predict(model, picture)
    reading = attention.read_tokens(model, picture)
    assert [(one.layer, one.branch) for one in reading.attention] == [(k, b) for k in (3, 4) for b in branches]
    rows, columns = (side // backbone.patch_size for side in picture.shape[:2])
    is_spectral = refiner not in ("rein", "set-channels", "set-released", "fada")
    for one in reading.attention:
        assert one.share.shape == (rows, columns // 2 + 1 if is_spectral else columns, 8)
        assert one.picture.shape == (rows, columns, 8) and (one.spectrum is not None) == is_spectral
        assert one.share.sum(-1) == pytest.approx(1, abs=1e-5)
        assert one.influence[0] == 0 and (one.influence[1:] > 0).all()
    assert [row["layer"] for row in reading.changes] == [3, 4]
    assert all(row["amplitude"] > 0 or row["phase"] > 0 for row in reading.changes)
    assert (reading.picture == picture).all()
    assert (predict(model, picture) == before).all() and not model.refiner._forward_hooks
    for row in attention.attention_table(reading):
        assert 0 < row["entropy"] <= 1 and 0 < row["token 0 (%)"] < 100 and len(row["top tokens"]) == 3


def test_a_branch_that_is_left_out_does_not_move_its_part(backbone, picture):
    changes = attention.read_tokens(make_model(backbone, "set-amplitude"), picture).changes
    assert all(row["phase"] == pytest.approx(0, abs=1e-4) for row in changes)
    changes = attention.read_tokens(make_model(backbone, "set-phase"), picture).changes
    assert all(row["amplitude"] == pytest.approx(0, abs=1e-4) for row in changes)


def test_even_attention_has_entropy_1(backbone, picture):
    model = make_model(backbone, "rein")
    torch.nn.init.zeros_(model.refiner.patches.tokens.a)
    assert attention.attention_table(attention.read_tokens(model, picture))[0]["entropy"] == pytest.approx(1)


def test_a_model_without_tokens_gives_an_empty_reading(backbone, picture):
    model = make_model(backbone, "none")
    reading = attention.read_tokens(model, picture)
    assert (reading.attention, reading.changes, attention.attention_table(reading)) == ([], [], [])


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3)])
def test_the_tokens_parts_of_the_features_sum_to_the_features(size):
    x, num = features(1, *size, 6), 5
    share = torch.rand(size[0], size[1] // 2 + 1, num).softmax(-1)
    alone = torch.zeros_like(share)
    alone[..., 0] = 1  # one token gets everything: its part is the whole
    assert attention.over_picture(x, alone)[..., 0].numpy() == pytest.approx(1, abs=1e-5)
    assert attention.over_picture(x, alone)[..., 1:].abs().max() == 0
    even = torch.full_like(share, 1 / num)
    assert attention.over_picture(x, even).numpy() == pytest.approx(1 / num, abs=1e-5)
    parts = [spectral.invert(spectral.transform(x) * one[..., None], size) for one in share.unbind(-1)]
    torch.testing.assert_close(sum(parts), x)
    lengths = torch.stack([part[0].norm(dim=-1) for part in parts], -1) / x[0].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(attention.over_picture(x, share), lengths)


def test_a_token_of_one_frequency_is_found_where_the_frequency_is():
    x = torch.zeros(1, 4, 16, 2)
    x[:, :, 8:] = torch.tensor([1.0, -1.0]).repeat(4)[:, None]  # stripes in the right half
    x += 0.01
    share = torch.zeros(4, 9, 2)
    share[..., 0], share[:, 5:, 0], share[:, 5:, 1] = 1, 0, 1  # token 1 attends to high frequencies across
    found = attention.over_picture(x, share)[..., 1] * x[0].norm(dim=-1)
    assert found[:, 8:].mean() > 3 * found[:, :8].mean()


@pytest.mark.parametrize("refiner", ["none", "rein", "set", "fada", "vpt"])
def test_a_batch_is_followed_from_images_to_classes(refiner):
    model = build_segmenter(Experiment.build("smoke", overrides=[f"model.refiner={refiner}"])).eval()
    rows = attention.shape_trace(model, torch.rand(2, 3, 64, 128))
    shapes = {row["stage"]: row["shape"] for row in rows}
    assert rows[0]["shape"] == "2 x 3 x 64 x 128" and rows[-1]["shape"] == "2 x 19 x 64 x 128"
    assert shapes["features after layer 4, to the head"] == "2 x 8 x 16 x 32"
    if refiner == "set":
        assert list(shapes)[1] == "into the refiner" and shapes["into the phase tokens"] == "2 x 72 x 32"  # 8 x 9 bins
