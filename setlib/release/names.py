"""Parameter names of the public releases of Rein and SET, and ours."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from setlib.weights.convert import rename, split_three

BRANCHES = {"rein": "patches", "set-released": "phase"}  # refiner -> its branch of low-rank tokens
with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file))  # part, release, ours; # is a number, {branch} one of BRANCHES
TOKENS, HEAD = ({row["release"]: row["ours"] for row in ROWS if row["part"] == part} for part in ("tokens", "head"))
PACKED = "self_attn.attn.in_proj_"  # query, key and value, one below the other
PARTS = tuple(f"self_attn.attn.{part}_proj." for part in "qkv")


def tokens_from_release(tokens: dict[str, Tensor], refiner: str) -> dict[str, Tensor]:
    """The parameters of a release's tokens under our names; refiner: "rein" or "set-released"."""
    return rename(tokens, {theirs: ours.format(branch=BRANCHES[refiner]) for theirs, ours in TOKENS.items()})


def tokens_to_release(tokens: dict[str, Tensor], refiner: str) -> dict[str, Tensor]:
    """The parameters of our refiner under a release's names, without its note of the batch size."""
    tokens = {name: value for name, value in tokens.items() if name != "trained_batch"}
    return rename(tokens, {ours.format(branch=BRANCHES[refiner]): theirs for theirs, ours in TOKENS.items()})


def head_from_release(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a release's head under our names."""
    return rename(split_three(head, PACKED, PARTS), HEAD)


def head_to_release(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of our head under a release's names."""
    table = {ours: theirs for theirs, ours in HEAD.items()}
    if "query_embed.weight" in head:
        table["query_features"] = "query_feat"
    named = rename(head, table)
    for name in [name for name in named if PARTS[0] in name]:
        rows = [named.pop(name.replace(PARTS[0], part), None) for part in PARTS]
        if all(row is not None for row in rows):
            named[name.replace(PARTS[0], PACKED)] = torch.cat(rows)
    return named
