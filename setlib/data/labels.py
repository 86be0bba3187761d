"""The 19 Cityscapes train classes, the class sets that domains are scored in, and the id maps of data/labels/*.csv.

Two numbers stand for a class: its train id (0-18, what a model predicts) and its place in a class set (what a domain is
scored in). 255 is ignored in both.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from setlib.files import PROJECT, nearest

IGNORE = 255
LABELS = PROJECT / "data" / "labels"


@dataclass(frozen=True)
class ClassSet:
    """Classes a domain is scored in. `merge[t]` is the place of train class t in this set, 255 where it has none."""

    name: str
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    merge: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def palette(self) -> np.ndarray:
        """(256, 3) uint8 colours by class index; what is ignored is black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self)] = self.colours
        return palette

    @property
    def to_place(self) -> np.ndarray:
        """(256,) uint8: from train ids to places in this set."""
        return np.array([*self.merge, *[IGNORE] * (256 - len(self.merge))], np.uint8)

    def merged(self, probabilities: Tensor) -> Tensor:
        """Probabilities (19, h, w) of the train classes as those of this set, (K, h, w): sums of what is merged."""
        return torch.einsum("khw,kc->chw", probabilities, torch.from_numpy(self.merge_matrix()))

    def merge_matrix(self) -> np.ndarray:
        """(19, K) float32 of 0 and 1: the classes' probabilities times it are the set's probabilities.

        A class that the set lacks has a row of zeros: it cannot be predicted.
        """
        return np.array([[float(place == k) for k in range(len(self))] for place in self.merge], np.float32)


@dataclass(frozen=True)
class IdMap:
    """Raw label ids of one data set -> train ids and -> places in its class set, each a (256,) lookup.

    form: how the files hold the ids: "ids" (one channel), "colours" (RGB), or "wide" (16 bits, ids in the first
    channel). names, colours: of every known id.
    """

    name: str
    class_set: ClassSet
    known: np.ndarray  # (256,) bool
    to_train: np.ndarray  # (256,) uint8
    to_score: np.ndarray  # (256,) uint8
    names: dict[int, str]
    colours: dict[tuple[int, int, int], int]
    form: str = "ids"


@cache
def read_rows(name: str) -> tuple[dict, ...]:
    """The rows of data/labels/<name>.csv. Raises ValueError if the file is missing or not of that form."""
    path = LABELS / f"{name}.csv"
    if not path.is_file():
        raise ValueError(f"Unknown id map '{name}' ({nearest(name, [p.stem for p in LABELS.glob('*.csv')])}).")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = tuple({k: v if k == "name" else int(v) for k, v in row.items()} for row in csv.DictReader(file))
        wrong = [row for row in rows if not (0 <= row["id"] <= 255 and 0 <= row["train_id"] <= 255 and row["name"])]
        if wrong or not rows or {"red", "green", "blue"} - set(rows[0]):
            raise ValueError(f"row {wrong[:1]}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the columns id, name, red, green, blue, train_id (0 to 255): {error}."
        ) from None
    return rows


def _colour(row: dict) -> tuple[int, int, int]:
    return row["red"], row["green"], row["blue"]


TRAIN = read_rows("cityscapes")
CITYSCAPES = ClassSet("cityscapes-19", tuple(r["name"] for r in TRAIN), tuple(map(_colour, TRAIN)), tuple(range(19)))


def _without(name: str, *left_out: str) -> ClassSet:
    """Some of the 19 classes: the others are ignored in labels and cannot be predicted."""
    rows = [row for row in TRAIN if row["name"] not in left_out]
    place = {row["id"]: i for i, row in enumerate(rows)}
    merge = tuple(place.get(row["id"], IGNORE) for row in TRAIN)
    return ClassSet(name, tuple(r["name"] for r in rows), tuple(map(_colour, rows)), merge)


def _merged(name: str, file: str, merge: dict[str, str]) -> ClassSet:
    """A data set's own classes, all rows of its file that are not ignored; `merge` names the place of the others."""
    rows = [row for row in read_rows(file) if row["train_id"] != IGNORE]
    places = {row["train_id"]: i for i, row in enumerate(rows)}
    names = [row["name"] for row in rows]
    merged = tuple(names.index(merge[r["name"]]) if r["name"] in merge else places[r["id"]] for r in TRAIN)
    return ClassSet(name, tuple(names), tuple(map(_colour, rows)), merged)


CAMVID = _merged(
    "camvid-11",
    "camvid",
    {"wall": "Building", "terrain": "Tree", "traffic light": "SignSymbol", "motorcycle": "Bicyclist"}
    | {"bicycle": "Bicyclist", "truck": "Car", "bus": "Car", "train": "Car"},
)
IDD_LITE = _merged(
    "idd-lite-7",
    "iddlite",
    {"terrain": "non-drivable", "rider": "living things", "vegetation": "far objects"}
    | dict.fromkeys(("wall", "fence", "traffic light", "traffic sign"), "roadside objects")
    | dict.fromkeys(("truck", "bus", "train", "motorcycle", "bicycle"), "vehicles"),
)
SYNTHIA_16 = _without("synthia-16", "terrain", "truck", "train")
SYNTHIA_13 = _without("synthia-13", "terrain", "truck", "train", "wall", "fence", "pole")
CLASS_SETS = {found.name: found for found in (CITYSCAPES, SYNTHIA_16, SYNTHIA_13, CAMVID, IDD_LITE)}
OWN_SETS = {"camvid": CAMVID, "camvid32": CAMVID, "iddlite": IDD_LITE}  # of the id maps; all others: the 19 classes
FORMS = {"camvid32": "colours", "synthia": "wide"}
COARSE = {"roadside objects", "far objects"}  # of IDD-lite: several train classes; scored, but nothing to train on


@cache
def id_map(name: str, class_set: str = "") -> IdMap:
    """The id map of data/labels/<name>.csv; id 255 always means ignore.

    class_set: the name of a smaller convention to score the 19 classes in (synthia-16, synthia-13); data sets with
    classes of their own keep them. Raises ValueError for an unknown map or class set.
    """
    if class_set and class_set not in CLASS_SETS:
        raise ValueError(f"Unknown class set '{class_set}' ({nearest(class_set, CLASS_SETS)}).")
    found = OWN_SETS.get(name) or CLASS_SETS[class_set or CITYSCAPES.name]
    known = np.zeros(256, bool)
    to_train, to_score = np.full(256, IGNORE, np.uint8), np.full(256, IGNORE, np.uint8)
    rows, to_place = read_rows(name), found.to_place
    for row in rows:
        known[row["id"]] = True
        to_score[row["id"]] = to_place[row["train_id"]]
        to_train[row["id"]] = IGNORE if row["name"] in COARSE else row["train_id"]
    known[IGNORE] = True
    names = {row["id"]: row["name"] for row in rows}
    return IdMap(
        name, found, known, to_train, to_score, names, {_colour(r): r["id"] for r in rows}, FORMS.get(name, "ids")
    )
