"""Where the pictures and labels of each data set lie, as downloaded: trees, file names, splits. Lists, decodes nothing.

A data set of your own is one CSV in data/labels and one entry in LAYOUTS; see data/README.md.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from setlib.files import nearest

LOSSLESS, LOSSY = (".png", ".bmp", ".tif", ".tiff"), (".jpg", ".jpeg", ".webp")
SUFFIXES = (*LOSSLESS, *LOSSY)
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng")  # pictures too, but not for Pillow
CONVERTED = ("_labelTrainIds", "_trainIds", "_train_id", "_trainids", "_train_ids")
SEGNET = ("train", "val", "test")
USUAL = {"source": ("train", "training"), "target": ("val", "validation", "valid", "dev")}  # splits when none is named


class Layout(NamedTuple):
    """One tree of a data set.

    images: pattern of the pictures below the data set's folder: `{name}`, `{split}`, `{condition}` stand for one part
    of a path, `{group}` for any number of folders, `*` for any characters; where a file is missing in the format of
    its pattern, it is taken in another one, a label in one without loss. labels: (pattern, id map) in order of
    preference; fields of one name are equal in both. splits: what a split is called in the tree, where `{split}` is;
    empty: any. any_size: labels may differ from their pictures in size (they are then resized, nearest). besides: files
    with this in their name are something else. unlabelled: splits whose labels are dummies. converted: what the
    field's tools append to a label's name when they write train ids beside it; read where the label itself is missing.
    """

    images: str
    labels: tuple[tuple[str, str], ...]
    splits: dict[str, str] = {}
    any_size: bool = False
    besides: str = ""
    unlabelled: tuple[str, ...] = ()
    converted: tuple[str, ...] = CONVERTED


def _cityscapes(kind: str, suffix: str = "") -> Layout:
    label = "gtFine/{split}/{group}/{name}_gtFine_"
    return Layout(
        f"{kind}/{{split}}/{{group}}/{{name}}_{kind}{suffix}.png",
        ((f"{label}labelIds.png", "labelids"), (f"{label}labelTrainIds.png", "cityscapes")),
        unlabelled=("test",),
    )


def _anonymous(folders: str) -> Layout:
    """ACDC and Dark Zurich."""
    label = f"gt/{folders}/{{name}}_gt_label"
    return Layout(
        f"rgb_anon/{folders}/{{name}}_rgb_anon.png",
        ((f"{label}Ids.png", "labelids"), (f"{label}TrainIds.png", "cityscapes")),
    )


def _mapillary(*labels: tuple[str, str]) -> Layout:
    names = {"train": "training", "val": "validation", "test": "testing"}
    return Layout("{split}/images/{name}.jpg", tuple((f"{{split}}/{path}", ids) for path, ids in labels), names)


_PLAIN = "images/{name}.*", "labels/{name}.png"
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
    "mapillary": (_mapillary(("v1.2/labels/{name}.png", "mapillary12"), ("labels/{name}.png", "mapillary12")),),
    "mapillary-v2": (_mapillary(("v2.0/labels/{name}.png", "mapillary20")),),
    "acdc": (_anonymous("{condition}/{split}/{group}"),),
    "darkzurich": (_anonymous("{split}/{group}"),),
    "idd": (
        Layout(
            "leftImg8bit/{split}/{group}/{name}_leftImg8bit.*",
            (
                ("gtFine/{split}/{group}/{name}_gtFine_labelids.png", "idd"),
                ("gtFine/{split}/{group}/{name}_gtFine_polygons.json", "idd"),
                ("gtFine/{split}/{group}/{name}_gtFine_labellevel3Ids.png", "iddlevel3"),
                ("gtFine/{split}/{group}/{name}_gtFine_labelcsTrainIds.png", "cityscapes"),
            ),
        ),
    ),
    "idd-lite": (
        Layout(
            "leftImg8bit/{split}/{group}/{name}_image.*",
            (("gtFine/{split}/{group}/{name}_label.png", "iddlite"),),
            besides="_inst_label",
        ),
    ),
    "kitti": (Layout("training/image_2/{name}.png", (("training/semantic/{name}.png", "labelids"),)),),
    "wilddash2": (Layout(_PLAIN[0], ((_PLAIN[1], "wilddash"),)),),
    "camvid": (
        Layout(_PLAIN[0], ((_PLAIN[1], "camvid"),)),
        Layout("{split}/{name}.png", (("{split}annot/{name}.png", "camvid"),), {s: s for s in SEGNET}),
        Layout("701_StillsRaw_full/{name}.png", (("LabeledApproved_full/{name}_L.png", "camvid32"),)),
    ),
}  # fmt: skip


class Pair(NamedTuple):
    """Paths of one picture and of its label, if it has one; name: unique in the domain; split: "" if there is none."""

    image: Path
    label: Path | None
    name: str
    split: str = ""


class Listing(NamedTuple):
    """What a folder holds of a data set: pairs, the id map of their labels, and what is wrong (one sentence each).

    notes: what is passed over without harm, and where labels seem to lie if there are none.
    """

    pairs: list[Pair]
    ids: str
    any_size: bool
    problems: list[str]
    notes: list[str] = []


def list_pairs(name: str, folder: str, split: str = "", role: str = "", skip: bool = False) -> Listing:
    """The pairs of data set `name` in a folder, of one split.

    split: a split of the tree (or, of ACDC, a condition, or both as in night-val), or of a splits.json or split.mat
    beside it. Without one: the training split for role "source", the validation split for role "target", where there
    are such splits; else everything. skip: what is missing is passed over with a note.
    Raises ValueError if the folder does not hold the data set, or no such split.
    """
    root = Path(os.path.expanduser(folder))
    layout = next((one for one in LAYOUTS[name] if _holds(root, one)), None)
    if layout is None:
        raise ValueError(f"{_text(name, folder, split)}: {_wrong_folder(name, root)}")
    found = _match(root, layout.images, SUFFIXES + UNREAD)
    images = {path: fields for path, fields in found.items() if not path.lower().endswith(UNREAD)}
    named = _named_splits(root, split) if "{split}" not in layout.images else None
    kept, asked = _choose(images, layout, split if named is None else "", role, _text(name, folder, split))
    if named is not None:
        kept = {path: fields for path, fields in images.items() if fields["name"] in named}
    absent = sorted((named or set()) - {fields["name"] for fields in kept.values()})
    labels, pattern, ids = _labels(root, layout, kept)
    pairs, wanting, problems = _join(root, kept, labels, pattern, several="*" in layout.images.removesuffix(".*"))
    notes, lossy = [], [str(p.label) for p in pairs if p.label and p.label.name.lower().endswith(LOSSY)]
    if lossy:
        problems.append(f"{len(lossy)} labels like {lossy[0]} are in a lossy format, ids are lost: export them as PNG")
    elif not labels and not {fields.get("split") for fields in kept.values()} & {*layout.unlabelled}:
        notes = _elsewhere(root, layout, kept)
    if unread := sorted(found.keys() - images.keys()):
        text = f"{len(unread)} pictures like {unread[0]} are in a format that is not read: export them as JPG or PNG"
        (notes if images else problems).append(text)
    if skip:
        pairs = [pair for pair in pairs if pair.name not in wanting]
    else:
        problems += [f"{text}; -o data.on_error=skip passes over it" for text in wanting.values()]
        problems += [f"'{one}' is in the list of the split but not in {root}" for one in absent]
    used = {_key(fields, pattern) for fields in kept.values()}
    alone = [f["name"] for key, (_, f) in labels.items() if key not in used and asked <= set(f.values())]
    passed = {
        "picture{} without a label": wanting if skip else (),
        "picture{} of the split's list that are not there": absent if skip else (),
        "label{} converted to train ids": [one for one in alone if one.endswith(layout.converted)],
        "label{} without a picture": [one for one in alone if named is None and not one.endswith(layout.converted)],
    }
    notes += [f"{len(n)} {what.format('s' * (len(n) != 1))} passed over" for what, n in passed.items() if n]
    return Listing(pairs, ids, layout.any_size, problems, notes)


def _text(name: str, folder: str, split: str) -> str:
    return f"{name}{':' * bool(split)}{split}@{folder}"


def _labels(root: Path, layout: Layout, images: dict) -> tuple[dict, str, str]:
    """The labels {key: (path, fields)} that serve most of the pictures, their pattern and id map; the first of equals.

    Train ids that were written beside labels are looked for only where labels are missing.
    """
    best, most = ({}, *layout.labels[0]), (-1, 0)
    converted = [(f"{p[:-4]}{end}.png", "cityscapes") for end in layout.converted for p, _ in layout.labels]
    for pattern, ids in (*layout.labels, *converted):
        found = _match(root, pattern, () if pattern.endswith(".json") else SUFFIXES, layout.images).items()
        labels = {
            _key(fields, pattern): (path, fields)
            for path, fields in sorted(found, key=lambda one: not one[0].lower().endswith(LOSSY))  # without loss wins
            if not (layout.besides and layout.besides in path) and fields.get("split") not in layout.unlabelled
        }
        serving = [labels[key][0] for key in (_key(f, pattern) for f in images.values()) if key in labels]
        served = sum(not path.lower().endswith(LOSSY) for path in serving), len(serving)
        if served > most:
            best, most = (labels, pattern, ids), served
        if most[0] == len(images):
            break
    return best


def _elsewhere(root: Path, layout: Layout, images: dict) -> list[str]:
    """Where labels of the pictures seem to lie, in folders beside those of the pictures; a note or none."""
    expected = " or ".join(pattern for pattern, _ in layout.labels[:2])
    own = [part / _base(layout.images) for part in _roots(root, layout.images)]
    beside = dict.fromkeys(folder for base in own for folder in (*_folders(root), *_folders(base.parent)))
    like = [f"{glob.escape(fields['name'])}[._]*" for fields in images.values()][:1]
    for folder in (folder for folder in beside if not any(folder in (base, *base.parents) for base in own)):
        for file in (file for pattern in like for file in folder.rglob(pattern)):
            return [f"{folder}/ holds {file.name}, but labels are expected as {root / expected}"]
    for part in (part for part in _folders(root.parent) if not (part / _base(layout.images)).is_dir()):
        if any((part / _base(pattern)).is_dir() for pattern, _ in layout.labels if _base(pattern)):
            return [f"{part} holds labels: give {root.parent}, the folder of both"]
    return []


def _join(root: Path, images: dict, labels: dict, pattern: str, several: bool) -> tuple[list[Pair], dict, list[str]]:
    """Pictures with their labels, {name: sentence} of those whose label is missing, and what is wrong beside.

    A split in which nothing is labelled has no labels. several: one label may serve several pictures, for example fog
    of several strengths.
    """
    pairs, wanting, problems, seen = [], {}, [], {}
    labelled = {fields.get("split", "") for _, fields in labels.values()}
    for path, fields in sorted(images.items()):
        group, split = fields.get("group", ""), fields.get("split", "")
        name = Path(path).stem if several else fields["name"]
        name = name if name.startswith(group) else f"{group}/{name}"
        label = labels.get(_key(fields, pattern))
        if name in seen:
            problems.append(f"'{Path(path).name}' and '{Path(seen[name]).name}' share one name: rename one of them")
            continue
        seen[name] = path
        if label is None and split in labelled:
            wanting[name] = f"image '{name}' has no label: expected {root / _filled(pattern, fields)}"
        pairs.append(Pair(root / path, root / label[0] if label else None, name, split))
    return pairs, wanting, problems


def _regex(pattern: str, formats: Iterable[str]) -> re.Pattern:
    """A pattern, in any of some formats, as a regular expression with its fields as groups."""
    stem, dot, own = pattern.rpartition(".")
    text = re.escape(stem).replace(r"\{", "{").replace(r"\}", "}").replace(r"\*", "[^/]*")
    text = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+?)", text.replace("{group}", "(?P<group>.+?)"))
    endings = [re.escape(ending) for ending in dict.fromkeys((dot + own, *formats)) if ending != ".*"]
    return re.compile(f"{text}(?i:{'|'.join(endings)})")


def _key(fields: dict[str, str], pattern: str) -> tuple:
    return tuple(fields[field] for field in re.findall(r"\{(\w+)\}", pattern) if field in fields)


def _filled(pattern: str, fields: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], "*"), pattern)


def _base(pattern: str) -> str:
    """The folder in front of a pattern's first field, "" if it begins with one."""
    return pattern.split("{")[0].rpartition("/")[0]


