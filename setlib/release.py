"""The bridge to the public releases of Rein and SET: their parameter names, and parity with numbers they computed."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from setlib.refiners import build_refiner
from setlib.tokens import TokenRefiner

TOLERANCE = 1e-5
MODULES = {"rein": ("rein", "patches"), "released_set": ("set-released", "phase")}  # refiner, its low-rank branch
NAMES = {
    "scale": "scale",
    "learnable_tokens_a": "{branch}.tokens.a",
    "learnable_tokens_b": "{branch}.tokens.b",
    "mlp_token2feat": "{branch}.token_map",
    "mlp_delta_f": "{branch}.delta_map",
    "learnable_tokens2": "amplitude.tokens.t",
    "mlp_token2feat2": "amplitude.token_map",
    "mlp_delta_f2": "amplitude.delta_map",
    "transform": "query_map.transform",
    "merge": "query_map.merge",
}


def our_name(name: str, branch: str) -> str:
    """A release's parameter name as ours; branch: where the low-rank tokens live, "patches" (Rein) or "phase" (SET).

    Raises ValueError for a name that no release has.
    """
    base, dot, kind = name.partition(".")
    if base not in NAMES:
        raise ValueError(f"Unknown parameter '{name}': expected those of a Rein or SET release ({', '.join(NAMES)}).")
    return NAMES[base].format(branch=branch) + dot + kind


def load_release(refiner: str, parameters: dict[str, Tensor]) -> TokenRefiner:
    """The refiner that a release's parameters make, under the release's names; all sizes are read off them.

    refiner: "rein" or "set-released". Raises ValueError if parameters are missing, left over or of other sizes.
    """
    branch = dict(MODULES.values())[refiner]
    if missing := [
        name for name in ("learnable_tokens_a", "learnable_tokens_b", "transform.weight") if name not in parameters
    ]:
        raise ValueError(f"These are not all parameters of {refiner}: {', '.join(missing)} missing.")
    (num_layers, num_tokens, rank), channels = (
        parameters["learnable_tokens_a"].shape,
        parameters["learnable_tokens_b"].shape[-1],
    )
    sizes = {"query_channels": len(parameters["transform.weight"]), "any_batch": True}
    made = build_refiner(refiner, range(1, num_layers + 1), channels, num_tokens, rank, **sizes).eval()
    try:
        absent, unknown = made.load_state_dict({our_name(k, branch): v for k, v in parameters.items()}, strict=False)
    except RuntimeError as error:
        raise ValueError(f"These parameters do not fit {refiner}: {str(error).splitlines()[-1].strip()}") from None
    if left := [*unknown, *(name for name in absent if name != "trained_batch")]:
        raise ValueError(f"These are not the parameters of {refiner}: {', '.join(left)} missing or left over.")
    return made


def verify(path: Path) -> list[dict]:
    """Compares our modules with the golden numbers of a file, item by item: {"item", "difference"}, largest absolute.

    The file is an npz with input/B<b> (B, 1 + N, C), class token first, and for each module ("rein", "released_set")
    param/<name>, output/B<b>/layer<l>, queries, and the gradients of the sum of squares of one layer's output at one
    batch: grad_input/B<b>/layer<l> and grad/<name>. Raises ValueError if the file cannot be read or holds none of it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            golden = {key: torch.from_numpy(np.array(file[key])) for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an npz of golden numbers ({error}).") from None
    rows = []
    for module, (refiner, branch) in MODULES.items():
        part = {key[len(module) + 1 :]: value for key, value in golden.items() if key.startswith(f"{module}/")}
        if part:
            made = load_release(refiner, _under(part, "param/"))
            rows += [
                {"item": f"{module}/{row}", "difference": value} for row, value in _compare(made, branch, part, golden)
            ]
    if not rows:
        raise ValueError(f"{path} holds no golden numbers of {' or '.join(MODULES)}.")
    return rows


def _under(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix)}


def _apply(refiner: TokenRefiner, tokens: Tensor, layer: int) -> Tensor:
    """A refiner on tokens (B, 1 + N, C), class token first, after layer `layer`, counted from 0 as the releases do."""
    patches = refiner(tokens[:, None, 1:], layer + 1)  # (B, 1, N, C)
    return torch.cat([tokens[:, :1], patches[:, 0]], dim=1)


def _compare(refiner: TokenRefiner, branch: str, part: dict[str, Tensor], golden: dict[str, Tensor]) -> list[tuple]:
    """(item, largest absolute difference) of a module's golden numbers."""
    rows = []
    for key, expected in part.items():
        place = re.fullmatch(r"(output|grad_input)/B(\d+)/layer(\d+)", key)
        if not place and key != "queries":
            continue
        if key == "queries":
            rows.append((key, _distance(refiner.queries(), expected)))
            continue
        tokens, layer = golden[f"input/B{place[2]}"].clone().requires_grad_(), int(place[3])
        output = _apply(refiner, tokens, layer)
        if place[1] == "output":
            rows.append((key, _distance(output, expected)))
            continue
        refiner.zero_grad()
        output.square().sum().backward()
        rows.append((key, _distance(tokens.grad, expected)))
        found = dict(refiner.named_parameters())
        gradients = _under(part, "grad/").items()
        rows += [(f"grad/{name}", _distance(found[our_name(name, branch)].grad, value)) for name, value in gradients]
    return rows


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ."""
    return (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
