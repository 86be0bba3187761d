"""Domains: labelled (or unlabelled) sets of pictures as `datasets.Dataset`s, each with its own class set.

A domain is named `name[:split][@folder][~corruption]`, for example `scenes:night`, `acdc:fog-val@folder`,
`folder@my_photos`, `cityscapes@folder~noise3`. Trees and file names are in `layouts.py`, decoding in `decode.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import Dataset
from huggingface_hub import constants
from PIL import Image
from tqdm import tqdm

from setlib import scenes
from setlib.data import corruptions
from setlib.data.decode import UNREADABLE, LabelError, fitting, measure, read_label, read_picture
from setlib.data.labels import IGNORE, ClassSet, IdMap, id_map
from setlib.data.layouts import LAYOUTS, USUAL, Listing, Pair, list_pairs
from setlib.experiment import Data
from setlib.files import cache_folder, hub_answers, nearest

NAMES = ("scenes", "hub", *LAYOUTS)
ENDLESS = 500  # rendered scenes that "all" stands for
LABEL_COLUMNS = ("label", "labels", "annotation", "mask", "segmentation_mask", "semantic_segmentation")
say = cache(tqdm.write)  # each note once in a process


class Spec(NamedTuple):
    """A domain's name taken apart. corruption: a kind and its severity, "" and 0 without."""

    text: str
    name: str
    split: str
    folder: str
    corruption: str = ""
    severity: int = 0


class Sample(NamedTuple):
    """One decoded picture, (h, w, 3) uint8, and its raw label ids, (h, w) uint8 or None."""

    image: np.ndarray
    label: np.ndarray | None
    name: str


class Header(NamedTuple):
    """What the headers of a picture and its label say: a problem, or "", and the picture's size (w, h) as shown.

    turned: the picture is turned by EXIF, and sizes do not tell whether its label is.
    """

    problem: str
    size: tuple[int, int] | None = None
    turned: bool = False


@dataclass(frozen=True)
class Domain:
    """Pictures of one domain; `dataset` has the columns image, label (None where there is none), name and domain.

    image and label are paths, or bytes in a data set of the hub, where a name is split and row.
    """

    spec: Spec
    dataset: Dataset
    ids: IdMap
    has_labels: bool
    data: Data
    any_size: bool = False  # a label of another size is resized to its picture

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def class_set(self) -> ClassSet:
        """The classes that this domain is scored in."""
        return self.ids.class_set

    @property
    def keys(self) -> list[str]:
        """What tells pictures apart, whatever they are called: their files; of the hub, data set, split and row."""
        if self.spec.name != "hub":
            return [*map(os.path.realpath, self.dataset["image"])]
        place = self.spec.split.partition(":")[0]
        place = os.path.realpath(place) if os.path.exists(place) else place
        return [f"{place} {name}" for name in self.dataset["name"]]

    def to_score(self, label: np.ndarray | None) -> np.ndarray | None:
        """Raw label ids -> places in the class set that this domain is scored in, 255 ignored; None stays None."""
        return None if label is None else self.ids.to_score[label]

    def sample(self, index: int, long_edge: int = 0) -> Sample:
        """Picture `index`, decoded. Raises ValueError naming the file when it is damaged or holds unknown ids.

        long_edge: as in `read_picture`: a large JPEG may come smaller than its label.
        """
        try:
            sample = self.read(self.dataset[index], long_edge)
        except ValueError as error:
            raise ValueError(f"{self.spec.text}: {error}.") from None
        if self.spec.corruption:
            image = corruptions.corrupt(sample.image, self.spec.corruption, self.spec.severity, sample.name)
            sample = sample._replace(image=image)
        return sample

    def samples(self, indices: Iterable[int], long_edge: int = 0) -> Iterator[tuple[int, Sample]]:
        """Those that can be decoded, as `sample` gives them, with their places; another is an error unless skipped."""
        for index in indices:
            try:
                yield index, self.sample(index, long_edge)
            except ValueError as error:
                if self.data.on_error != "skip":
                    raise
                say(f"{error} Passed over.")

    def read(self, row: dict, long_edge: int = 0) -> Sample:
        """A row of `dataset`, decoded, not corrupted. Raises ValueError as `sample` does, without the domain's name."""
        name, damaged, label = row["name"], f"'{row['name']}'", None
        try:
            image = read_picture(_file(row["image"]), long_edge)
            if row["label"]:
                damaged = row["label"] if isinstance(row["label"], str) else f"label of '{name}'"
                label = read_label(_file(row["label"]), self.ids)
                label = fitting(label, _file(row["image"]), self.data.exif_labels == "stored")
        except LabelError as error:
            raise ValueError(f"label of '{name}' {error}") from None
        except UNREADABLE as error:
            raise ValueError(f"{damaged} cannot be decoded ({error}): download or export it again") from None
        if label is not None and label.shape != image.shape[:2] and not long_edge:
            if not self.any_size:
                raise ValueError(_other_size(name, image.shape[1::-1], label.shape[::-1]))
            label = np.asarray(Image.fromarray(label).resize(image.shape[1::-1], Image.Resampling.NEAREST))
        return Sample(image, label, name)

    def header(self, row: dict) -> Header:
        """Reads the headers of a row of `dataset`; all of a picture whose size is not its label's."""
        file = row["label"] or row["image"]
        try:
            label = measure(_file(row["label"]))[0] if row["label"] else None
            file = row["image"]
            size, stored, orientation = measure(_file(file), None if self.any_size else label)
        except UNREADABLE as error:
            return Header(f"{file} cannot be opened as a picture ({error})")
        if label in (None, size, stored) or self.any_size:
            return Header("", size, label is not None and orientation > 1 and size == stored)
        return Header(_other_size(row["name"], size, label), size)