def _roots(root: Path, pattern: str, apart: str = "") -> list[Path]:
    """Where a pattern begins: the folder itself, or those in it, up to two deep, that archives were unpacked into.

    apart: of another pattern that must not begin there too, as in a whole data set inside of another.
    """
    base, other, level = _base(pattern), _base(apart), [root]
    for _ in range(3):
        if parts := [part for part in level if not base or (part / base).is_dir()]:
            return [part for part in parts if part == root or not other or not (part / other).is_dir()]
        level = [deeper for folder in level for deeper in _folders(folder)]
    return []


def _match(root: Path, pattern: str, formats: tuple[str, ...], apart: str = "") -> dict[str, dict[str, str]]:
    """{path below root: fields} of all files that fit a pattern; links are followed.

    formats: endings that stand in for the pattern's own where a file is missing. apart: as for `_roots`.
    """
    expression, found, seen = _regex(pattern, formats), {}, set()
    for part in _roots(root, pattern, apart):
        for folder, folders, files in os.walk(part / _base(pattern), followlinks=True, onerror=_refuse):
            seen.add(os.path.realpath(folder))
            folders[:] = [one for one in folders if os.path.realpath(f"{folder}/{one}") not in seen]  # links in circles
            below, where = (Path(folder).relative_to(start) for start in (part, root))
            for file in files:
                match = expression.fullmatch((below / file).as_posix())
                if match and not file.startswith("._"):  # a Mac's notes on a file
                    found[(where / file).as_posix()] = match.groupdict()
    own = pattern[pattern.rindex(".") :].lower()
    there = {path[: -len(own)] for path in found if path.lower().endswith(own)}
    return {p: f for p, f in found.items() if p.lower().endswith(own) or p.rpartition(".")[0] not in there}


