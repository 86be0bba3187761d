"""Where the pictures and labels of each data set lie, as downloaded: trees, file names, splits. Lists, decodes nothing.

A data set of your own is one CSV in data/labels and one entry in LAYOUTS; see data/README.md.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from scipy.io import loadmat

from setlib.files import nearest, small

LOSSLESS, LOSSY = (".png", ".bmp", ".tif", ".tiff"), (".jpg", ".jpeg", ".webp")
SUFFIXES = (*LOSSLESS, *LOSSY)
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng")  # pictures too, but not for Pillow
CONVERTED = ("_labelTrainIds", "_trainIds", "_train_id", "_trainids", "_train_ids")  # by the field's tools: train ids
INSTANCES = "_inst"  # ends the names of IDD-lite's instance labels
USUAL = {"source": ("train", "training"), "target": ("val", "validation", "valid", "dev")}  # splits when none is named


class Layout(NamedTuple):
    """One tree of a data set.

    images: pattern of the pictures below the data set's folder: `{name}`, `{split}`, `{condition}` stand for one part
    of a path, `{group}` for any number of folders, `*` for any characters; where a file is missing in the format of
    its pattern, it is taken in another one, a label in one without loss. labels: (pattern, id map) in order of
    preference; fields of one name are equal in both. splits: what a split is called in the tree, where `{split}` is;
    empty: any. any_size: labels may differ from their pictures in size (they are then resized, nearest).
    unlabelled: splits whose labels are dummies.
    """

    images: str
    labels: tuple[tuple[str, str], ...]
    splits: dict[str, str] = {}
    any_size: bool = False
    unlabelled: tuple[str, ...] = ()


def _cityscapes(kind: str, suffix: str = "") -> Layout:
    images = f"{kind}/{{split}}/{{group}}/{{name}}_{kind}{suffix}.png"
    return Layout(images, _both("gtFine/{split}/{group}/{name}_gtFine"), unlabelled=("test",))


def _anonymous(folders: str) -> Layout:
    """ACDC and Dark Zurich."""
    return Layout(f"rgb_anon/{folders}/{{name}}_rgb_anon.png", _both(f"gt/{folders}/{{name}}_gt"))


def _both(stem: str) -> tuple[tuple[str, str], ...]:
    """Labels of label ids or, where these are missing, of train ids."""
    return (f"{stem}_labelIds.png", "labelids"), (f"{stem}_labelTrainIds.png", "cityscapes")


_PLAIN = "images/{name}.*", "labels/{name}.png"
_MAPILLARY = "{split}/images/{name}.jpg"
_MAPILLARY_SPLITS = {"train": "training", "val": "validation", "test": "testing"}
_MAPILLARY_12 = ("{split}/v1.2/labels/{name}.png", "mapillary12"), ("{split}/labels/{name}.png", "mapillary12")
_IDD = "gtFine/{split}/{group}/{name}_gtFine_"
_IDD_LABELS = (f"{_IDD}labelids.png", "idd"), (f"{_IDD}polygons.json", "idd")
_IDD_CONVERTED = (f"{_IDD}labellevel3Ids.png", "iddlevel3"), (f"{_IDD}labelcsTrainIds.png", "cityscapes")
_IDD_LITE = (("gtFine/{split}/{group}/{name}_label.png", "iddlite"),)
_CAMVID_SPLITS = {"train": "train", "val": "val", "test": "test"}
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "folder": (Layout(_PLAIN[0], ((_PLAIN[1], "cityscapes"),)),),
    "gtav": (Layout("images/{name}.png", ((_PLAIN[1], "labelids"),), any_size=True),),
    "synthia": (Layout("RGB/{name}.png", (("GT/LABELS/{name}.png", "synthia"),)),),
    "urbansyn": (Layout("rgb/rgb_{name}.png", (("ss/ss_{name}.png", "urbansyn"),)),),
    "cityscapes": (_cityscapes("leftImg8bit"),),
    "cityscapes-foggy": (_cityscapes("leftImg8bit_foggy", "*"),),
    "cityscapes-rainy": (_cityscapes("leftImg8bit_rain", "*"),),
    "bdd100k": (
        Layout("images/10k/{split}/{name}.jpg", (("labels/sem_seg/masks/{split}/{name}.png", "cityscapes"),)),
        Layout("seg/images/{split}/{name}.jpg", (("seg/labels/{split}/{name}.png", "cityscapes"),)),
    ),
    "mapillary": (Layout(_MAPILLARY, _MAPILLARY_12, _MAPILLARY_SPLITS),),
    "mapillary-v2": (Layout(_MAPILLARY, (("{split}/v2.0/labels/{name}.png", "mapillary20"),), _MAPILLARY_SPLITS),),
    "acdc": (_anonymous("{condition}/{split}/{group}"),),
    "darkzurich": (_anonymous("{split}/{group}"),),
    "idd": (Layout("leftImg8bit/{split}/{group}/{name}_leftImg8bit.*", (*_IDD_LABELS, *_IDD_CONVERTED)),),
    "idd-lite": (Layout("leftImg8bit/{split}/{group}/{name}_image.*", _IDD_LITE),),
    "kitti": (Layout("training/image_2/{name}.png", (("training/semantic/{name}.png", "labelids"),)),),
    "wilddash2": (Layout(_PLAIN[0], ((_PLAIN[1], "wilddash"),)),),
    "camvid": (
        Layout(_PLAIN[0], ((_PLAIN[1], "camvid"),)),
        Layout("{split}/{name}.png", (("{split}annot/{name}.png", "camvid"),), _CAMVID_SPLITS),
        Layout("701_StillsRaw_full/{name}.png", (("LabeledApproved_full/{name}_L.png", "camvid32"),)),
    ),
}


class Pair(NamedTuple):
    """Paths of one picture and of its label, if it has one; name: unique in the domain; split: "" if there is none."""

    image: str
    label: str | None
    name: str
    split: str = ""


class Listing(NamedTuple):
    """What a folder holds of a data set: pairs, the id map of their labels, and what is wrong (one sentence each).

    notes: what is passed over without harm, and where labels seem to lie if there are none.
    """

    pairs: list[Pair]
    ids: str = "cityscapes"
    any_size: bool = False
    problems: list[str] = []
    notes: list[str] = []


def list_pairs(name: str, folder: str, split: str = "", role: str = "", skip: bool = False) -> Listing:
    """The pairs of data set `name` in a folder, of one split.

    split: a split of the tree (or, of ACDC, a condition, or both as in night-val), or of a splits.json or split.mat
    beside it. Without one: the training split for role "source", the validation split for role "target", where there
    are such splits; else everything. skip: what is missing is passed over with a note.
    Raises ValueError if the folder does not hold the data set, or no such split.
    """
    root, text = Path(os.path.expanduser(folder)), f"{name}{':' * bool(split)}{split}@{folder}"
    layout = next((one for one in LAYOUTS[name] if _homes(root, one) == [root]), None)
    if layout is None:
        raise ValueError(f"{text}: {_wrong_folder(name, root)}")
    found = _match(root, layout, layout.images, SUFFIXES + UNREAD)
    images = {path: fields for path, fields in found.items() if not path.lower().endswith(UNREAD)}
    unread = sorted(found.keys() - images.keys())
    listed = None
    if split and "{split}" not in layout.images:
        listed, split = _read_split(root, split), ""
    asked = _asked(images, layout, split, role, text)
    kept = {p: f for p, f in images.items() if asked <= {*f.values()} and (listed is None or f["name"] in listed)}
    pattern, ids, labels = _labels(root, layout, kept, LOSSLESS)
    pairs, bare, problems = _join(root, layout, kept, pattern, labels)

    found = {} if labels and not bare else _labels(root, layout, kept, LOSSY)[2]
    lossy, notes = [root / path for path, _ in found.values() if path.lower().endswith(LOSSY)], []
    if lossy:
        problems.append(f"{len(lossy)} labels like {lossy[0]} are in a lossy format, ids are lost: export them as PNG")
    elif not labels and not {fields.get("split") for fields in kept.values()} & {*layout.unlabelled}:
        notes = _elsewhere(root, layout, kept)
    if unread:
        what = f"{len(unread)} pictures like {unread[0]} are in a format that is not read: export them as JPG or PNG"
        (notes if images else problems).append(what)
    absent = sorted((listed or set()) - {fields["name"] for fields in kept.values()})
    if skip:
        pairs = [pair for pair in pairs if pair.name not in bare]
        notes += _passed_over("picture{} without a label", bare)
        notes += _passed_over("picture{} of the split's list that are not there", absent)
    else:
        problems += [f"{sentence}; -o data.on_error=skip passes over it" for sentence in bare.values()]
        problems += [f"'{one}' is in the list of the split but not in {root}" for one in absent]
    used = {pattern.format(**fields) for fields in kept.values()}
    alone = [f["name"] for label, (_, f) in labels.items() if label not in used and asked <= {*f.values()}]
    notes += _passed_over("label{} converted to train ids", [one for one in alone if one.endswith(CONVERTED)])
    if listed is None:
        others = [one for one in alone if not one.endswith((*CONVERTED, INSTANCES))]
        notes += _passed_over("label{} without a picture", others)
    return Listing(pairs, ids, layout.any_size, problems, notes)


def _passed_over(what: str, names: Collection[str]) -> list[str]:
    return [f"{len(names)} {what.format('s' * (len(names) != 1))} passed over"] if names else []


def _asked(images: dict, layout: Layout, split: str, role: str, text: str) -> set[str]:
    """What a split and a role mean in the tree: values of its fields split and condition."""
    splits, conditions = ({f[field] for f in images.values() if field in f} for field in ("split", "condition"))
    names = {value: value for value in splits | conditions}
    names |= {name: value for name, value in layout.splits.items() if value in splits}
    parts = [split] if split in names else split.split("-") if split else []
    for part in parts:
        if part not in names:
            where = f"; there are {', '.join(sorted(names))}" if names else ": this data set has none in its tree"
            raise ValueError(f"{text}: unknown split '{part}'{where} ({nearest(part, sorted(names))}).")
    asked = {names[part] for part in parts}
    usual = [value for value in USUAL.get(role, ()) if value in splits]
    return asked if asked & splits else asked | set(usual[:1])


def _read_split(root: Path, split: str) -> set[str]:
    """The names of a split that a list beside the tree holds: GTAV's split.mat, or splits.json."""
    mat, file = root / "split.mat", root / "splits.json"
    if mat.is_file():
        try:
            ids = {key.removesuffix("Ids"): value.ravel() for key, value in loadmat(mat).items() if key.endswith("Ids")}
            splits = {name: [f"{int(i):05d}" for i in values] for name, values in ids.items()}
        except Exception as error:  # scipy raises many kinds for a damaged file
            raise ValueError(f"{mat} cannot be read ({error}): download it again.") from None
    elif file.is_file():
        try:
            content = json.loads(small(file))["splits"]
            splits = {name: [str(one) for one in names] for name, names in content.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'{file} cannot be read: expected {{"splits": {{name: [picture, ...]}}}}.') from None
    else:
        raise ValueError(f"A split '{split}' is named, but there is no splits.json in {root}: leave ':{split}' out.")
    if split not in splits:
        raise ValueError(f"Unknown split '{split}' of {root} ({nearest(split, splits)}).")
    return set(splits[split])


