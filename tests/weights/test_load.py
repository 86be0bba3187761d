"""Weights come from the nearest place, checked, or not at all; a dead network never makes anyone wait."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers.utils import import_utils

from setlib import files
from setlib.backbone import IMAGENET, FrozenBackbone
from setlib.weights import load
from setlib.weights.load import load_backbone, load_model, normalisation
from setlib.weights.presets import PRESETS


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The hub is not within reach."""
    monkeypatch.setattr(load, "hub_answers", lambda endpoint: False)


def fingerprint(model) -> str:
    return FrozenBackbone(model).fingerprint


def test_tiny_random_is_the_same_every_time_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = load_model("tiny-random", seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert fingerprint(model) == fingerprint(load_model("tiny-random", seed=1))
    assert fingerprint(model) != fingerprint(load_model("tiny-random", seed=2))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    states = model(torch.randn(1, 3, 64, 64), output_hidden_states=True).hidden_states
    for before, after in zip(states, states[1:], strict=False):  # a layer changes what it reads
        assert (after - before).std() > 0.1 * before.std()
    with torch.no_grad():
        model.layernorm.bias[0] += 1e-6
    assert fingerprint(model) != fingerprint(load_model("tiny-random", seed=1))  # one value is seen


def test_a_folder_is_loaded_and_brings_its_normalisation(tmp_path):
    model = load_model("tiny-random", seed=4)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no preprocessor_config.json: ImageNet's"):
        assert normalisation(str(tmp_path)) == normalisation("tiny-random") == IMAGENET
    colours = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(colours))
    assert normalisation(str(tmp_path)) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert load_backbone(str(tmp_path)).fingerprint == fingerprint(model)
    resized = load_backbone(str(tmp_path), patch_size=12)
    assert resized.patch_size == 12 and resized.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])


def test_of_a_model_with_two_towers_the_vision_tower_is_taken(tmp_path):
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=dict(**tower, vocab_size=30), vision_config=dict(**tower, image_size=16, patch_size=8)
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    assert isinstance(load_model(str(tmp_path)), transformers.CLIPVisionModel)


def test_half_precision_weights_are_computed_with_in_float32(tmp_path):
    load_model("tiny-random").half().save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(str(tmp_path)).parameters()} == {torch.float32}


class Harm:
    """What would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_an_old_weight_file_is_read_as_weights_alone(tmp_path):
    model = load_model("tiny-random", seed=6)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert fingerprint(load_model(str(tmp_path))) == fingerprint(model)
    torch.save(model.state_dict() | {"harm": Harm(tmp_path / "harm")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no model that can be used: it is damaged or holds more than tensors"):
        load_model(str(tmp_path))
    assert not (tmp_path / "harm").exists()
    load_model("tiny-random").save_pretrained(tmp_path)  # safetensors first: the .bin beside it is not opened
    assert fingerprint(load_model(str(tmp_path))) == fingerprint(load_model("tiny-random"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-randon", "Unknown backbone 'tiny-randon'.*nearest: tiny-random"),
        ("./not/here", "There is no folder or file ./not/here"),
        ("~nobody-of-that-name/x/y", "There is no folder or file ~nobody"),
        ("{tmp}", "holds no config.json"),
    ],
)
def test_unknown_names_are_refused_with_a_cure(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_model(name.replace("{tmp}", str(tmp_path)))


def test_a_hub_model_without_cache_and_network_fails_fast_with_one_sentence(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(ValueError, match="hf download no-such-org/no-such-model --local-dir FOLDER") as caught:
        load_model("no-such-org/no-such-model")
    assert time.monotonic() - start < 5 and "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(load, "hub_answers", lambda endpoint: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="does not answer"):
        load_model("no-such-org/no-such-model")


def test_a_network_that_swallows_everything_is_left_after_the_probe(monkeypatch):
    monkeypatch.setattr(files, "PROBE_SECONDS", 0.2)

    def swallow(*args, **kwargs):
        time.sleep(3)
        raise TimeoutError

    monkeypatch.setattr(files.urllib.request, "urlopen", swallow)
    start = time.monotonic()
    assert not files.hub_answers("https://hub.invalid")
    assert time.monotonic() - start < 2


def test_presets_are_what_they_say():
    assert all(one.patch in (8, 14, 16) and one.licence for one in PRESETS.values())
    for one in PRESETS.values():  # a layer of a plain ViT has 12 C^2 weights, DINOv3's largest 16
        assert one.millions == pytest.approx(12 * one.layers * one.channels**2 / 1e6, rel=0.35)
    count = sum(p.numel() for p in load_model("tiny-random").parameters()) / 1e6
    assert PRESETS["tiny-random"][1:5] == (round(count, 2), 8, 4, 32)
    # DINOv2's sizes as published: what a model of them counts, without making its weights
    sizes = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "giant": (1536, 40)}
    for size, (width, depth) in sizes.items():
        for kind, name in (("dinov2", f"dinov2-{size}"), ("dinov2_with_registers", f"dinov2-reg-{size}")):
            options = dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, patch_size=14)
            options |= dict(image_size=518, use_swiglu_ffn=size == "giant")
            config = transformers.AutoConfig.for_model(kind, **options)
            with torch.device("meta"):
                count = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters()) / 1e6
            assert PRESETS[name][1:5] == (round(count, 2), 14, depth, width)


def fill_cache(hub: Path, repository: str, model) -> Path:
    """The folder of a model in the hub's cache."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    model.save_pretrained(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    return folder / "snapshots" / "abc"