def _refuse(error: OSError) -> None:
    """A folder that may not be read is not an empty one."""
    if isinstance(error, PermissionError):
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}.")


def _holds(root: Path, layout: Layout) -> bool:
    """Whether the pictures of a layout are there, or its pictures and its labels in folders of their own."""
    if _base(layout.images):
        images = _roots(root, layout.images)
        labels = _label_roots(root, layout) if images and images != [root] else images
        return images == [root] or bool(labels) and not {*images} & {*labels}
    tops = {layout.images.replace("{split}", value).split("{")[0] for value in layout.splits.values()}
    return any((root / top).is_dir() for top in tops)


def _label_roots(root: Path, layout: Layout) -> list[Path]:
    return [part for pattern, _ in layout.labels for part in _roots(root, pattern)]


def _wrong_folder(name: str, root: Path) -> str:
    """The sentence for a folder that does not hold a data set: which one near it does, else what was expected."""
    below = _folders(root)
    near = [root.parent, root.parent.parent, *below, *(deeper for folder in below for deeper in _folders(folder))]
    holding = {f: one for f in dict.fromkeys(near) for one in LAYOUTS[name] if _holds(f, one)}
    meant = [str(folder) for folder, one in holding.items() if _label_roots(folder, one)] or [*map(str, holding)]
    if meant:
        return f"{root} is the wrong level of the tree: give {' or '.join(meant[:3])}."
    trees = " or ".join(layout.images for layout in LAYOUTS[name])
    return f"expected pictures in {root / trees}, but there is no such folder."