def _labels(root: Path, layout: Layout, images: dict, formats: tuple[str, ...]) -> tuple[str, str, dict]:
    """The pattern and id map of the labels that serve most pictures, and these: {pattern filled: (path, fields)}."""
    best, most = (*layout.labels[0], {}), -1
    converted = [(f"{os.path.splitext(p)[0]}{end}.png", "cityscapes") for end in CONVERTED for p, _ in layout.labels]
    for pattern, ids in (*layout.labels, *converted):
        labels = {
            pattern.format(**fields): (path, fields)
            for path, fields in _match(root, layout, pattern, formats).items()
            if fields.get("split") not in layout.unlabelled
        }
        served = sum(pattern.format(**fields) in labels for fields in images.values())
        if served > most:
            best, most = (pattern, ids, labels), served
        if served == len(images):
            break
    return best


def _join(root: Path, layout: Layout, images: dict, pattern: str, labels: dict) -> tuple[list[Pair], dict, list[str]]:
    """Pictures with labels (which several may share), {name: sentence} where one is missing, and what else is wrong."""
    pairs, bare, problems, seen = [], {}, [], {}
    labelled = {fields.get("split", "") for _, fields in labels.values()}
    for path, fields in sorted(images.items()):
        group, split = fields.get("group", ""), fields.get("split", "")
        name = Path(path).stem if "*" in Path(layout.images).stem else fields["name"]
        name = name if name.startswith(group) else f"{group}/{name}"
        if name in seen:
            problems.append(f"'{Path(path).name}' and '{Path(seen[name]).name}' share one name: rename one of them")
            continue
        seen[name], expected = path, pattern.format(**fields)
        label = str(root / labels[expected][0]) if expected in labels else None
        if label is None and split in labelled:
            bare[name] = f"image '{name}' has no label: expected {root / expected}"
        pairs.append(Pair(str(root / path), label, name, split))
    return pairs, bare, problems


