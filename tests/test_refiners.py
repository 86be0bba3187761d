"""Baselines are the published ones in size and form, learn where they should, and say what they need."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from setlib import baselines
from setlib.checkpoint import build_segmenter, load_segmenter, save_segmenter
from setlib.experiment import Experiment
from setlib.features import SharedFeatures
from setlib.refiners import REFINERS, build_refiner

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is an optional extra")
LORA = pytest.param("lora", marks=needs_peft)
BASELINES = ["none", "full", LORA, "soma", "vpt", "adaptformer", "rein", "fada", "set"]


def build(name):
    return build_segmenter(Experiment.build("smoke", overrides=[f"model.refiner={name}"]))


def images():
    return torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))


# Sizes at C = 1024 and 24 layers, as Rein's table prints them (LoRA 0.79 M, VPT 3.69 M, AdaptFormer 3.17 M), and ours
SIZES = {"none": 0, "vpt": 3_686_400, "adaptformer": 3_171_840, "rein": 2_990_081, "fada": 5_520_897, "set": 5_520_896}
SIZES |= {"set-released": 7_546_881}


@pytest.mark.parametrize(("name", "expected"), SIZES.items())
def test_trainable_values_at_the_papers_size(name, expected):
    refiner = build_refiner(name, range(1, 25), 1024, num_tokens=100, rank=16, query_channels=256)
    assert sum(p.numel() for p in refiner.parameters() if p.requires_grad) == expected


def test_every_name_is_a_refiner_and_another_names_the_nearest():
    for name in REFINERS:
        if name != "lora":  # an extra
            assert isinstance(build_refiner(name, (2, 5), 12), nn.Module)
    with pytest.raises(ValueError, match="Unknown refiner 'rien' .nearest: rein"):
        build_refiner("rien", (2, 5), 12)


@needs_peft
def test_lora_has_the_published_size():
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, patch_size=8, image_size=32)
    model = Dinov2Model(config).requires_grad_(False)
    build_refiner("lora", (1, 3), 64, 100, 16, lora_rank=8).adapt(model, model.encoder.layer)
    learns = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 2 * 64 * 8  # at L: 786,432
    assert all(".0." in name or ".2." in name for name in learns) and len(learns) == 8


def test_lora_without_peft_names_the_extra(monkeypatch):
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lora needs the package peft: install it with pip install -e '.\[lora\]'"):
        build("lora")


@pytest.mark.parametrize("name", BASELINES)
def test_what_learns_is_what_is_counted_saved_and_loaded(name, tmp_path):
    model = build(name)
    learns = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert sum(model.num_trainable().values()) == sum(p.numel() for p in learns.values())
    in_backbone = {key for key in learns if key.startswith("backbone.")}
    assert bool(in_backbone) == (name in ("full", "lora", "soma")) == bool(model.num_trainable()["backbone"])
    with torch.no_grad():
        for p in learns.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    save_segmenter(model.eval(), tmp_path)
    again = load_segmenter(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(images()), again(images()))


@pytest.mark.parametrize("name", BASELINES)
def test_all_that_learns_gets_a_gradient_and_frozen_layers_can_be_kept(name):
    model = build(name).train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):  # some maps start at zero
        optimiser.zero_grad()
        (model(images()) * torch.randn(2, 19, 8, 16, generator=torch.Generator().manual_seed(3))).sum().backward()
        optimiser.step()
    never = {key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not never
    if model.frozen_until:
        frozen = SharedFeatures([model])(images())
        torch.testing.assert_close(model(images(), frozen), model(images()), rtol=1e-5, atol=1e-5)
    expected = {"full": 0, "lora": 2, "soma": 2, "vpt": 2, "none": 4}.get(name, 3)
    assert model.frozen_until == expected


def test_a_model_that_changes_frozen_features_leaves_them_aside():
    model, plain = build("full"), build("none")
    frozen = SharedFeatures([plain])(images())
    with torch.no_grad():
        model.backbone.model.embeddings.cls_token.add_(5)
        assert torch.equal(model(images(), frozen), model(images()))
        assert not torch.equal(model.backbone(images())[4], plain.backbone(images())[4])


def test_adapters_are_their_formula():
    refiner, x = build_refiner("adaptformer", (2, 5), 12, 7, 3, adapter_width=4), torch.randn(2, 3, 4, 12)
    for p in refiner.parameters():
        nn.init.normal_(p)
    hidden = (x @ refiner.down[1].weight.T + refiner.down[1].bias).clamp(min=0)
    expected = x + 0.1 * (hidden @ refiner.up[1].weight.T + refiner.up[1].bias)
    torch.testing.assert_close(refiner(x, 5), expected)


def test_fada_is_its_formula():
    torch.manual_seed(0)
    refiner, x = build_refiner("fada", (2, 5), 12, 7, 3), torch.randn(2, 4, 6, 12)
    for p in refiner.parameters():
        nn.init.normal_(p, std=0.5)
    bands = baselines.split_haar(x)
    changed = [refiner.low(bands[0].flatten(1, 2), 1), *(refiner.high(b.flatten(1, 2), 1) for b in bands[1:])]
    expected = x + refiner.scale * baselines.join_haar(torch.stack(changed).view_as(bands), (4, 6))
    torch.testing.assert_close(refiner(x, 5), expected)


# The Haar transform over the patch grid


@settings(max_examples=40)
@given(st.tuples(st.integers(1, 13), st.integers(1, 13)), st.integers(0, 2**31))
def test_haar_bands_joined_are_the_features_and_keep_the_energy(size, seed):
    x = torch.randn(2, *size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bands = baselines.split_haar(x)
    assert bands.shape == (4, 2, -(-size[0] // 2), -(-size[1] // 2), 3)
    torch.testing.assert_close(baselines.join_haar(bands, size), x)
    if size[0] % 2 == size[1] % 2 == 0:
        torch.testing.assert_close(bands.square().sum(), x.square().sum())


def test_haar_bands_are_the_mean_and_the_differences_of_each_square():
    x = torch.randn(2, 4, 6, 3, generator=torch.Generator().manual_seed(0))
    one, right, below, across = (x[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    signs = ((1, 1, 1), (-1, 1, -1), (1, -1, -1), (-1, -1, 1))  # of right, below and across
    for band, (r, b, a) in zip(baselines.split_haar(x), signs, strict=True):
        torch.testing.assert_close(band, (one + r * right + b * below + a * across) / 2)
    assert not baselines.split_haar(torch.ones(1, 5, 7, 2))[1:].any()  # odd sides repeat their last patches
    assert baselines.split_haar(x.half()).dtype == torch.float32