def _folders(root: Path) -> list[Path]:
    """The folders in a folder, as far as they may be seen."""
    try:
        return sorted(Path(entry) for entry in os.scandir(root) if entry.is_dir())
    except OSError:
        return []


def _choose(images: dict, layout: Layout, split: str, role: str, text: str) -> tuple[dict, set[str]]:
    """The pictures of a split, and the values of the fields that it names."""
    values = {field: {f[field] for f in images.values() if field in f} for field in ("split", "condition")}
    known = {layout.splits.get(value, value): value for value in set().union(*values.values())}
    names = {name: value for name, value in layout.splits.items() if value in known} | {v: v for v in known}
    if layout.splits:  # "{split}/..." would take any folder for a split
        images = {path: f for path, f in images.items() if f["split"] in layout.splits.values()}
    asked = [split] if split in names else split.split("-") if split else []
    for part in asked:
        if part not in names:
            where = f"; there are {', '.join(sorted(names))}" if names else ": this data set has none in its tree"
            raise ValueError(f"{text}: unknown split '{part}'{where} ({nearest(part, names)}).")
    wanted = {names[part] for part in asked}
    if role and not wanted & values["split"]:
        wanted |= set([value for value in USUAL[role] if value in values["split"]][:1])
    kept = {path: fields for path, fields in images.items() if wanted <= set(fields.values())}
    return kept, wanted


def _named_splits(root: Path, split: str) -> set[str] | None:
    """The names of a split that a list beside the tree holds: splits.json, or GTAV's split.mat; None without split."""
    if not split:
        return None
    if (root / "split.mat").is_file():
        splits = _read_mat(root / "split.mat")
    elif (root / "splits.json").is_file():
        try:
            content = json.loads((root / "splits.json").read_bytes())["splits"]
            splits = {
                name: [*map(str, [*names] if isinstance(names, list) else None)] for name, names in content.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'{root / "splits.json"} cannot be read: expected {{"splits": {{name: [picture, ...]}}}}.'
            ) from None
    else:
        raise ValueError(f"A split '{split}' is named, but there is no splits.json in {root}: leave ':{split}' out.")
    if split not in splits:
        raise ValueError(f"Unknown split '{split}' of {root} ({nearest(split, splits)}).")
    return set(splits[split])


def _read_mat(path: Path) -> dict[str, Iterable[str]]:
    """The splits of GTAV's split.mat: {"train": ["00001", ...], ...}."""
    from scipy.io import loadmat

    try:
        ids = {key.removesuffix("Ids"): value for key, value in loadmat(path).items() if key.endswith("Ids")}
        return {split: [f"{int(i):05d}" for i in value.ravel()] for split, value in ids.items()}
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise ValueError(f"{path} cannot be read ({error}): download it again.") from None
