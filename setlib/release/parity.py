"""Parity: our modules compared with golden numbers that the public releases of Rein and SET computed."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from setlib.release.checkpoint import load_head, load_tokens, tokens_to_release
from setlib.weights.convert import under

TOLERANCE = 1e-5
REFINERS = {"rein": "rein", "released_set": "set-released"}  # what a file calls them, and we


def verify(path: Path) -> list[dict]:
    """Compares our modules with the golden numbers of a file, item by item: {"item", "difference"}, the largest one.

    A difference is absolute, or relative to a number that is larger than 1.

    The file is an npz with input/B<b> (B, 1 + N, C), class token first, and for each module ("rein", "released_set")
    param/<name>, output/B<b>/layer<l>, queries, and the gradients of the sum of squares of one layer's output at one
    batch: grad_input/B<b>/layer<l> and grad/<name>. Or it holds a mask head: param/decode_head.<name>, queries, and for
    sizes input/<size>/<0 to 3>, and class_logits and mask_logits/<size>/stage<s>.
    Raises ValueError if the file cannot be read or holds none of it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            golden = {key: torch.from_numpy(np.array(file[key])) for key in file.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile):
        raise ValueError(f"{path} cannot be read as an npz of golden numbers: missing, damaged or no npz.") from None
    try:
        pairs = [*_of_head(golden), *_of_refiners(golden)]
        rows = [{"item": item, "difference": _difference(found, expected)} for item, found, expected in pairs]
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} is not laid out as golden numbers are ({type(error).__name__}: {first}).") from None
    if not rows:
        raise ValueError(f"{path} holds no golden numbers of {', '.join(REFINERS)} or a decode_head.")
    return rows


def _of_head(golden: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(item, what the mask head says, what the release's said); nothing if the file holds none."""
    parameters = under(golden, "param/decode_head.")
    if not parameters:
        return
    head, outputs = load_head(parameters), {}
    for key, expected in golden.items():
        place = re.fullmatch(r"(class|mask)_logits/(.+)/stage(\d+)", key)
        if not place:
            continue
        kind, size, stage = place.groups()
        if size not in outputs:
            maps = [golden[f"input/{size}/{i}"] for i in range(4)]
            with torch.no_grad():
                outputs[size] = head.decode(maps, golden.get("queries"))
        found = outputs[size].classes if kind == "class" else outputs[size].masks
        yield key, found[int(stage)], expected


def _of_refiners(golden: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(item, what a refiner says, what the release's said)."""
    for module, name in REFINERS.items():
        part = under(golden, f"{module}/")
        if not part:
            continue
        refiner = load_tokens(name, under(part, "param/"))
        for key, expected in part.items():
            place = re.fullmatch(r"(output|grad_input)/B(\d+)/layer(\d+)", key)
            if key == "queries":
                yield f"{module}/{key}", refiner.queries(), expected
            elif place:
                tokens = golden[f"input/B{place[2]}"].clone().requires_grad_()
                patches = refiner(tokens[:, None, 1:], int(place[3]) + 1)  # (B, 1, N, C); releases count from 0
                output = torch.cat([tokens[:, :1], patches[:, 0]], dim=1)
                if place[1] == "output":
                    yield f"{module}/{key}", output, expected
                    continue
                refiner.zero_grad()
                output.square().sum().backward()
                yield f"{module}/{key}", tokens.grad, expected
                gradients = tokens_to_release({n: p.grad for n, p in refiner.named_parameters()}, name)
                for parameter, gradient in under(part, "grad/").items():
                    yield f"{module}/grad/{parameter}", gradients[parameter], gradient


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as `verify` defines it; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
