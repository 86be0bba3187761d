"""Domains: labelled (or unlabelled) sets of pictures as `datasets.Dataset`s, each with its own class set.

A domain is named `name[:split][@folder][~corruption]`, for example `scenes:night`, `acdc:fog-val@folder`,
`folder@my_photos`, `cityscapes@folder~noise3`. Trees and file names are in `readers.py`, decoding in `pictures.py`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image as PILImage

from setlib import corruptions, scenes
from setlib.experiment import Data, nearest
from setlib.files import cache_folder
from setlib.labels import ClassSet, IdMap, id_map
from setlib.pictures import UNREADABLE, LabelError, read_label, read_picture, upright_size
from setlib.readers import LAYOUTS, Listing, Pair, list_pairs

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

    image and label are paths, or pictures in a data set of the hub.
    """

    spec: Spec
    dataset: Dataset
    ids: IdMap
    has_labels: bool
    any_size: bool = False  # a label of another size is resized to its picture

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def class_set(self) -> ClassSet:
        """The classes that this domain is scored in."""
        return self.ids.class_set

    def to_score(self, label: np.ndarray | None) -> np.ndarray | None:
        """Raw label ids -> places in the class set that this domain is scored in, 255 ignored; None stays None."""
        return None if label is None else self.ids.to_score[label]

    def sample(self, index: int, long_edge: int = 0) -> Sample:
        """Picture `index`, decoded. Raises ValueError naming the file when it is damaged or holds unknown ids.

        long_edge: as in `read_picture`: a large JPEG may come smaller than its label.
        """
        row = self.dataset[index]
        name, label = row["name"], None
        try:
            image = read_picture(row["image"], long_edge)
            if self.has_labels:
                label = self._label(row["label"], image.shape[:2], bool(long_edge))
        except LabelError as error:
            raise ValueError(f"{self.spec.text}: label of '{name}' {error}.") from None
        except UNREADABLE as error:
            raise ValueError(
                f"{self.spec.text}: '{name}' cannot be decoded ({error}): download or export it again."
            ) from None
        if self.spec.corruption:
            image = corruptions.corrupt(image, self.spec.corruption, self.spec.severity, name)
        return Sample(image, label, name)

    def _label(self, source: str | PILImage.Image, size: tuple[int, int], smaller: bool) -> np.ndarray:
        """The raw ids of a label, of its picture's size."""
        label = read_label(source, self.ids)
        if label.shape != size and not smaller:
            if not self.any_size:
                raise LabelError(other_size(label.shape, size))
            label = np.asarray(PILImage.fromarray(label).resize(size[::-1], PILImage.Resampling.NEAREST))
        return label


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
        if not re.fullmatch(r"[\w./-]+(:[\w.-]+)?", split):
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
    if spec.name == "hub":
        return _from_hub(spec, data, limit)
    found = find(spec, data, role)
    if found.problems:
        more = len(found.problems) - 1
        more_text = f" (and {more} more like it; see: python -m setlib check {text})" if more else ""
        raise ValueError(f"{text}: {found.problems[0]}{more_text}.")
    if not found.pairs:
        raise ValueError(f"Domain '{text}' is empty: no picture in {spec.folder}.")
    pairs = found.pairs if spec.name == "scenes" else _evenly(found.pairs, limit)
    has_labels = all(pair.label for pair in pairs)
    if role == "source" and not has_labels:
        expected = LAYOUTS[spec.name][0].labels[0][0]
        raise ValueError(f"Source '{text}' has no labels: a source needs {Path(spec.folder) / expected}.")
    for pair in pairs:
        problem = header_problem(pair, found.any_size)
        if problem:
            raise ValueError(f"{text}: {problem}.")
    columns = {"image": [str(p.image) for p in pairs], "name": [p.name for p in pairs], "domain": [text] * len(pairs)}
    if has_labels:
        columns["label"] = [str(p.label) for p in pairs]
    return Domain(spec, Dataset.from_dict(columns), id_map(found.ids, data.class_set), has_labels, found.any_size)


def find(spec: Spec, data: Data, role: str = "") -> Listing:
    """The pairs of a domain, uncut, and what is wrong with them as far as names tell."""
    if spec.name != "scenes":
        return list_pairs(spec.name, spec.folder, spec.split, role)
    return Listing(_scene_pairs(spec, data, role or "target"), "cityscapes", False, [])


def _from_hub(spec: Spec, data: Data, limit: int) -> Domain:
    """A data set of the hub with a column of pictures and one of labels; a limited one is streamed."""
    from huggingface_hub import constants

    from setlib import weights

    name, _, split = spec.split.partition(":")
    if not (Path(name).exists() or constants.HF_HUB_OFFLINE or weights.hub_answers(constants.ENDPOINT)):
        raise ValueError(
            f"Domain '{spec.text}': {constants.ENDPOINT} does not answer; HF_HUB_OFFLINE=1 takes a copy from the cache."
        )
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=bool(limit))
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
    if limit:
        rows = Dataset.from_list(list(rows.take(limit)), features=rows.features)
    rows = rows.rename_columns({pictures[0]: "image"} | {label: "label" for label in labels})
    rows = rows.add_column("name", [str(i) for i in range(len(rows))])
    rows = rows.add_column("domain", [spec.text] * len(rows))
    return Domain(spec, rows, id_map(spec.folder or "cityscapes", data.class_set), bool(labels))


def _scene_pairs(spec: Spec, data: Data, role: str) -> list[Pair]:
    """The first streets of a style; those of the source and those of the targets have different seeds."""
    count = (data.train_images if role == "source" else data.eval_images) or ENDLESS
    seed = 2 * data.content_seed + (role != "source")
    folder = Path(spec.folder) if spec.folder else cache_folder() / "scenes"
    folder = folder / f"v{scenes.VERSION}-seed{seed}-{data.height}x{data.width}"
    made = scenes.cache(folder, spec.split, range(count), seed, (data.height, data.width))
    return [Pair(image, label, name) for image, label, name in made]


def _evenly(pairs: list[Pair], limit: int) -> list[Pair]:
    """At most `limit` pairs (0 = all), evenly spaced: neighbours in a video say little more than one of them."""
    if not limit or limit >= len(pairs):
        return pairs
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, limit).round().astype(int)]


def header_problem(pair: Pair, any_size: bool = False) -> str | None:
    """What is wrong with a pair as far as the files' headers tell, or None."""
    sizes = []
    for path in (pair.image, pair.label):
        if path:
            try:
                sizes.append(upright_size(path))
            except (*UNREADABLE, KeyError, TypeError) as error:
                return f"{path} cannot be opened as a picture ({error})"
    if len(sizes) == 2 and sizes[0] != sizes[1] and not any_size:
        try:
            sizes[0] = upright_size(pair.image, whole=True)
        except UNREADABLE as error:
            return f"'{pair.name}' cannot be decoded ({error})"
    if len(sizes) == 2 and sizes[0] != sizes[1] and not any_size:
        return "image '{}' is {} x {} but its label is {} x {}: they must be equal".format(
            pair.name, *sizes[0], *sizes[1]
        )
    return None
