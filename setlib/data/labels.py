"""The 19 Cityscapes train classes, the class sets that domains are scored in, and the id maps of data/labels/*.csv.

Two numbers stand for a class: its train id (0-18, what a model predicts) and its place in a class set (what a domain is
scored in). 255 is ignored in both.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from setlib.files import PROJECT, nearest

IGNORE = 255
LABELS = PROJECT / "data" / "labels"
NUMBERS = ("id", "red", "green", "blue", "train_id")


@dataclass(frozen=True)
class ClassSet:
    """Classes a domain is scored in. `places[t]` is the place of train class t in this set, 255 where it has none."""

    name: str
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    places: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def palette(self) -> np.ndarray:
        """(256, 3) uint8 colours by class index; what is ignored is black."""
        return np.pad(np.array(self.colours, np.uint8), ((0, 256 - len(self)), (0, 0)))

    @property
    def to_place(self) -> np.ndarray:
        """(256,) uint8: from train ids to places in this set."""
        return np.pad(np.array(self.places, np.uint8), (0, 256 - len(self.places)), constant_values=IGNORE)

    def merge(self, probabilities: Tensor) -> Tensor:
        """Probabilities of the 19 classes, (19, h, w), summed to this set's, (K, h, w); what it lacks is left out."""
        counted = np.equal.outer(self.places, range(len(self))).astype(np.float32)  # (19, K) of 0 and 1
        return torch.einsum("khw,kc->chw", probabilities, probabilities.new_tensor(counted))


@dataclass(frozen=True)
class IdMap:
    """Raw label ids of one data set -> train ids and -> places in its class set, each a (256,) uint8 lookup.

    names: of every known id. palette: (256, 3) uint8 colours by id. form: how the files hold the ids: "ids" (one
    channel), "colours" (RGB), or "wide" (16 bits, ids in the first channel).
    """

    name: str
    class_set: ClassSet
    to_train: np.ndarray
    to_score: np.ndarray
    names: dict[int, str]
    palette: np.ndarray
    form: str = "ids"


@cache
def read_rows(name: str) -> tuple[dict, ...]:
    """The rows of data/labels/<name>.csv. Raises ValueError if the file is missing or not of that form."""
    known, path = [path.stem for path in LABELS.glob("*.csv")], LABELS / f"{name}.csv"
    if name not in known:
        raise ValueError(f"Unknown id map '{name}' ({nearest(name, known)}).")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{"name": row["name"], **{key: int(row[key]) for key in NUMBERS}} for row in csv.DictReader(file)]
        if any(18 < row["train_id"] < IGNORE for row in rows):
            raise ValueError("a train_id is neither 0 to 18 nor 255")
        if not rows or not all(row["name"] and 0 <= row[key] <= 255 for row in rows for key in NUMBERS):
            raise ValueError("a row lacks its name, or holds another number")
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: expected the columns name, {', '.join(NUMBERS)} (0 to 255): {error}.") from None
    return tuple(rows)


def _class_set(name: str, file: str, left_out: Sequence[str] = (), merged: str = "") -> ClassSet:
    """The classes of an id map but those left out. merged: the one that each of the 19 counts as, in their order."""
    rows = [row for row in read_rows(file) if row["train_id"] != IGNORE and row["name"] not in left_out]
    names = [row["name"] for row in rows]
    train_classes = merged.split(", ") if merged else [row["name"] for row in read_rows("cityscapes")]
    places = [names.index(one) if one in names else IGNORE for one in train_classes]
    return ClassSet(name, tuple(names), tuple((row["red"], row["green"], row["blue"]) for row in rows), tuple(places))


CITYSCAPES = _class_set("cityscapes-19", "cityscapes")
SYNTHIA_16 = _class_set("synthia-16", "cityscapes", ("terrain", "truck", "train"))
SYNTHIA_13 = _class_set("synthia-13", "cityscapes", ("terrain", "truck", "train", "wall", "fence", "pole"))
CAMVID_MERGED = (
    "Road, Pavement, Building, Building, Fence, Pole, SignSymbol, SignSymbol, Tree, Tree, Sky, Pedestrian, Bicyclist, "
    "Car, Car, Car, Car, Bicyclist, Bicyclist"
)
IDD_LITE_MERGED = (
    "drivable, non-drivable, far objects, roadside objects, roadside objects, roadside objects, roadside objects, "
    "roadside objects, far objects, non-drivable, sky, living things, living things, "
    "vehicles, vehicles, vehicles, vehicles, vehicles, vehicles"
)
CAMVID = _class_set("camvid-11", "camvid", merged=CAMVID_MERGED)
IDD_LITE = _class_set("idd-lite-7", "iddlite", merged=IDD_LITE_MERGED)
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
    found, rows = OWN_SETS.get(name) or CLASS_SETS[class_set or CITYSCAPES.name], read_rows(name)
    to_train, to_score = np.full(256, IGNORE, np.uint8), np.full(256, IGNORE, np.uint8)
    to_place, palette = found.to_place, np.zeros((256, 3), np.uint8)
    for row in rows:
        to_train[row["id"]] = IGNORE if row["name"] in COARSE else row["train_id"]
        to_score[row["id"]] = to_place[row["train_id"]]
        palette[row["id"]] = row["red"], row["green"], row["blue"]
    names = {row["id"]: row["name"] for row in rows}
    return IdMap(name, found, to_train, to_score, names, palette, FORMS.get(name, "ids"))
