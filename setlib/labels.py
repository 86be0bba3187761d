"""The 19 Cityscapes train classes, the class sets that domains are scored in, and the id maps of data/labels/*.csv.

Two numbers stand for a class: its train id (0-18, what a model predicts) and its place in a domain's own class set
(what the domain is scored in). 255 is ignored in both.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache

import numpy as np

from setlib.experiment import PROJECT

IGNORE = 255


@dataclass(frozen=True)
class ClassSet:
    """Classes a domain is scored in. `merge[t]` is the place of train class t in this set."""

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

    def merge_matrix(self) -> np.ndarray:
        """(19, K) float32 of 0 and 1: the classes' probabilities times it are the set's probabilities."""
        return np.eye(len(self), dtype=np.float32)[list(self.merge)]


@dataclass(frozen=True)
class IdMap:
    """Raw label ids of one data set -> train ids and -> places in its class set, each a (256,) lookup."""

    class_set: ClassSet
    known: np.ndarray  # (256,) bool
    to_train: np.ndarray  # (256,) uint8
    to_score: np.ndarray  # (256,) uint8


def _rows(name: str) -> list[dict]:
    with open(PROJECT / "data" / "labels" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return [{k: v if k == "name" else int(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _classes(name: str, set_name: str, merge: dict[str, str]) -> ClassSet:
    """The rows of a csv that are not ignored as a class set; `merge` names the place of train classes it lacks."""
    rows = [row for row in _rows(name) if row["train_id"] != IGNORE]
    train_names = [row["name"] for row in _rows("cityscapes")]
    place = {row["train_id"]: i for i, row in enumerate(rows)}
    names = [row["name"] for row in rows]
    merged = tuple(names.index(merge[t]) if t in merge else place[i] for i, t in enumerate(train_names))
    return ClassSet(set_name, tuple(names), tuple((r["red"], r["green"], r["blue"]) for r in rows), merged)


CITYSCAPES = _classes("cityscapes", "cityscapes-19", {})
CAMVID = _classes(
    "camvid",
    "camvid-11",
    {
        "wall": "Building",
        "terrain": "Tree",
        "traffic light": "SignSymbol",
        "truck": "Car",
        "bus": "Car",
        "train": "Car",
        "motorcycle": "Bicyclist",
        "bicycle": "Bicyclist",
    },
)


@cache
def id_map(name: str) -> IdMap:
    """The id map of data/labels/<name>.csv; id 255 always means ignore."""
    class_set = CAMVID if name == "camvid" else CITYSCAPES
    known = np.zeros(256, bool)
    to_train = np.full(256, IGNORE, np.uint8)
    to_score = np.full(256, IGNORE, np.uint8)
    rows = _rows(name)
    places = iter(range(len(class_set)))
    for row in rows:
        known[row["id"]] = True
        to_train[row["id"]] = row["train_id"]
        if row["train_id"] != IGNORE:
            to_score[row["id"]] = next(places)
    known[IGNORE] = True
    return IdMap(class_set, known, to_train, to_score)
