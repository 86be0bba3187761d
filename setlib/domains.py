"""Domains: labelled (or unlabelled) sets of pictures as `datasets.Dataset`s, each with its own class set.

A domain is named `name[:split][@folder]`, for example `scenes:night`, `camvid:dusk@folder`, `folder@my_photos`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import ExifTags
from PIL import Image as PILImage
from tqdm import tqdm

from setlib import scenes
from setlib.experiment import Data, cache_folder, nearest
from setlib.labels import ClassSet, IdMap, id_map

READERS = ("scenes", "camvid", "folder")
ENDLESS = 500  # rendered scenes that "all" stands for
BAD_PICTURE = (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError)  # what Pillow raises
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


class Spec(NamedTuple):
    """A domain's name taken apart."""

    text: str
    name: str
    split: str
    folder: str


class Pair(NamedTuple):
    """Paths of one picture and of its label, if it has one."""

    image: Path
    label: Path | None
    name: str


class Sample(NamedTuple):
    """One decoded picture, (h, w, 3) uint8, and its raw label ids, (h, w) uint8 or None."""

    image: np.ndarray
    label: np.ndarray | None
    name: str


@dataclass(frozen=True)
class Domain:
    """Pictures of one domain; `dataset` has the columns image, label (when there are labels), name, domain."""

    spec: Spec
    dataset: Dataset
    ids: IdMap
    has_labels: bool

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def class_set(self) -> ClassSet:
        """The classes that this domain is scored in."""
        return self.ids.class_set

    def to_score(self, label: np.ndarray | None) -> np.ndarray | None:
        """Raw label ids -> places in the class set that this domain is scored in, 255 ignored; None stays None."""
        return None if label is None else self.ids.to_score[label]

    def sample(self, index: int) -> Sample:
        """Picture `index`, decoded. Raises ValueError naming the file when it is damaged or holds unknown ids."""
        try:
            row = self.dataset[index]
        except BAD_PICTURE as error:
            name = self.dataset.select_columns("name")[index]["name"]
            raise ValueError(
                f"{self.spec.text}: '{name}' cannot be decoded ({error}): download or export it again."
            ) from None
        image, name = np.asarray(row["image"]), row["name"]
        if not self.has_labels:
            return Sample(image, None, name)
        label = np.asarray(row["label"])
        problem = _label_problem(label, image.shape[:2], self.ids)
        if problem:
            raise ValueError(f"{self.spec.text}: label of '{name}' {problem}.")
        return Sample(image, label.astype(np.uint8), name)


def parse(text: str) -> Spec:
    """Takes `name[:split][@folder]` apart. Raises ValueError for an unknown name, style or missing folder."""
    head, _, folder = text.partition("@")
    name, _, split = head.partition(":")
    if name not in READERS:
        raise ValueError(
            f"Unknown domain '{name}' in '{text}' ({nearest(name, READERS)}): write name[:split][@folder]."
        )
    if name == "scenes":
        split = split or "game"
        if split not in scenes.STYLES:
            raise ValueError(f"Unknown style '{split}' in '{text}' ({nearest(split, scenes.STYLES)}).")
    elif not folder:
        raise ValueError(f"Domain '{text}' needs its folder: write {head}@FOLDER.")
    elif not Path(folder).expanduser().is_dir():
        raise ValueError(f"Domain '{text}': folder {folder} does not exist; give the folder that holds images/.")
    return Spec(text, name, split, folder)


def load(text: str, data: Data, role: str = "target") -> Domain:
    """The domain called `text`, cut to data.train_images (role "source") or data.eval_images (role "target").

    Rendered scenes are made on first use; the source's layouts and the targets' are different streets.
    Raises ValueError with one sentence when the domain cannot be used.
    """
    spec = parse(text)
    limit = data.train_images if role == "source" else data.eval_images
    pairs = _scene_pairs(spec, data, role) if spec.name == "scenes" else _evenly(_folder_pairs(spec), limit)
    has_labels = all(pair.label for pair in pairs)
    if role == "source" and not has_labels:
        raise ValueError(f"Source '{text}' has no labels: a source needs {spec.folder}/labels with one PNG per image.")
    for pair in pairs:
        problem = _header_problem(pair)
        if problem:
            raise ValueError(f"{text}: {problem}.")
    columns = {"image": [str(p.image) for p in pairs], "name": [p.name for p in pairs], "domain": [text] * len(pairs)}
    features = {"image": Image(mode="RGB"), "name": Value("string"), "domain": Value("string")}
    if has_labels:
        columns["label"] = [str(p.label) for p in pairs]
        features["label"] = Image()
    return Domain(spec, Dataset.from_dict(columns, features=Features(features)), _ids(spec), has_labels)


@dataclass
class Check:
    """What `check` found in one domain."""

    domain: str
    pairs: int = 0
    labelled: bool = True
    sizes: Counter = field(default_factory=Counter)
    class_pixels: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check(text: str, data: Data, role: str = "target") -> Check:
    """Decodes a whole domain and counts what is there; what is wrong is listed, not raised.

    Raises ValueError only when the domain cannot be listed at all.
    """
    spec = parse(text)
    found = Check(text)
    if spec.name == "scenes":
        pairs = _scene_pairs(spec, data, role)
    else:
        pairs = _folder_pairs(spec, found.problems)
    ids, counts = _ids(spec), np.zeros(256, np.int64)
    found.labelled = any(pair.label for pair in pairs)
    for pair in tqdm(pairs, desc=f"check {text}", unit="img", leave=False):
        problem = _header_problem(pair)
        try:
            found.sizes[upright_size(pair.image)] += 1
            with PILImage.open(pair.image) as picture:
                picture.load()
            if pair.label and not problem:
                with PILImage.open(pair.label) as picture:
                    label = np.asarray(picture)
                problem = _label_problem(label, label.shape[:2], ids)
                problem = problem and f"label of '{pair.name}' {problem}"
                if label.ndim == 2:
                    counts += np.bincount(label[(label >= 0) & (label < 256)].astype(np.uint8), minlength=256)
        except BAD_PICTURE as error:
            problem = problem or f"'{pair.name}' cannot be decoded ({error})"
        if problem:
            found.problems.append(problem)
    found.pairs = len(pairs)
    scored = [counts[(ids.to_score == place) & ids.known].sum() for place in range(len(ids.class_set))]
    found.class_pixels = {name: int(n) for name, n in zip(ids.class_set.classes, scored, strict=True)}
    return found


