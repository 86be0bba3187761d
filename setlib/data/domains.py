"""Domains: labelled (or unlabelled) sets of pictures as `datasets.Dataset`s, each with its own class set.

A domain is named `name[:split][@folder][~corruption]`, for example `scenes:night`, `acdc:fog-val@folder`,
`folder@my_photos`, `cityscapes@folder~noise3`. Trees and file names are in `readers.py`, decoding in `pictures.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image as PILImage
from tqdm import tqdm

from setlib import scenes
from setlib.data import corruptions
from setlib.data.decode import TURNED, UNREADABLE, LabelError, fitting, measure, read_label, read_picture
from setlib.data.labels import IGNORE, ClassSet, IdMap, id_map
from setlib.data.layouts import LAYOUTS, USUAL, Listing, Pair, list_pairs
from setlib.experiment import Data
from setlib.files import cache_folder, hub_answers, nearest

NAMES = ("scenes", "hub", *LAYOUTS)
ENDLESS = 500  # rendered scenes that "all" stands for
LABEL_COLUMNS = ("label", "labels", "annotation", "mask", "segmentation_mask", "semantic_segmentation")


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


@dataclass(frozen=True)
class Domain:
    """Pictures of one domain; `dataset` has the columns image, label (when there are labels), name, domain.

    image and label are paths, or bytes in a data set of the hub, where a name is split and row.
    """

    spec: Spec
    dataset: Dataset
    ids: IdMap
    has_labels: bool
    any_size: bool = False  # a label of another size is resized to its picture
    stored: bool = False  # labels were drawn on pixels as they are stored, where their sizes do not tell
    skip: bool = False  # `samples` passes over what is damaged

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def class_set(self) -> ClassSet:
        """The classes that this domain is scored in."""
        return self.ids.class_set

    @property
    def keys(self) -> list[str]:
        """What tells pictures apart, whatever they are called: their files; of the hub, split and row."""
        if self.spec.name == "hub":
            return [f"{_place(self.spec)} {name}" for name in self.dataset["name"]]
        return [*map(os.path.realpath, self.dataset["image"])]

    def to_score(self, label: np.ndarray | None) -> np.ndarray | None:
        """Raw label ids -> places in the class set that this domain is scored in, 255 ignored; None stays None."""
        return None if label is None else self.ids.to_score[label]

    def sample(self, index: int, long_edge: int = 0) -> Sample:
        """Picture `index`, decoded. Raises ValueError naming the file when it is damaged or holds unknown ids.

        long_edge: as in `read_picture`: a large JPEG may come smaller than its label.
        """
        row, label = self.dataset[index], None
        name, picture = row["name"], _file(row["image"])
        try:
            image = read_picture(picture, long_edge)
            if self.has_labels:
                label = self._label(row, image.shape[:2], bool(long_edge))
        except LabelError as error:
            raise ValueError(f"{self.spec.text}: label of '{name}' {error}.") from None
        except UNREADABLE as error:
            raise ValueError(
                f"{self.spec.text}: '{name}' cannot be decoded ({error}): download or export it again."
            ) from None
        if self.spec.corruption:
            image = corruptions.corrupt(image, self.spec.corruption, self.spec.severity, name)
        return Sample(image, label, name)

    def samples(self, indices: Iterable[int]) -> Iterator[tuple[int, Sample]]:
        """Those pictures that can be decoded, with their places; the first other one is an error unless `skip`."""
        for index in indices:
            try:
                yield index, self.sample(index)
            except ValueError as error:
                if not self.skip:
                    raise
                say(f"{error} Passed over.")

    def _label(self, row: dict, size: tuple[int, int], smaller: bool) -> np.ndarray:
        """The raw ids of a label, of its picture's size."""
        label = fitting(read_label(_file(row["label"]), self.ids), _file(row["image"]), self.stored)
        if label.shape != size and not smaller:
            if not self.any_size:
                raise LabelError(other_size(label.shape, size))
            label = np.asarray(PILImage.fromarray(label).resize(size[::-1], PILImage.Resampling.NEAREST))
        return label

    def _teaches_nothing(self, row: dict) -> bool:
        """Whether a label can be read and all of it is ignored."""
        try:
            return bool((self.ids.to_train[read_label(_file(row["label"]), self.ids)] == IGNORE).all())
        except UNREADABLE:
            return False


