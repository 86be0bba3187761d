"""How fast and how large the parts are: what `python -m setlib bench` measures.

The repeats of the cases that are compared are interleaved, each case in a process of its own, so that a machine that
slows down slows all of them; medians are reported. Memory is measured in another fresh process. Seconds mean little on
another machine; the ratios to the head alone, or to a group's first case, travel. What a GPU does is measured in
`gpu.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from setlib import _kernels
from setlib._memory import MALLOC
from setlib.files import nearest
from setlib.refiners import build_refiner

Step = Callable[[], object]
Size = tuple[int, int, int, int]  # (B, H, W, C)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPEATS = 9
TURN = 0.2  # seconds that a turn lasts at least: a short step is taken several times
SIZES: tuple[Size, ...] = ((4, 32, 32, 1024), (2, 16, 32, 384))
GRIDS: tuple[Size, ...] = ((16, 16, 16, 384), (4, 32, 32, 384), (1, 64, 64, 384))  # of as many patches each
TOKENS, RANK = 100, 16
PROFILE = "quick"  # of a training step
ALL_LAYERS = ("model.refined_layers=", "train.batch_size=4", "train.precision=float32")
CHECKPOINTING = {"without": (ALL_LAYERS, False), "with": ((*ALL_LAYERS, "train.checkpointing=true"), False)}
HEAVY = 3  # repeats of the paper's step
BASELINES = ("none", "full", "lora", "vpt", "adaptformer", "rein", "fada", "set")


class Case(NamedTuple):
    """One line of the table. prepare: builds the inputs and returns the step to measure; it must be picklable."""

    bench: str
    variant: str
    size: str
    prepare: Callable[[], Step]
    repeats: int = REPEATS


def backward_step(inputs: Sequence[Tensor], call: Callable[..., Sequence[Tensor]]) -> Step:
    """Forward and backward of call(*inputs) with random gradients at its outputs; the inputs' gradients are let go."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    gradients = [torch.randn_like(y) for y in call(*inputs)]

    def step() -> None:
        torch.autograd.backward(call(*inputs), gradients)
        for x in inputs:
            x.grad = None

    return step


def refiner_step(name: str, size: Size) -> Step:
    """One layer's refiner, forward and backward, on random features of a size."""
    torch.manual_seed(0)
    refiner = build_refiner(name, (1,), size[-1], TOKENS, RANK).to(DEVICE)
    step = backward_step([torch.randn(size, device=DEVICE)], lambda x: [refiner(x, 1)])

    def whole() -> None:
        step()
        refiner.zero_grad()

    return whole


def part_step(part: str, size: Size) -> Step:
    """One part of what SET's refiner does in a layer, forward and backward: "spectrum" (split and join), of it
    "Fourier" (both ways, twice), "attention" of both branches, their "linear maps"."""
    torch.manual_seed(0)
    x, grid = torch.randn(size, device=DEVICE), size[1:3]
    if part == "spectrum":
        return backward_step([x], lambda y: [_kernels.join_spectrum(_kernels.split_spectrum(y), grid)])
    if part == "Fourier":
        return lambda: [_kernels.from_parts(_kernels.to_parts(x), grid) for _ in range(2)]
    refiner = build_refiner("set", (1,), size[-1], TOKENS, RANK).to(DEVICE)
    positions = [half.flatten(1, 2) for half in _kernels.split_spectrum(x)]
    branches = list(refiner.branches().values())
    calls = {
        "attention": lambda *p: [branch.attention(y, 0) for branch, y in zip(branches, p, strict=True)],
        "linear maps": lambda *p: [branch.delta_map(y) for branch, y in zip(branches, p, strict=True)],
    }
    return backward_step(positions, calls[part])


def _shown(size: Size) -> str:
    return "B={}, {} x {}, C={}".format(*size)


def refiner_cases() -> list[Case]:
    """Rein, SET and SET as released, one layer each."""
    names = ("rein", "set", "set-released")
    return [Case("refiner", name, _shown(s), partial(refiner_step, name, s)) for s in SIZES for name in names]


def part_cases() -> list[Case]:
    """Where the time of SET's layer goes: the polar form is the spectrum without Fourier."""
    found = []
    for size in SIZES:
        found.append(Case("parts", "whole layer", _shown(size), partial(refiner_step, "set", size)))
        for part in ("spectrum", "Fourier", "attention", "linear maps"):
            found.append(Case("parts", part, _shown(size), partial(part_step, part, size)))
    return found


def grid_cases() -> list[Case]:
    """The same patches as many small grids or as a large one: equal seconds mean a cost that is linear in patches."""
    return [Case("grid", name, _shown(s), partial(refiner_step, name, s)) for s in GRIDS for name in ("rein", "set")]


def step_cases() -> list[Case]:
    """A training step of every baseline, all layers refined, against the frozen backbone with its head alone."""
    from setlib.bench import gpu

    return [
        Case("step", name, f"{PROFILE}, all layers", partial(gpu.profile_step, PROFILE, name, *ALL_LAYERS, kept=False))
        for name in BASELINES
    ]


def set_cases(bench: str, size: str, variants: dict[str, tuple[tuple[str, ...], bool]]) -> list[Case]:
    """A training step of SET in variants: options of the profile, and whether the frozen features are at hand."""
    from setlib.bench import gpu

    return [
        Case(bench, name, f"{PROFILE}, {size}", partial(gpu.profile_step, PROFILE, "set", *options, kept=kept))
        for name, (options, kept) in variants.items()
    ]


