"""Predictions as files: an overlay and train ids of each picture; on demand a data set's label ids, and its colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL import Image

from setlib.data.decode import read_picture
from setlib.data.labels import CITYSCAPES, IGNORE, LABELS, id_map
from setlib.data.layouts import LAYOUTS
from setlib.files import nearest
from setlib.inference import predict
from setlib.segmenter import Segmenter

ALWAYS, WITH_LABELS = ("overlay", "trainids"), ("labelids", "colours")  # how the names of the files end


def output_names(images: Sequence[Path]) -> list[str]:
    """One name per picture: its stem; where that is taken, with folder, suffix and at last a number."""
    names: list[str] = []
    for path in images:
        long = f"{path.absolute().parent.name}_{path.stem}"
        wider = (path.stem, long, f"{long}_{path.suffix[1:]}")
        taken = {name.lower() for name in names}  # some file systems do not tell A from a
        names.append(next(n for n in chain(wider, (f"{long}_{i}" for i in count(2))) if n.lower() not in taken))
    return names


def label_ids(name: str) -> tuple[np.ndarray, np.ndarray]:
    """From train ids to the ids that a data set's labels hold, (256,) uint8, and the colours of these, (256, 3) uint8.

    Where several ids are one class: the one with the class's colour and name (road, not a marking on it), else the
    first. 255 where the data set has no such class.
    name: of a data set, or of an id map in data/labels. Raises ValueError if it is neither.
    """
    maps = {path.stem: path.stem for path in LABELS.glob("*.csv")}
    maps |= {known: layouts[0].labels[0][1] for known, layouts in LAYOUTS.items()}
    if name not in maps:
        raise ValueError(f"Unknown data set '{name}' of --labels ({nearest(name, maps)}).")
    ids, to_ids = id_map(maps[name]), np.full(256, IGNORE, np.uint8)
    for train_id, place in enumerate(ids.class_set.places):
        colour, name = ids.class_set.colours[place], ids.class_set.classes[place].lower()
        scored = {raw: text.partition(" (")[0].lower() for raw, text in ids.names.items() if ids.to_score[raw] == place}
        own = sorted(scored, key=lambda raw: (tuple(ids.palette[raw]) != colour, scored[raw] != name))
        to_ids[train_id] = (own or [IGNORE])[0]
    return to_ids, ids.palette


def predict_picture(model: Segmenter, path: Path, labels: tuple | None = None) -> dict[str, bytes]:
    """PNGs at the picture's own size: "overlay", the classes' colours over it, and "trainids".

    labels: of `label_ids`, for "labelids" and "colours" too. Raises ValueError if the picture cannot be read.
    """
    picture = read_picture(path)
    predicted = predict(model, picture)
    made = {"overlay": picture // 2 + CITYSCAPES.palette[predicted] // 2, "trainids": predicted}
    if labels:
        to_ids, colours = labels
        made |= {"labelids": to_ids[predicted], "colours": colours[to_ids[predicted]]}
    files = {kind: io.BytesIO() for kind in made}
    for kind, pixels in made.items():
        Image.fromarray(pixels.astype(np.uint8)).save(files[kind], "PNG")
    return {kind: file.getvalue() for kind, file in files.items()}