def _ids(spec: Spec) -> IdMap:
    return id_map("camvid" if spec.name == "camvid" else "cityscapes")


def _scene_pairs(spec: Spec, data: Data, role: str) -> list[Pair]:
    """The first streets of a style; those of the source and those of the targets have different seeds."""
    count = (data.train_images if role == "source" else data.eval_images) or ENDLESS
    seed = 2 * data.content_seed + (role != "source")
    folder = Path(spec.folder) if spec.folder else cache_folder() / "scenes"
    folder = folder / f"v{scenes.VERSION}-seed{seed}-{data.height}x{data.width}"
    made = scenes.cache(folder, spec.split, range(count), seed, (data.height, data.width))
    return [Pair(image, label, name) for image, label, name in made]


def _folder_pairs(spec: Spec, problems: list[str] | None = None) -> list[Pair]:
    """Pairs of `images/` and `labels/` by name, of one split. What is wrong is raised, or listed in `problems`."""
    root = Path(spec.folder).expanduser()
    if not (root / "images").is_dir():
        raise ValueError(f"Domain '{spec.text}': expected pictures in {root / 'images'}, but there is no such folder.")
    files = [path for path in sorted((root / "images").iterdir()) if path.suffix.lower() in SUFFIXES]
    images = {path.stem: path for path in files}
    labels = {p.stem: p for p in sorted((root / "labels").glob("*.png"))}
    names = list(images) if not spec.split else _split_names(spec, root)
    wrong = [f"'{name}' is in splits.json but not in {root / 'images'}" for name in names if name not in images]
    twins = [path for path in files if path != images[path.stem]]
    wrong += [f"'{path.name}' and '{images[path.stem].name}' share one name: rename one of them" for path in twins]
    if labels or spec.name == "camvid":
        wrong += [f"image '{n}' has no label: expected {root / 'labels' / n}.png" for n in names if n not in labels]
        if not spec.split:
            wrong += [f"label '{name}' has no image" for name in labels if name not in images]
    if not names:
        raise ValueError(f"Domain '{spec.text}' is empty: no picture in {root / 'images'}.")
    if wrong and problems is None:
        more = (
            f" (and {len(wrong) - 1} more like it; see: python -m setlib check {spec.text})" if len(wrong) > 1 else ""
        )
        raise ValueError(f"{spec.text}: {wrong[0]}{more}.")
    if problems is not None:
        problems.extend(wrong)
    return [Pair(images[name], labels.get(name), name) for name in names if name in images]


def _split_names(spec: Spec, root: Path) -> list[str]:
    path = root / "splits.json"
    if not path.is_file():
        raise ValueError(f"Domain '{spec.text}' names a split, but {path} does not exist: leave ':{spec.split}' out.")
    try:
        splits = {name: [*map(str, pictures)] for name, pictures in json.loads(path.read_bytes())["splits"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{path} cannot be read: expected {{"splits": {{name: [picture, ...]}}}}.') from None
    if spec.split not in splits:
        raise ValueError(f"Unknown split '{spec.split}' in '{spec.text}' ({nearest(spec.split, splits)}).")
    return splits[spec.split]


def _evenly(pairs: list[Pair], limit: int) -> list[Pair]:
    """At most `limit` pairs (0 = all), evenly spaced: neighbours in a video say little more than one of them."""
    if not limit or limit >= len(pairs):
        return pairs
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, limit).round().astype(int)]


def upright_size(path: Path) -> tuple[int, int]:
    """(w, h) of a picture as it is shown: its EXIF rotation, which decoding applies, counted in. Reads the header."""
    with PILImage.open(path) as picture:
        w, h = picture.size
        # a PNG would have to be decoded first: its EXIF may stand at the end
        turned = picture.format != "PNG" and picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (h, w) if turned else (w, h)


def _header_problem(pair: Pair) -> str | None:
    """What is wrong with a pair as far as the files' headers tell, or None."""
    sizes = []
    for path in (pair.image, pair.label):
        if path:
            try:
                sizes.append(upright_size(path))
            except BAD_PICTURE as error:
                return f"{path} cannot be opened as a picture ({error})"
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        return "image '{}' is {} x {} but its label is {} x {}: they must be equal".format(
            pair.name, *sizes[0], *sizes[1]
        )
    return None


def _label_problem(label: np.ndarray, size: tuple[int, int], ids: IdMap) -> str | None:
    """What is wrong with a decoded label, or None."""
    if label.ndim != 2 or label.dtype not in (np.uint8, np.int32, np.uint16, bool):
        return f"is a colour picture of shape {label.shape}: expected one channel of class ids"
    if label.shape != size:
        return f"is {label.shape[1]} x {label.shape[0]} but its image is {size[1]} x {size[0]}"
    present = np.unique(label.astype(np.int64))
    unknown = [int(i) for i in present if i < 0 or i > 255 or not ids.known[i]]
    if unknown:
        allowed = ", ".join(str(i) for i in np.flatnonzero(ids.known))
        return f"holds the unknown ids {unknown[:5]}: expected {allowed}"
    return None