def _file(value: Any) -> Any:
    """What Pillow opens: a path, or the bytes of a row of the hub."""
    return value if isinstance(value, str) else BytesIO(value["bytes"]) if value["bytes"] else value["path"]


def _other_size(name: str, image: tuple[int, int], label: tuple[int, int]) -> str:
    return f"image '{name}' is {image[0]} x {image[1]} but its label is {label[0]} x {label[1]}: they must be equal"


def short_name(domain: str) -> str:
    """A domain's name without its folder: `camvid:dusk@/data/camvid` is camvid:dusk, `folder@photos` folder:photos."""
    parts = [part.partition("@") for part in domain.split(" -> ")]
    return " -> ".join(a if ":" in a or not folder else f"{a}:{PurePath(folder).name}" for a, _, folder in parts)


def check_edges(data: Data) -> None:
    """Raises ValueError if data.eval_edges names a data set that there is not, or one twice."""
    names = [text.partition("=")[0] for text in data.eval_edges]
    for name in names:
        if name not in NAMES:
            raise ValueError(f"Option data.eval_edges names an unknown data set '{name}' ({nearest(name, NAMES)}).")
        if names.count(name) > 1:
            raise ValueError(f"Option data.eval_edges names {name} more than once.")


def parse(text: str) -> Spec:
    """Takes `name[:split][@folder][~corruption]` apart. Raises ValueError for what is unknown, naming what is near."""
    rest, corruption, severity = corruptions.take_apart(text)
    head, _, folder = rest.partition("@")
    name, _, split = head.partition(":")
    if name not in NAMES:
        raise ValueError(f"Unknown domain '{name}' in '{text}' ({nearest(name, NAMES)}): write name[:split][@folder].")
    if name == "scenes":
        split = split or "game"
        if split not in scenes.STYLES:
            raise ValueError(f"Unknown style '{split}' in '{text}' ({nearest(split, scenes.STYLES)}).")
    elif name == "hub":
        if not re.fullmatch(r"[\w./-]+(:[\w.-]+)?", split) and not os.path.exists(split.partition(":")[0]):
            raise ValueError(f"Domain '{text}' needs a data set of the hub: write hub:owner/name[:split][@id map].")
    elif not folder:
        raise ValueError(f"Domain '{text}' needs its folder: write {head}@FOLDER.")
    elif not os.path.isdir(os.path.expanduser(folder)):
        raise ValueError(f"Domain '{text}': folder {folder} does not exist; give the folder that holds the data set.")
    return Spec(text, name, split, folder, corruption, severity)


