"""Resized copies of data sets, in the same tree and under the same names."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from setlib.data import domains
from setlib.data.decode import measure
from setlib.experiment import Data
from setlib.files import LOCK, alone, write_atomic

MARK = "prepared.json"


def prepare(text: str, out: Path, short_edge: int, data: Data) -> int:
    """Writes a resized copy of a domain into a folder, in the same tree and under the same names; returns its pairs.

    Pictures are resized antialiased, labels by nearest; what is smaller stays. Labels are written as PNGs of raw ids
    (polygons too). A copy that was cut short goes on. Raises ValueError for a folder that holds anything else.
    """
    spec, mark = domains.parse(text), out / MARK
    if spec.name in ("scenes", "hub"):
        raise ValueError(f"Domain '{text}' has no folder of files to copy.")
    if spec.corruption:
        raise ValueError(f"Prepare the clean set, and add ~{spec.corruption}{spec.severity} where the copy is used.")
    domain = domains.load(text, replace(data, eval_images=0), role="")
    root = Path(os.path.expanduser(spec.folder))
    made = json.dumps({"domain": spec.name, "from": str(root.resolve()), "short_edge": short_edge}, indent=1)
    if root.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} lies in the data set itself: name a folder outside of {root.resolve()}.")
    with alone(out / LOCK):
        if any(out.glob("[!.]*")) and not (mark.is_file() and mark.read_text(encoding="utf-8") == made):
            for path in out.glob(f"{LOCK}*"):
                path.unlink()
            raise ValueError(f"{out} is not empty and no copy of {text} at {short_edge}: name another folder.")
        write_atomic(mark, made)
        for extra in ("splits.json", "split.mat"):
            if (root / extra).is_file():
                write_atomic(out / extra, (root / extra).read_bytes())
        skipped = 0
        for index in tqdm(range(len(domain)), desc=f"prepare {text}", unit="img"):
            try:
                _copy(domain, index, root, out, short_edge)
            except ValueError as error:
                if data.on_error != "skip":
                    raise
                skipped += 1
                domains.say(f"skipped ({skipped}): {error}")
        return len(domain) - skipped


def _copy(domain: domains.Domain, index: int, root: Path, out: Path, short_edge: int) -> None:
    """One resized pair; a file that is there already is whole."""
    row = domain.dataset[index]
    paths = [out / Path(row[kind]).relative_to(root) for kind in ("image", "label") if row[kind]]
    paths = [path.with_name(path.name.replace("_polygons.json", "_labelids.png")) for path in paths]
    if away := [path for path in paths if not path.parent.resolve().is_relative_to(out.resolve())]:
        raise ValueError(f"{away[0].parent} is a link out of {out}: name another folder.")
    if all(path.is_file() for path in paths):
        return
    short, long = sorted(measure(row["image"])[0])
    factor = min(1.0, short_edge / short)
    sample = domain.sample(index, long_edge=2 * round(long * factor))
    wide = sample.image.shape[1] > sample.image.shape[0]
    size = tuple(max(1, round(side * factor)) for side in ((long, short) if wide else (short, long)))
    if sample.label is not None:
        label = domain.ids.palette[sample.label] if domain.ids.form == "colours" else sample.label
        _save(Image.fromarray(label).resize(size, Image.Resampling.NEAREST), paths[1])
    image = Image.fromarray(sample.image)
    _save(image.resize(size, Image.Resampling.LANCZOS) if factor < 1 else image, paths[0])


def _save(picture: Image.Image, path: Path) -> None:
    quality = {"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    picture.save(file := BytesIO(), Image.registered_extensions()[path.suffix.lower()], **quality)
    write_atomic(path, file.getvalue())