def test_a_preset_in_the_hubs_cache_is_found_loaded_and_listed_without_a_network(tmp_path):
    model = load_model("tiny-random", seed=7)
    folder = fill_cache(tmp_path / "hub", "facebook/dinov2-small", model)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    script = """
from setlib.__main__ import main
from setlib.weights.load import load_backbone, normalisation
from setlib.weights.presets import is_here
assert is_here("dinov2-small") and not is_here("dinov2-base")
print(load_backbone("dinov2-small").fingerprint, normalisation("dinov2-small")[0])
main(["backbones"])
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "SETLIB_CACHE": str(tmp_path / "own")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    first, *table = done.stdout.splitlines()
    assert first == f"{fingerprint(model)} (0.1, 0.2, 0.3)"
    here = {line.split()[0]: line.split()[4] for line in table if line.startswith(("dinov2", "tiny"))}
    assert [name for name, value in here.items() if value == "yes"] == ["tiny-random", "dinov2-small"]


def test_timms_models_bring_their_normalisation_and_name_the_extra(tmp_path, monkeypatch):
    colours = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = {"architecture": "eva02_small_patch14_224", "num_classes": 0, "pretrained_cfg": colours}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert normalisation(str(tmp_path)) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    monkeypatch.setattr(import_utils, "is_timm_available", lambda: False)
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: False, "{0} requires timm"))
    with pytest.raises(ValueError, match=r"it needs the package timm: install it with pip install -e '.\[timm\]'"):
        load_model(str(tmp_path))


def test_a_cached_copy_that_is_damaged_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = fill_cache(tmp_path, "facebook/dinov2-base", load_model("tiny-random"))
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="The copy of facebook/dinov2-base in the cache .* cannot be used"):
        load_model("dinov2-base")


def break_folder(folder, kind):
    model = load_model("tiny-random")
    model.save_pretrained(folder)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if kind == "half the weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "other weights":
        save_file({"x": torch.ones(1)}, weights, metadata={"format": "pt"})
    elif kind == "an empty bin":
        weights.unlink()
        (folder / "pytorch_model.bin").touch()
    elif kind == "code":
        (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "mod.Cfg"}}))
        (folder / "mod.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    elif kind == "language":
        sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
        transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    elif isinstance(kind, dict):
        (folder / "config.json").write_text(json.dumps(config | kind))
    else:
        (folder / "preprocessor_config.json").write_text(kind)


@pytest.mark.filterwarnings("ignore:.*has no preprocessor_config")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("half the weights", "can be used"),
        ("other weights", r"can be used: embeddings.cls_token, .* missing \(\d+ in all\)"),
        ("an empty bin", "can be used"),
        ("code", "can be used"),
        ("language", "BertModel has no patches"),
        ({"num_hidden_layers": 6}, r"encoder.layer.4.* missing"),
        ({"hidden_size": 64}, "the sizes of its tensors do not fit"),
        ({"hidden_act": "nope"}, "can be used"),
        ("[]", "preprocessor_config.json cannot be read as the settings of a model"),
        ("{", "preprocessor_config.json cannot be read as the settings of a model"),
        ('{"image_mean": 1.0}', "preprocessor_config.json cannot be read as the settings of a model"),
        ('{"image_mean": ["a", "b", "c"]}', "preprocessor_config.json cannot be read as the settings of a model"),
        ('{"image_mean": [0, 0], "image_std": [1, 1, 1]}', "expected three numbers each"),
        ('{"image_mean": [0, 0, 0], "image_std": [1, 1, 0]}', "expected three numbers each, std above 0"),
    ],
)
def test_a_folder_that_is_no_backbone_is_one_sentence(kind, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    break_folder(tmp_path, kind)
    capsys.readouterr()
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(str(tmp_path))
    assert str(tmp_path) in str(caught.value) or kind == "language"
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    assert "MISSING" not in capsys.readouterr().err