def _elsewhere(root: Path, layout: Layout, images: dict) -> list[str]:
    """A note on where labels of the pictures seem to lie, beside their folder or beside the one that was given."""
    own = [part / _base(layout.images) for part in _roots(root, layout, layout.images)]
    expected = " or ".join(pattern for pattern, _ in layout.labels[:2])
    for folder in dict.fromkeys(folder for base in own for folder in (*_folders(root), *_folders(base.parent))):
        if images and not any(base.is_relative_to(folder) for base in own):
            name = glob.escape(next(iter(images.values()))["name"])
            if file := next(folder.rglob(f"{name}[._]*"), None):
                return [f"{folder}/ holds {file.name}, but labels are expected as {root / expected}"]
    return []


def _wrong_folder(name: str, root: Path) -> str:
    """The sentence for a folder that does not hold a data set: which one near it does, else what was expected."""
    near = []
    for layout in LAYOUTS[name]:
        above = [folder for folder in (root.parent, root.parent.parent) if _homes(folder, layout) == [folder]]
        near += [(folder, layout) for folder in (*above, *_homes(root, layout))]
    meant = [folder for folder, layout in near if _label_roots(folder, layout)] or [folder for folder, _ in near]
    if meant:
        return f"{root} is the wrong level of the tree: give {' or '.join(map(str, meant[:3]))}."
    trees = " or ".join(layout.images for layout in LAYOUTS[name])
    return f"expected pictures in {root / trees}, but there is no such folder."


