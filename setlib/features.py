"""Frozen features kept on disk: what the first layers make of a picture is computed once and found again.

An entry is named by all that decides it (weights, pixels, size, layers, precision), so that none is ever out of date.
The folder is bounded: what was used longest ago goes first. It may be deleted, and a process killed, at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from setlib.backbone import FrozenBackbone, Prefix
from setlib.files import cache_folder, write_atomic

ABANDONED = 600  # seconds after which a file that was never finished is nobody's


class FeatureCache:
    """A folder of frozen features, one file a picture. limit: its size in bytes, at most; 0 = nothing is kept."""

    def __init__(self, limit: float, folder: Path | None = None) -> None:
        self.limit, self.folder = limit, folder or cache_folder() / "features"

    def prefix(
        self, backbone: FrozenBackbone, images: Tensor, stop: int, layers: Sequence[int], precision: str = "float32"
    ) -> Prefix:
        """`backbone.prefix(images, stop, layers)`, image by image from the folder where it is there.

        precision: what autocast computes in; it is part of the name.
        """
        if not self.limit:
            return backbone.prefix(images, stop, layers)
        wanted = sorted({*layers} - {stop})
        decides = [backbone.fingerprint, _configuration(backbone), stop, wanted, precision, images.device.type]
        paths = [self._path(f"{decides} {tuple(image.shape)} {image.dtype}", image) for image in images]
        entries = [self._read(path, stop, wanted) for path in paths]
        if missing := [i for i, entry in enumerate(entries) if entry is None]:
            made = backbone.prefix(images[missing], stop, wanted).map(Tensor.cpu)
            for place, i in enumerate(missing):
                entries[i] = made.map(lambda part, place=place: part[place : place + 1].contiguous())
                self._write(paths[i], entries[i])
        return Prefix.cat(entries).map(lambda part: part.to(images.device))

    def _path(self, decides: str, image: Tensor) -> Path:
        digest = hashlib.sha256(decides.encode())
        digest.update(image.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return self.folder / f"{digest.hexdigest()[:32]}.safetensors"

    def _read(self, path: Path, stop: int, layers: Sequence[int]) -> Prefix | None:
        """An entry, marked as used now; None if there is none, or a damaged one."""
        try:
            entry = load_file(path)
            os.utime(path)
            maps = {layer: entry[f"map {layer}"] for layer in layers}
            return Prefix(entry["hidden"], maps, stop, bool(entry["is_tuple"]))
        except (OSError, KeyError, SafetensorError):
            return None

    def _write(self, path: Path, entry: Prefix) -> None:
        """Keeps an entry, if need be in place of the oldest; a folder that cannot be written is left alone for good."""
        parts = {f"map {layer}": part for layer, part in entry.maps.items()}
        content = save(parts | {"hidden": entry.hidden, "is_tuple": torch.tensor(entry.is_tuple)})
        if len(content) > self.limit:
            return
        try:
            self._make_room(len(content))
            write_atomic(path, content)
        except (ValueError, OSError) as error:
            warnings.warn(f"Frozen features are no longer kept: {error}", stacklevel=2)
            self.limit = 0

    def _make_room(self, needed: int) -> None:
        """Deletes the entries that were used longest ago until `needed` bytes fit in."""
        files = sorted(self._files())  # counted anew each time: other processes write too
        size = sum(size for _, size, _ in files)
        for used, freed, path in files:
            if size + needed <= self.limit:
                return
            if path.suffix == ".safetensors" or time.time() - used > ABANDONED:  # else another process is writing it
                path.unlink(missing_ok=True)
                size -= freed

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of everything in the folder, what a killed process left included."""
        found = []
        for path in self.folder.glob("*"):
            with contextlib.suppress(OSError):  # gone in the meantime
                if path.is_file():
                    found.append(((info := path.stat()).st_mtime, info.st_size, path))
        return found


def _configuration(backbone: FrozenBackbone) -> str:
    """What else decides the features: colours, and the model's own settings, such as the number of heads."""
    settings = {k: v for k, v in backbone.model.config.to_dict().items() if not re.search("version|name_or_path", k)}
    colours = [*backbone.mean.flatten().tolist(), *backbone.std.flatten().tolist()]
    return f"{colours} {json.dumps(settings, sort_keys=True, default=str)}"