def _file(value: Any) -> Any:
    """What Pillow opens: a path, or the bytes of a row of the hub."""
    return value if isinstance(value, str) else BytesIO(value["bytes"]) if value["bytes"] else value["path"]


@cache
def say(note: str) -> None:
    """Says something once in a process."""
    tqdm.write(note)


def other_size(label: tuple[int, ...], image: tuple[int, ...]) -> str:
    """What is wrong with a label (h, w) of another size than its picture."""
    return f"is {label[1]} x {label[0]} but its image is {image[1]} x {image[0]}"


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
    if role == "source" and not domain.has_labels:
        raise ValueError(f"Source '{text}' has no labels: a source needs a column called {' or '.join(LABEL_COLUMNS)}.")
    if role == "source" and all(map(domain._teaches_nothing, domain.dataset)):
        raise ValueError(f"Source '{text}' teaches nothing: every pixel of its labels is ignored; are its ids right?")
    return domain


def _from_files(spec: Spec, data: Data, role: str, limit: int) -> Domain:
    """A domain of pictures in a folder; what is passed over is said once."""
    text, skip, found = spec.text, data.on_error == "skip", find(spec, data, role)
    if found.problems:
        more = len(found.problems) - 1
        more_text = f" (and {more} more like it; see: python -m setlib check {text})" if more else ""
        raise ValueError(f"{text}: {found.problems[0]}{more_text}.")
    if not found.pairs:
        raise ValueError(f"Domain '{text}' is empty: no picture in {spec.folder}.")
    pairs = found.pairs if spec.name == "scenes" else _evenly(found.pairs, limit)
    has_labels = all(pair.label for pair in pairs)
    if role == "source" and not has_labels:
        expected = Path(spec.folder) / LAYOUTS[spec.name][0].labels[0][0]
        hint = "".join(f" ({note})" for note in found.notes)
        raise ValueError(f"Source '{text}' has no labels: a source needs {expected}{hint}.")
    heads = [header(pair, found.any_size) for pair in pairs]
    for problem in (one.problem for one in heads if one.problem):
        if not skip:
            raise ValueError(f"{text}: {problem}.")
        say(f"{text}: {problem}, passed over")
    for note in found.notes + turned_note(sum(one.turned for one in heads), data):
        say(f"{text}: {note}")
    pairs = [pair for pair, one in zip(pairs, heads, strict=True) if not one.problem]
    if not pairs:
        raise ValueError(f"{text}: none of its pictures can be used.")
    columns = {"image": [str(p.image) for p in pairs], "name": [p.name for p in pairs], "domain": [text] * len(pairs)}
    if has_labels:
        columns["label"] = [str(p.label) for p in pairs]
    stored, ids = data.exif_labels == "stored", id_map(found.ids, data.class_set)
    return Domain(spec, Dataset.from_dict(columns), ids, has_labels, found.any_size, stored, skip)


def find(spec: Spec, data: Data, role: str = "") -> Listing:
    """The pairs of a domain, uncut, and what is wrong with them as far as names tell."""
    if spec.name != "scenes":
        return list_pairs(spec.name, spec.folder, spec.split, role, data.on_error == "skip")
    return Listing(_scene_pairs(spec, data, role or "target"), "cityscapes", False, [])