def load(text: str, data: Data, role: str = "target") -> Domain:
    """The domain called `text`, cut to data.train_images (role "source") or data.eval_images (role "target").

    Rendered scenes are made on first use; the source's layouts and the targets' are different streets.
    Raises ValueError with one sentence when the domain cannot be used.
    """
    spec = parse(text)
    limit = data.train_images if role == "source" else data.eval_images
    domain = (_from_hub if spec.name == "hub" else _from_files)(spec, data, role, limit)
    if role == "source":
        labels = (sample.label for _, sample in domain.samples(range(len(domain))))
        if all((domain.ids.to_train[label] == IGNORE).all() for label in labels):
            raise ValueError(f"Source '{text}' teaches nothing: every pixel of its labels is ignored.")
    return domain


load_domain = load  # its public name


def _from_files(spec: Spec, data: Data, role: str, limit: int) -> Domain:
    """A domain of pictures in a folder; what is passed over is said once."""
    text, (domain, listing) = spec.text, find(spec, data, role)
    if listing.problems:
        more = len(listing.problems) - 1
        more_text = f" (and {more} more like it; see: python -m setlib check {text})" if more else ""
        raise ValueError(f"{text}: {listing.problems[0]}{more_text}.")
    if 0 < limit < len(domain):  # evenly: neighbours in a video say little more than one of them
        chosen = np.linspace(0, len(domain) - 1, limit).round().astype(int)
        domain = replace(domain, dataset=domain.dataset.select(chosen))
    if role == "source" and not domain.has_labels:
        expected = Path(spec.folder) / LAYOUTS[spec.name][0].labels[0][0]
        hint = "".join(f" ({note})" for note in listing.notes)
        raise ValueError(f"Source '{text}' has no labels: a source needs {expected}{hint}.")
    headers = [domain.header(row) for row in domain.dataset]
    for problem in (header.problem for header in headers if header.problem):
        if data.on_error != "skip":
            raise ValueError(f"{text}: {problem}.")
        say(f"{text}: {problem}, passed over")
    for note in listing.notes + turned_note(headers, data):
        say(f"{text}: {note}")
    kept = [i for i, header in enumerate(headers) if not header.problem]
    if not kept:
        raise ValueError(f"{text}: none of its pictures can be used.")
    return replace(domain, dataset=domain.dataset.select(kept))


def find(spec: Spec, data: Data, role: str = "") -> tuple[Domain, Listing]:
    """A domain of files, uncut and unopened, and what is wrong with it as far as names tell. ValueError if it is empty.

    Rendered scenes are the first streets of a style; those of the source and those of the targets have other seeds.
    """
    if spec.name == "scenes":
        count = (data.train_images if role == "source" else data.eval_images) or ENDLESS
        seed, size = 2 * data.content_seed + (role != "source"), (data.height, data.width)
        folder = Path(spec.folder) if spec.folder else cache_folder() / "scenes"
        folder = folder / f"v{scenes.VERSION}-seed{seed}-{data.height}x{data.width}"
        made = scenes.cached_scenes(folder, spec.split, range(count), seed, size)
        listing = Listing([Pair(str(image), str(label), name) for image, label, name in made])
    else:
        listing = list_pairs(spec.name, spec.folder, spec.split, role, data.on_error == "skip")
    if not listing.pairs:
        more = f" ({listing.problems[0]})" if listing.problems else ""
        raise ValueError(f"Domain '{spec.text}' is empty: no picture in {spec.folder}{more}.")
    rows = Dataset.from_list([pair._asdict() | {"domain": spec.text} for pair in listing.pairs])
    has_labels, ids = all(pair.label for pair in listing.pairs), id_map(listing.ids, data.class_set)
    return Domain(spec, rows, ids, has_labels, data, listing.any_size), listing


