"""What a domain holds and what is wrong with it: pairs, sizes, class shares, damaged files; and resized copies.

`check` and `prepare` of the command line. Trees are in `readers.py`, decoding in `pictures.py`.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from setlib.data import domains
from setlib.data.decode import UNREADABLE, LabelError, fitting, measure, read_label, read_picture
from setlib.data.labels import IdMap, id_map
from setlib.data.layouts import Pair
from setlib.experiment import Data
from setlib.files import write_atomic

ALONE = 200  # up to so many pairs are decoded in this process: starting others takes seconds
GLANCE = 8  # labels that are decoded of each split when not all are
MARK = "prepared.json"


@dataclass
class Check:
    """What `check` found in one split of a domain. sizes: {(w, h): pictures}; class_pixels: by class, if decoded.

    ignored_pixels: those of no class. notes: what was passed over without harm.
    """

    domain: str
    split: str = ""
    pairs: int = 0
    labelled: bool = True
    sizes: Counter = field(default_factory=Counter)
    class_pixels: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    ignored_pixels: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The row of `check --json`."""
        kept = ("domain", "split", "pairs", "class_pixels", "problems", "ignored_pixels", "notes")
        return {key: getattr(self, key) for key in kept}


def check(text: str, data: Data, role: str = "", deep: bool = True) -> list[Check]:
    """Looks at a whole domain, one entry for each split; what is wrong is listed, not raised.

    The files' headers are read, and a few labels; deep: everything is decoded, by all cores if it is much, and class
    pixels are counted. role: "source" or "target" looks at the split that would be used; "" at all.
    Raises ValueError only when the domain cannot be listed at all.
    """
    spec = domains.parse(text)
    if spec.name == "hub":
        return [_check_rows(text, domains.load(text, data, role or "target"))]
    listing = domains.find(spec, data, role)
    ids = id_map(listing.ids, data.class_set)
    if not listing.pairs:
        empty = f"Domain '{text}' is empty: no picture in {spec.folder}"
        raise ValueError(f"{empty}{f' ({listing.problems[0]})' if listing.problems else ''}.")
    found: dict[str, Check] = {}
    glanced: set[Path] = set()
    for split in sorted({pair.split for pair in listing.pairs}):
        pairs = [pair for pair in listing.pairs if pair.split == split]
        found[split] = Check(text, split, len(pairs), any(pair.label for pair in pairs))
        glanced |= {pairs[i].image for i in np.linspace(0, len(pairs) - 1, 0 if deep else GLANCE).astype(int)}
    first = next(iter(found.values()))
    first.problems += listing.problems
    stored = data.exif_labels == "stored"
    look = partial(_look, ids=ids, any_size=listing.any_size, glanced=glanced, deep=deep, stored=stored)
    counts, turned = {split: np.zeros(256, np.int64) for split in found}, 0
    for pair, (header, pixels) in zip(listing.pairs, _each(look, listing.pairs, deep, text), strict=True):
        one = found[pair.split]
        turned += header.turned
        if header.size:
            one.sizes[header.size] += 1
        if header.problem:
            one.problems.append(header.problem)
        if pixels is not None:
            counts[pair.split] += pixels
    first.notes += listing.notes + domains.turned_note(turned, data)
    for split, one in found.items():
        _count(one, counts[split], ids, deep)
    return list(found.values())


def _each(look: partial, pairs: Sequence[Pair], deep: bool, text: str) -> Iterable[tuple]:
    """look(pair) of every pair, in order, with a bar."""
    bar = partial(tqdm, desc=f"check {text}", unit="img", total=len(pairs), leave=False)
    if not deep or len(pairs) <= ALONE:
        yield from bar(map(look, pairs))
        return
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
        yield from bar(processes.map(look, pairs, chunksize=16))


def _look(
    pair: Pair, ids: IdMap, any_size: bool, glanced: set[Path], deep: bool, stored: bool
) -> tuple[domains.Header, np.ndarray | None]:
    """What the headers of one pair say, and, if it is decoded, its pixels by raw id."""
    header, counts = domains.header(pair, any_size, whole=deep), None
    if header.problem or not pair.label or not (deep or pair.image in glanced):
        return header, counts
    try:
        label = fitting(read_label(pair.label, ids), pair.image, stored)
        counts = np.bincount(label.ravel(), minlength=256)
    except LabelError as error:
        header = header._replace(problem=f"label of '{pair.name}' {error}")
    except UNREADABLE as error:
        header = header._replace(problem=f"'{pair.name}' cannot be decoded ({error})")
    return header, counts


def _count(found: Check, counts: np.ndarray, ids: IdMap, deep: bool) -> None:
    """Pixels by raw id as those of each class of the set that the domain is scored in; all ignored is a problem."""
    scored = [counts[(ids.to_score == place) & ids.known].sum() for place in range(len(ids.class_set))]
    if deep:
        found.class_pixels = {name: int(n) for name, n in zip(ids.class_set.classes, scored, strict=True)}
        found.ignored_pixels = int(counts.sum() - sum(scored))
    if counts.any() and not sum(scored):
        these = "every label" if deep else "every label looked at"
        found.problems.append(f"{these} is ignored as a whole: nothing to learn or score")


def _check_rows(text: str, domain: domains.Domain) -> Check:
    """A data set of the hub, row by row."""
    found, counts = Check(text, "", len(domain), domain.has_labels), np.zeros(256, np.int64)
    for index in tqdm(range(len(domain)), desc=f"check {text}", unit="img", leave=False):
        try:
            sample = domain.sample(index)
        except ValueError as error:
            found.problems.append(str(error).rstrip("."))
            continue
        found.sizes[sample.image.shape[1::-1]] += 1
        if sample.label is not None:
            counts += np.bincount(sample.label.ravel(), minlength=256)
    _count(found, counts, domain.ids, deep=True)
    return found