def _from_hub(spec: Spec, data: Data, role: str, limit: int) -> Domain:
    """A data set of the hub, or in its form, with a column of pictures and one of labels; a limited one is streamed."""
    from huggingface_hub import constants

    name, _, split = spec.split.partition(":")
    if not (Path(name).exists() or constants.HF_HUB_OFFLINE or hub_answers(constants.ENDPOINT)):
        raise ValueError(
            f"Domain '{spec.text}': {constants.ENDPOINT} does not answer; HF_HUB_OFFLINE=1 takes a copy from the cache."
        )
    kind, files = ("parquet", name) if Path(name).is_file() else (name, None)
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
    rows = rows.select_columns(pictures + labels)
    for column in pictures + labels:  # a damaged row is named when it is used
        rows = rows.cast_column(column, datasets.Image(decode=False))
    if limit:
        rows = Dataset.from_list(list(rows.take(limit)), features=rows.features)
    rows = rows.rename_columns({pictures[0]: "image"} | {label: "label" for label in labels})
    rows = rows.add_column("name", [f"{split} {i}" for i in range(len(rows))])
    rows = rows.add_column("domain", [spec.text] * len(rows))
    kept = [i for i, row in enumerate(rows.select_columns("label")) if row["label"]] if labels else []
    if 0 < len(kept) < len(rows):
        text = f"{len(rows) - len(kept)} picture{'s' * (len(rows) - len(kept) != 1)} without a label"
        if data.on_error != "skip":
            raise ValueError(f"{spec.text}: {text}; -o data.on_error=skip passes over them.")
        say(f"{spec.text}: {text} passed over")
        rows = rows.select(kept)
    ids = id_map(spec.folder or "cityscapes", data.class_set)
    return Domain(spec, rows, ids, bool(kept), stored=data.exif_labels == "stored", skip=data.on_error == "skip")


def _place(spec: Spec) -> str:
    """The folder of a domain, or its data set of the hub."""
    place = spec.split.partition(":")[0] if spec.name == "hub" else os.path.expanduser(spec.folder)
    return place if spec.name == "hub" and not os.path.exists(place) else os.path.realpath(place)


def shared(source: str, text: str, data: Data) -> int:
    """How many of a domain's pictures, as they are scored, are among those of the source; 0 if that is not here."""
    try:
        one, other = parse(source), parse(text)
        if one.name == "scenes" or (one.name, _place(one)) != (other.name, _place(other)):
            return 0
        return len({*load(source, data, "source").keys} & {*load(text, data).keys})
    except ValueError:
        return 0


def _scene_pairs(spec: Spec, data: Data, role: str) -> list[Pair]:
    """The first streets of a style; those of the source and those of the targets have different seeds."""
    count = (data.train_images if role == "source" else data.eval_images) or ENDLESS
    seed = 2 * data.content_seed + (role != "source")
    folder = Path(spec.folder) if spec.folder else cache_folder() / "scenes"
    folder = folder / f"v{scenes.VERSION}-seed{seed}-{data.height}x{data.width}"
    made = scenes.cached_scenes(folder, spec.split, range(count), seed, (data.height, data.width))
    return [Pair(image, label, name) for image, label, name in made]


def _evenly(pairs: list[Pair], limit: int) -> list[Pair]:
    """At most `limit` pairs (0 = all), evenly spaced: neighbours in a video say little more than one of them."""
    if not limit or limit >= len(pairs):
        return pairs
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, limit).round().astype(int)]


class Header(NamedTuple):
    """What is wrong with a pair as far as the files' headers tell, or "", and its picture's size (w, h) as shown.

    turned: the picture is turned by EXIF, and sizes do not tell whether its label is.
    """

    problem: str
    size: tuple[int, int] | None = None
    turned: bool = False


def header(pair: Pair, any_size: bool = False, whole: bool = False) -> Header:
    """Reads the headers of a pair; all of a picture whose size is not its label's, or with `whole`."""
    path = pair.label or pair.image
    try:
        label = measure(path)[0]
        path = pair.image
        for decoded in (whole, True):
            size, orientation = measure(path, decoded)
            own = size[::-1] if orientation >= TURNED else size
            if any_size or label in (size, own):
                return Header("", size, pair.label is not None and orientation > 1 and size == own)
    except (*UNREADABLE, KeyError, TypeError) as error:
        what = f"'{pair.name}' cannot be decoded" if whole else f"{path} cannot be opened as a picture"
        return Header(f"{what} ({error})")
    text = "image '{}' is {} x {} but its label is {} x {}: they must be equal"
    return Header(text.format(pair.name, *size, *label), size)


def turned_note(number: int, data: Data) -> list[str]:
    """The rule for labels of pictures that EXIF turns, where there are such."""
    text = f"{number} pictures are turned by EXIF and sizes do not tell if their labels are: taken as drawn on "
    other = "the pictures as shown (data.exif_labels=stored: on the pixels as stored)"
    return [text + ("the pixels as stored" if data.exif_labels == "stored" else other)] if number else []