def turned_note(headers: Iterable[Header], data: Data) -> list[str]:
    """The rule for labels of pictures that EXIF turns, where there are such."""
    number = sum(header.turned for header in headers)
    text = f"{number} pictures are turned by EXIF and sizes do not tell if their labels are: taken as drawn on "
    other = "the pictures as shown (data.exif_labels=stored: on the pixels as stored)"
    return [text + ("the pixels as stored" if data.exif_labels == "stored" else other)] if number else []


def _from_hub(spec: Spec, data: Data, role: str, limit: int) -> Domain:
    """A data set of the hub, or in its form, with a column of pictures and one of labels; a limited one is streamed."""
    name, _, split = spec.split.partition(":")
    if not (os.path.exists(name) or constants.HF_HUB_OFFLINE or hub_answers(constants.ENDPOINT)):
        raise ValueError(
            f"Domain '{spec.text}': {constants.ENDPOINT} does not answer; HF_HUB_OFFLINE=1 takes a copy from the cache."
        )
    kind, files = ("parquet", name) if os.path.isfile(name) else (name, None)
    try:
        rows = datasets.load_dataset(kind, data_files=files, split=split or None, streaming=bool(limit))
        if not split:
            split = next((usual for usual in USUAL[role] if usual in rows), next(iter(rows)))
            rows = rows[split]
    except (OSError, ValueError, ConnectionError) as error:
        raise ValueError(f"Domain '{spec.text}': data set {name} cannot be opened ({error}).") from None
    images = [column for column, kind in (rows.features or {}).items() if isinstance(kind, datasets.Image)]
    labels = [column for column in images if column.lower() in LABEL_COLUMNS]
    pictures = [column for column in images if column not in labels]
    if len(pictures) != 1 or len(labels) > 1:
        raise ValueError(
            f"Domain '{spec.text}' has the picture columns {', '.join(images) or 'none'}: expected one of pictures and "
            f"at most one of labels, called {' or '.join(LABEL_COLUMNS)}."
        )
    rows = rows.select_columns(images)
    for column in images:  # a damaged row is named when it is used
        rows = rows.cast_column(column, datasets.Image(decode=False))
    new = {pictures[0]: "image"} | {label: "label" for label in labels}
    rows = rows.rename_columns({column: name for column, name in new.items() if column != name})
    if limit:
        rows = Dataset.from_list(list(rows.take(limit)), features=rows.features)
    rows = rows.add_column("name", [f"{split} {i}" for i in range(len(rows))])
    rows = rows.add_column("domain", [spec.text] * len(rows))
    rows = rows if labels else rows.add_column("label", [None] * len(rows))
    labelled = [i for i, row in enumerate(rows.select_columns("label")) if row["label"]]
    if role == "source" and not labelled:
        columns = " or ".join(LABEL_COLUMNS)
        raise ValueError(f"Source '{spec.text}' has no labels: a source needs a column called {columns}.")
    if bare := len(labelled) and len(rows) - len(labelled):
        text = f"{spec.text}: {bare} picture{'s' * (bare != 1)} without a label"
        if data.on_error != "skip":
            raise ValueError(f"{text}; -o data.on_error=skip passes over them.")
        say(f"{text} passed over")
        rows = rows.select(labelled)
    return Domain(spec, rows, id_map(spec.folder or "cityscapes", data.class_set), bool(labelled), data)


def shared(source: str, text: str, data: Data) -> int:
    """How many of a domain's pictures, as they are scored, are among those of the source; 0 if that is not here."""
    try:
        name = parse(source).name
        if name == "scenes" or name != parse(text).name:
            return 0
        return len({*load(source, data, "source").keys} & {*load(text, data).keys})
    except ValueError:
        return 0
