"""How fast and how large the parts are: what `python -m setlib bench` measures.

The repeats of the cases that are compared are interleaved, each case in a process of its own, so that a machine that
slows down slows all of them; medians are reported. Memory is measured in another fresh process. Seconds mean little on
another machine; the ratios to the head alone, or to a group's first case, travel. The steps of whole models, and what
is measured on a GPU alone, are in `gpu.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from tqdm import tqdm

from setlib._memory import MALLOC
from setlib.files import nearest
from setlib.refiners import build_refiner

Step = Callable[[], object]
Size = tuple[int, int, int, int]  # (B, H, W, C)
NAMES = ("refiner", "grid", "step", "cache", "checkpointing", "paper", "gpu")
FRESH = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))  # a process of its own
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
TURN = 0.2  # seconds that a turn lasts at least: a short step is taken several times
SIZES: tuple[Size, ...] = ((4, 32, 32, 1024), (2, 16, 32, 384))
GRIDS: tuple[Size, ...] = ((16, 16, 16, 384), (4, 32, 32, 384), (1, 64, 64, 384))  # of as many patches each
ALL_LAYERS = ("model.refined_layers=", "train.batch_size=4", "train.precision=float32")
BASELINES = ("none", "full", "lora", "vpt", "adaptformer", "rein", "fada", "set", "set-style")


class Case(NamedTuple):
    """One line of the table. prepare: builds the inputs and returns the step to measure; it must be picklable."""

    bench: str
    variant: str
    size: str
    prepare: Callable[[], Step]
    repeats: int = 9


def cases() -> Iterator[Case]:
    """Every case but the GPU's; those that follow each other in one bench and of one size are compared."""
    from setlib.bench import gpu  # imports transformers, which the processes of a layer's cases do without

    for size in SIZES:
        for name in ("rein", "set", "set-released"):
            yield Case("refiner", name, _shown(size), partial(refiner_step, name, size))
    for size in GRIDS:  # equal seconds mean a cost that is linear in patches
        for name in ("rein", "set"):
            yield Case("grid", name, _shown(size), partial(refiner_step, name, size))
    for name in BASELINES:
        step = partial(gpu.profile_step, name, *ALL_LAYERS, kept=False)
        yield Case("step", name, f"{gpu.PROFILE}, all layers", step)
    for variant, kept in (("with frozen features", True), ("without", False)):
        yield Case("cache", variant, f"{gpu.PROFILE}, set", partial(gpu.profile_step, "set", kept=kept))
    for variant, value in (("without", "false"), ("with", "true")):
        step = partial(gpu.profile_step, "set", *ALL_LAYERS, f"train.checkpointing={value}", kept=False)
        yield Case("checkpointing", variant, f"{gpu.PROFILE}, set, all layers", step)
    crop = gpu.CROPS[0]
    for kind, backbone, batch in (("step", "S", 2), ("step", "L", 1), ("prediction", "L", 1)):
        for name in ("none", "rein", "set"):
            size = f"DINOv2-{backbone}, {kind}, B={batch}, {crop} x {crop}"
            yield Case("paper", name, size, partial(gpu.paper_step, kind, backbone, name, batch, crop), repeats=3)


def _shown(size: Size) -> str:
    return "B={}, {} x {}, C={}".format(*size)


def refiner_step(name: str, size: Size) -> Step:
    """One layer's refiner, forward and backward, on random features of a size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        refiner = build_refiner(name, (1,), size[-1]).to(DEVICE)
        x = torch.randn(size, device=DEVICE, requires_grad=True)
        leaves, gradient = [x, *refiner.parameters()], torch.randn_like(refiner(x, 1))
    return lambda: torch.autograd.grad(refiner(x, 1), leaves, gradient, allow_unused=True)


def bench(only: Iterable[str] = ()) -> dict:
    """Measures the named benches (all of them without names), "gpu" where there is one; see `gpu.measure`.

    Returns the versions of the machine and "rows" of bench, variant, size, seconds, peak_bytes, ratio and peak_ratio.
    seconds: of a step, median over the repeats. peak_bytes: what a step needs at its highest beyond what it leaves
    behind (on a GPU: in all); 0 where the system does not tell. Ratios are to the head alone of the same bench and
    size, or to the first case; 0 where one of the two has no number. Raises ValueError for an unknown name (the
    nearest are listed).
    """
    names = list(dict.fromkeys(only)) or list(NAMES)
    for name in names:
        if name not in NAMES:
            raise ValueError(f"Unknown bench '{name}' ({nearest(name, NAMES)}).")
    from setlib.bench import gpu

    chosen = sorted((case for case in cases() if case.bench in names), key=lambda case: names.index(case.bench))
    groups = [list(group) for _, group in groupby(chosen, key=lambda case: (case.bench, case.size))]
    rows, turns = [], sum(case.repeats + 2 for case in chosen)
    with tqdm(total=turns, desc="bench", unit="turn", disable=not groups) as bar:
        for group in groups:
            bar.set_postfix_str(f"{group[0].bench}, {group[0].size}")
            rows += _measured(group, bar)
    if "gpu" in names and HAS_GPU:
        rows += gpu.measure()
    add_ratios(rows)
    card = torch.cuda.get_device_name() if HAS_GPU else ""
    return {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda or "", "rows": rows}


def add_ratios(rows: Sequence[dict]) -> None:
    """Puts the ratios of seconds and of peak memory into each row."""
    for row in rows:
        group = [one for one in rows if (one["bench"], one["size"]) == (row["bench"], row["size"])]
        base = next((one for one in group if one["variant"] == "none"), group[0])
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


def timings(step: Step, count: int, seconds: float) -> list[float]:
    """Seconds of each of at least `count` steps, taken for at least so many seconds in all."""
    taken: list[float] = []
    while len(taken) < count or sum(taken) < seconds:
        start = time.perf_counter()
        step()
        if HAS_GPU:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken


def _measured(group: Sequence[Case], bar: tqdm) -> list[dict]:
    """Rows without ratios of cases that take their turns one after the other."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(FRESH()) for _ in group]
        for process, case in zip(processes, group, strict=True):
            process.submit(_prepare, case.prepare).result()
            bar.update()
        turns = []
        for _ in range(group[0].repeats):
            turns.append([process.submit(_turn).result() for process in processes])
            bar.update(len(group))
    rows = []
    for case, seconds in zip(group, zip(*turns, strict=True), strict=True):
        row = {"bench": case.bench, "variant": case.variant, "size": case.size, "seconds": statistics.median(seconds)}
        with FRESH() as process:
            rows.append(row | {"peak_bytes": process.submit(_peak, case.prepare).result()})
        bar.update()
    return rows


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
    return statistics.mean(timings(_step, 1, TURN))


def _peak(prepare: Callable[[], Step]) -> int:
    """Bytes that a step adds at its highest."""
    if sys.platform != "linux" or HAS_GPU:
        return 0
    with contextlib.suppress(AttributeError):  # another C library than GNU's
        MALLOC.clear()
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: from 64 kB on what is freed goes back to the system
    _prepare(prepare)
    gc.collect()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    _step()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return max(peak - before, 0)