def paper_cases() -> list[Case]:
    """Training steps and a prediction with the paper's head, without a refiner, with Rein and with SET."""
    from setlib.bench import gpu

    plan, cases = gpu.PLAN, []
    crop = plan.crops[0]
    for kind, size, batch in (("step", "S", 2), ("step", "L", 1), ("prediction", "L", 1)):
        for refiner in ("none", "rein", "set"):
            step = partial(gpu.PAPER[kind], size, refiner, batch, crop, *plan.options)
            cases.append(Case("paper", refiner, f"DINOv2-{size}, {kind}, B={batch}, {crop} x {crop}", step, HEAVY))
    return cases


BENCHES: dict[str, Callable[[], list[Case]]] = {
    "refiner": refiner_cases,
    "parts": part_cases,
    "grid": grid_cases,
    "step": step_cases,
    "cache": partial(set_cases, "cache", "set", {"with frozen features": ((), True), "without": ((), False)}),
    "checkpointing": partial(set_cases, "checkpointing", "set, all layers", CHECKPOINTING),
    "paper": paper_cases,
}


def bench(names: Iterable[str] = ()) -> dict:
    """Measures the named benches (all of them without names), "gpu" where there is one; see `gpu.measure`.

    Returns the versions of the machine and "rows" of bench, variant, size, seconds, peak_bytes, ratio and peak_ratio.
    seconds: of a step, median over the repeats. peak_bytes: what a step needs at its highest beyond what it leaves
    behind (on a GPU: in all); 0 where the system does not tell. Ratios are to the head alone of the same bench and
    size, or to the first case; 0 where one of the two has no number. Raises ValueError for an unknown name (the
    nearest are listed).
    """
    from setlib.bench import gpu

    names = list(dict.fromkeys(names)) or [*BENCHES, "gpu"]
    for name in names:
        if name not in (*BENCHES, "gpu"):
            raise ValueError(f"Unknown bench '{name}' ({nearest(name, [*BENCHES, 'gpu'])}).")
    cases = [BENCHES[name]() for name in names if name != "gpu"]
    groups = [list(group) for found in cases for _, group in groupby(found, key=lambda case: case.size)]
    machine, rows = gpu.machine(), []
    turns = sum(case.repeats + 2 for group in groups for case in group)
    with tqdm(total=turns, desc="bench", unit="turn", disable=not groups) as bar:
        for group in groups:
            bar.set_postfix_str(f"{group[0].bench}, {group[0].size}")
            for case, second, peak in zip(group, _times(group, bar), _peaks(group, bar), strict=True):
                rows.append(case._asdict() | {"seconds": second, "peak_bytes": peak})
                del rows[-1]["prepare"], rows[-1]["repeats"]
    if "gpu" in names and gpu.has_gpu():
        rows += gpu.measure(gpu.PLAN)
    add_ratios(rows)
    return machine | {"rows": rows}


def add_ratios(rows: Sequence[dict]) -> None:
    """Puts the ratios of seconds and of peak memory into each row."""
    bases: dict[tuple[str, str], dict] = {}
    for row in rows:
        key = row["bench"], row["size"]
        bases[key] = row if row["variant"] == "none" else bases.get(key, row)
    for row in rows:
        base = bases[row["bench"], row["size"]]
        for name, key in (("ratio", "seconds"), ("peak_ratio", "peak_bytes")):
            row[name] = row[key] / base[key] if base[key] else 0.0


def table(rows: Sequence[dict]) -> list[list[str]]:
    """Header and rows as text, "-" where there is no number."""
    shown = [["bench", "variant", "size", "seconds", "ratio", "images/s", "peak MB", "ratio", ""]]
    for row in rows:
        numbers = [row["seconds"], row["ratio"], row.get("images_per_second", 0.0)]
        numbers += [row["peak_bytes"] / 1e6, row["peak_ratio"]]
        texts = [f"{x:.{digits}f}" if x else "-" for x, digits in zip(numbers, (4, 2, 1, 1, 2), strict=True)]
        shown.append([row["bench"], row["variant"], row["size"], *texts, row.get("note", "")])
    return shown


def _process() -> ProcessPoolExecutor:
    """A fresh process."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _times(group: Sequence[Case], bar: tqdm) -> list[float]:
    """Median seconds of each case, which take their turns one after the other."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_process()) for _ in group]
        for process, case in zip(processes, group, strict=True):
            process.submit(_prepare, case.prepare).result()
            bar.update()
        turns = []
        for _ in range(group[0].repeats):
            turns.append([process.submit(_turn).result() for process in processes])
            bar.update(len(group))
    return [statistics.median(seconds) for seconds in zip(*turns, strict=True)]


def _peaks(group: Sequence[Case], bar: tqdm) -> list[int]:
    """Peak memory of each case in bytes."""
    peaks = []
    for case in group:
        with _process() as process:
            peaks.append(process.submit(_peak, case.prepare).result())
        bar.update()
    return peaks


# In the process of a case

_step: Step


def _prepare(prepare: Callable[[], Step]) -> None:
    """Builds the step and takes it once: what is set up at first use is not measured."""
    global _step
    _step = prepare()
    _step()


def _turn() -> float:
    """Seconds of a step, averaged over a turn."""
    _step()
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < TURN:
        _step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        count += 1
    return (time.perf_counter() - start) / count


def _peak(prepare: Callable[[], Step]) -> int:
    """Bytes that a step adds at its highest."""
    if sys.platform != "linux" or DEVICE == "cuda":
        return 0
    with contextlib.suppress(AttributeError):  # another C library than GNU's
        MALLOC.clear()
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: from 64 kB on what is freed goes back to the system
    _prepare(prepare)
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    _step()
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
