"""Frozen features kept on disk: what the first layers make of a picture is computed once and found again.

An entry is named by all that decides it (weights, pixels, size, layers, precision), so that none is ever out of date.
The folder is bounded: what was used longest ago goes first. It may be deleted, and a process killed, at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from setlib.backbone import FrozenBackbone, Prefix
from setlib.experiment import cache_folder, write_atomic


class FeatureCache:
    """A folder of frozen features, one file a picture. limit: its size in bytes, at most; 0 = nothing is kept."""

    def __init__(self, limit: float, folder: Path | None = None) -> None:
        self.limit, self.folder = limit, folder or cache_folder() / "features"
        self.size = sum(size for _, size, _ in self._files()) if limit else 0

    def prefix(
        self, backbone: FrozenBackbone, images: Tensor, stop: int, layers: Sequence[int], precision: str = "float32"
    ) -> Prefix:
        """`backbone.prefix(images, stop, layers)`, image by image from the folder where it is there.

        precision: what autocast computes in; it is part of the name.
        """
        if not self.limit:
            return backbone.prefix(images, stop, layers)
        wanted = sorted({layer for layer in layers if layer < stop})
        colours = [*backbone.mean.flatten().tolist(), *backbone.std.flatten().tolist()]
        decides = f"{backbone.fingerprint} {colours} {stop} {wanted} {precision} {tuple(images.shape[1:])}"
        paths = [self._path(decides, image) for image in images]
        entries = [self._read(path) for path in paths]
        if missing := [i for i, entry in enumerate(entries) if entry is None]:
            made = backbone.prefix(images[missing], stop, wanted)
            for place, i in enumerate(missing):
                parts = {"hidden": made.hidden, **{f"map {layer}": made.maps[layer] for layer in wanted}}
                entries[i] = {name: part[place].cpu().contiguous() for name, part in parts.items()}
                entries[i]["is_tuple"] = torch.tensor(made.is_tuple)
                self._write(paths[i], entries[i])
        whole = {name: torch.stack([entry[name] for entry in entries]).to(images.device) for name in entries[0]}
        maps = {layer: whole[f"map {layer}"] for layer in wanted}
        return Prefix(whole["hidden"], maps, stop, bool(entries[0]["is_tuple"]))

    def _path(self, decides: str, image: Tensor) -> Path:
        digest = hashlib.sha256(f"{decides} {image.dtype}".encode())
        digest.update(image.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return self.folder / f"{digest.hexdigest()[:32]}.safetensors"

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        """An entry, marked as used now; None if there is none, or a damaged one."""
        try:
            entry = load_file(path)
            os.utime(path)
        except (OSError, SafetensorError):
            return None
        return entry

    def _write(self, path: Path, entry: dict[str, Tensor]) -> None:
        """Keeps an entry, if need be in place of the oldest; a folder that cannot be written is left alone for good."""
        content = save(entry)
        if len(content) > self.limit:
            return
        try:
            self._make_room(len(content))
            write_atomic(path, content)
            self.size += len(content)
        except (ValueError, OSError) as error:
            warnings.warn(f"Frozen features are no longer kept: {error}", stacklevel=2)
            self.limit = 0

    def _make_room(self, needed: int) -> None:
        """Deletes the entries that were used longest ago until `needed` bytes fit in."""
        if self.size + needed <= self.limit:
            return
        files = sorted(self._files())
        self.size = sum(size for _, size, _ in files)  # other processes write too
        for _, size, path in files:
            if self.size + needed <= self.limit:
                return
            path.unlink(missing_ok=True)
            self.size -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of everything in the folder, what a killed process left included."""
        found = []
        for path in self.folder.glob("*"):
            with contextlib.suppress(OSError):  # gone in the meantime
                found.append(((info := path.stat()).st_mtime, info.st_size, path))
        return found