def _homes(root: Path, layout: Layout) -> list[Path]:
    """The folders to give for a data set: `root`, also if archives were unpacked into folders of it, or some below."""
    images, labels = _roots(root, layout, layout.images), _label_roots(root, layout)
    whole = [part for part in images if part in labels]
    return [root] if images and labels and not whole else whole or images


def _label_roots(root: Path, layout: Layout) -> list[Path]:
    return [part for pattern, _ in layout.labels for part in _roots(root, layout, pattern)]


def _roots(root: Path, layout: Layout, pattern: str) -> list[Path]:
    """Where a pattern begins: the folder itself, or those in it, up to two deep, that archives were unpacked into."""
    base, folders, splits = _base(pattern), pattern.rpartition("/")[0], layout.splits.values() or ["*"]
    begins = [base] if base else [re.sub(r"\{\w+\}", "*", folders.replace("{split}", split)) for split in splits]
    level = [root]
    for _ in range(3):
        if parts := [part for part in level if any(any(part.glob(one)) for one in begins)]:
            return parts
        level = [deeper for folder in level for deeper in _folders(folder)]
    return []


def _base(pattern: str) -> str:
    """The folder in front of a pattern's first field, "" if it begins with one."""
    return pattern.split("{")[0].rpartition("/")[0]


def _folders(root: Path) -> list[Path]:
    """The folders in a folder, as far as they may be seen."""
    _, folders, _ = next(os.walk(root), ("", [], []))
    return sorted(root / folder for folder in folders)


def _match(root: Path, layout: Layout, pattern: str, formats: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """{path below root: fields} of the files that fit a pattern; formats: what stands in for its own."""
    stem, own = os.path.splitext(pattern)
    parts = {"group": ".+?", "split": "|".join(layout.splits.values()) or "[^/]+?"}
    text = re.escape(stem).replace(r"\*", "[^/]*")
    expression = re.sub(r"\\{(\w+)\\}", lambda field: f"(?P<{field[1]}>{parts.get(field[1], '[^/]+?')})", text)
    found, seen = {}, set()
    for part in _roots(root, layout, pattern):
        if part != root and pattern != layout.images and part in _roots(part, layout, layout.images):
            continue  # labels of a whole data set inside of this one
        for folder, folders, files in os.walk(part / _base(pattern), followlinks=True, onerror=_refuse):
            seen.add(os.path.realpath(folder))
            folders[:] = [one for one in folders if os.path.realpath(f"{folder}/{one}") not in seen]  # links in circles
            below, where = (Path(folder).relative_to(start).as_posix() for start in (part, root))
            for file in files:
                name, ending = os.path.splitext(file)
                match = re.fullmatch(expression, f"{below}/{name}".removeprefix("./"))
                if match and ending.lower() in (own, *formats) and not file.startswith("._"):  # a Mac's notes on a file
                    found[f"{where}/{file}".removeprefix("./")] = match.groupdict()
    own_there = {path[: -len(own)] for path in found if path.lower().endswith(own)}
    return {p: f for p, f in found.items() if p.lower().endswith(own) or p.rpartition(".")[0] not in own_there}


def _refuse(error: OSError) -> None:
    """A folder that may not be read is not an empty one."""
    if isinstance(error, PermissionError):
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}.")