def duplicates(texts: Sequence[str], data: Data) -> list[str]:
    """Pictures that two domains share, by content, one sentence each: a target must hold nothing of its source."""
    by_size: dict[int, list[tuple[str, Path]]] = {}
    specs = [spec for spec in map(domains.parse, texts) if spec.name not in ("hub", "scenes")]
    sets = {(s.name, os.path.realpath(os.path.expanduser(s.folder)), s.split): s for s in reversed(specs)}
    for spec in sets.values():
        text = spec.text
        for pair in domains.find(spec, data).pairs:
            by_size.setdefault(pair.image.stat().st_size, []).append((text, pair.image))
    found: dict[bytes, tuple[str, Path]] = {}
    wrong = []
    for files in by_size.values():
        for text, path in files if len({text for text, _ in files}) > 1 else ():
            digest = hashlib.sha256(path.read_bytes()).digest()
            first = found.setdefault(digest, (text, path))
            if first[0] != text:
                wrong.append(f"{path} of '{text}' is the same picture as {first[1]} of '{first[0]}'")
    return wrong


def prepare(text: str, out: Path, short_edge: int, data: Data) -> int:
    """Writes a resized copy of a domain into a folder, in the same tree and under the same names; returns its pairs.

    Pictures are resized antialiased, labels by nearest; what is smaller stays. Labels are written as PNGs of raw ids
    (polygons too). A copy that was cut short goes on. Raises ValueError for a folder that holds anything else.
    """
    spec, mark, skip = domains.parse(text), out / MARK, data.on_error == "skip"
    if spec.name in ("scenes", "hub"):
        raise ValueError(f"Domain '{text}' has no folder of files to copy.")
    if spec.corruption:
        raise ValueError(f"Prepare the clean set, and add ~{spec.corruption}{spec.severity} where the copy is used.")
    listing = domains.find(spec, data)
    if listing.problems:
        raise ValueError(f"{text}: {listing.problems[0]}; see: python -m setlib check {text}.")
    if not listing.pairs:
        raise ValueError(f"Domain '{text}' is empty: no picture in {spec.folder}.")
    root = Path(os.path.expanduser(spec.folder))
    made = {"domain": spec.name, "from": str(root.resolve()), "short_edge": short_edge}
    if Path(made["from"]) in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} lies in the data set itself: name a folder outside of {made['from']}.")
    if out.exists() and any(out.iterdir()) and (not mark.is_file() or mark.read_text(encoding="utf-8") != _json(made)):
        raise ValueError(f"{out} is not empty and no copy of {text} with short edge {short_edge}: name another folder.")
    write_atomic(mark, _json(made))
    for extra in ("splits.json", "split.mat"):
        if (root / extra).is_file():
            write_atomic(out / extra, (root / extra).read_bytes())
    stored, ids = data.exif_labels == "stored", id_map(listing.ids)
    copy = partial(_copy, root=root, out=out, short_edge=short_edge, ids=ids, stored=stored)
    for note in listing.notes:
        domains.say(f"{text}: {note}")
    skipped = 0
    with tqdm(listing.pairs, desc=f"prepare {text}", unit="img") as bar:
        for pair in bar:
            try:
                if problem := domains.header(pair, listing.any_size).problem:
                    raise ValueError(f"{text}: {problem}.")
                copy(pair)
            except ValueError as error:
                if not skip:
                    raise
                skipped += 1
                domains.say(f"skipped ({skipped}): {error}")
    return len(listing.pairs) - skipped


_json = partial(json.dumps, indent=1)


def _copy(pair: Pair, root: Path, out: Path, short_edge: int, ids: IdMap, stored: bool) -> None:
    """One resized pair; a file that is there already is whole."""
    image = out / pair.image.relative_to(root)
    label = None
    if pair.label:
        label = out / pair.label.relative_to(root)
        if label.suffix == ".json":
            label = label.with_name(label.name.replace("_polygons.json", "_labelids.png"))
    if image.is_file() and (label is None or label.is_file()):
        return
    sides, _ = measure(pair.image, whole=pair.image.suffix.lower() == ".png")
    factor = min(1.0, short_edge / min(sides))
    size = tuple(max(1, round(side * factor)) for side in sides)
    pixels = Image.fromarray(read_picture(pair.image, 2 * max(size)))
    if label is not None:
        try:
            if ids.form == "colours":
                with Image.open(pair.label) as picture:
                    label_pixels = np.asarray(picture.convert("RGB"))
            else:
                label_pixels = read_label(pair.label, ids)
        except LabelError as error:
            raise ValueError(f"label of '{pair.name}' {error}.") from None
        except UNREADABLE as error:
            raise ValueError(f"{pair.label} cannot be decoded ({error}): download or export it again.") from None
        drawn = Image.fromarray(fitting(label_pixels, pair.image, stored))
        _save(drawn.resize(size, Image.Resampling.NEAREST), label)
    _save(pixels.resize(size, Image.Resampling.LANCZOS) if factor < 1 else pixels, image)


def _save(picture: Image.Image, path: Path) -> None:
    file = BytesIO()
    quality = {"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    picture.save(file, Image.registered_extensions()[path.suffix.lower()], **quality)
    write_atomic(path, file.getvalue())
