"""What a domain holds and what is wrong with it: pairs, sizes, class shares, damaged files, pictures that two share."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from setlib.data import domains
from setlib.data.layouts import Listing
from setlib.experiment import Data

BAR, LISTED = 40, 10  # characters of a class that covers everything; problems of a domain that are shown
ALONE = 200  # up to so many pairs are decoded in this process: starting others takes seconds
GLANCE = 8  # labels that are decoded of each split when not all are


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

    def __str__(self) -> str:
        """Pairs, sizes, class shares as bars, problems and notes."""
        kind = "pairs" if self.labelled else "pictures without labels (to predict and look at, not to score)"
        sizes = ", ".join(f"{w} x {h} ({n})" for (w, h), n in self.sizes.most_common(5))
        name = f"{self.domain} {self.split}".rstrip()
        lines = [f"{name}: {self.pairs} {kind}" + (f"; sizes: {sizes}" if sizes else "")]
        shares = self.class_pixels | {"(ignored)": self.ignored_pixels}
        total = sum(shares.values())
        for name, pixels in shares.items() if total else ():
            lines.append(f"  {name:<14}{100 * pixels / total:5.1f} %  {'#' * round(BAR * pixels / total)}".rstrip())
        lines += [f"  problem: {problem}" for problem in self.problems[:LISTED]]
        lines += [f"  and {len(self.problems) - LISTED} more problems"] if self.problems[LISTED:] else []
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def to_dict(self) -> dict:
        """The row of `check --json`."""
        return {key: value for key, value in vars(self).items() if key not in ("labelled", "sizes")}


def check(text: str, data: Data, role: str = "", deep: bool = True) -> list[Check]:
    """Looks at a whole domain, one entry for each split; what is wrong is listed, not raised.

    The files' headers are read, and a few labels; deep: everything is decoded, by all cores if it is much, and class
    pixels are counted (so it always is of the hub). role: "source" or "target" looks at the split that would be used;
    "" at all. Raises ValueError only when the domain cannot be listed at all.
    """
    spec = domains.parse(text)
    if spec.name == "hub":
        deep, domain, listing = True, domains.load(text, data, role or "target"), Listing([])
    else:
        domain, listing = domains.find(spec, data, role)
    splits = [row.get("split", "") for row in domain.dataset]
    found = {split: Check(text, split, splits.count(split), labelled=False) for split in sorted({*splits})}
    decoded = [deep] * len(splits)
    for split in found:
        places = [place for place, one in enumerate(splits) if one == split]
        for i in np.linspace(0, len(places) - 1, GLANCE).astype(int):
            decoded[places[i]] = True
    first = next(iter(found.values()))
    first.problems += listing.problems

    look = partial(_look, replace(domain, dataset=None))
    counts, headers = {split: np.zeros(256, np.int64) for split in found}, []
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:  # starts none before it is used
        many = deep and spec.name != "hub" and len(splits) > ALONE
        each = partial(pool.map, chunksize=16) if many else map
        looks = tqdm(each(look, domain.dataset, decoded), f"check {text}", len(splits), leave=False, unit="img")
        for split, row, (header, pixels) in zip(splits, domain.dataset, looks, strict=True):
            headers.append(header)
            found[split].labelled |= bool(row["label"])
            found[split].problems += [header.problem] if header.problem else []
            found[split].sizes.update([header.size] if header.size else [])
            counts[split] += pixels
    first.notes += listing.notes + domains.turned_note(headers, data)
    for split, one in found.items():
        scored = np.bincount(domain.ids.to_score, counts[split], 256)[: len(domain.class_set)].astype(int).tolist()
        if deep:
            one.class_pixels = dict(zip(domain.class_set.classes, scored, strict=True))
            one.ignored_pixels = int(counts[split].sum()) - sum(scored)
        if counts[split].any() and not sum(scored):
            these = "every label" if deep else "every label looked at"
            one.problems.append(f"{these} is ignored as a whole: nothing to learn or score")
    return list(found.values())


def _look(domain: domains.Domain, row: dict, decoded: bool) -> tuple[domains.Header, np.ndarray]:
    """What the headers of one row say, and, if it is decoded, what else is wrong and its pixels by raw id."""
    header, pixels = domain.header(row), np.zeros(256, np.int64)
    if decoded and not header.problem:
        try:
            label = domain.read(row).label
            pixels += 0 if label is None else np.bincount(label.ravel(), minlength=256)
        except ValueError as error:
            header = header._replace(problem=str(error))
    return header, pixels


def duplicates(texts: Sequence[str], data: Data) -> list[str]:
    """Pictures that two domains share, by content, one sentence each: a target must hold nothing of its source."""
    specs = [spec for spec in map(domains.parse, texts) if spec.name not in ("hub", "scenes")]
    sets = {(s.name, os.path.realpath(os.path.expanduser(s.folder)), s.split): s for s in reversed(specs)}
    by_size: dict[int, list[tuple[str, str]]] = {}
    for spec in sets.values():
        for pair in domains.find(spec, data)[1].pairs:
            by_size.setdefault(os.path.getsize(pair.image), []).append((spec.text, pair.image))
    found: dict[bytes, tuple[str, str]] = {}
    wrong = []
    for files in by_size.values():
        for text, path in files if len({text for text, _ in files}) > 1 else ():
            digest = hashlib.sha256(Path(path).read_bytes()).digest()
            first = found.setdefault(digest, (text, path))
            if first[0] != text:
                wrong.append(f"{path} of '{text}' is the same picture as {first[1]} of '{first[0]}'")
    return wrong


def check_labelled(names: Sequence[str], data: Data, every: bool = False) -> None:
    """Raises ValueError if a domain cannot be listed, or if none (with `every`: not every one) can be scored."""
    bare = [n for n in names if domains.parse(n).name != "scenes" and not domains.load(n, data).has_labels]
    if bare and (every or len(bare) == len(names)):
        raise ValueError(f"Domain '{bare[0]}' has no labels: it can be predicted and looked at, not scored.")
    for name in names:
        if number := domains.shared(data.source, name, data):
            domains.say(f"{name}: scored on {number} pictures that it is trained on; name another split to score")
