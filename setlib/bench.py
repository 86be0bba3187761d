"""How fast and how large the parts are: what `python -m setlib bench` measures.

The repeats of the cases that are compared are interleaved, each case in a process of its own, so that a machine that
slows down slows all of them; medians are reported. Memory is measured in another fresh process. Seconds mean little on
another machine; the ratios to a group's first case travel.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import datasets
import evaluate
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Dinov2Config, Dinov2Model

from setlib import browser, domains, spectral
from setlib.backbone import FrozenBackbone
from setlib.evaluate import MeanIoU
from setlib.experiment import Data, Experiment, nearest
from setlib.model import Segmenter
from setlib.processes import MALLOC
from setlib.refiners import Refiner, build_refiner
from setlib.train import Trainer
from setlib.windows import Windows

Step = Callable[[], object]
Size = tuple[int, int, int, int]  # (B, H, W, C)
REPEATS = 9
TURN = 0.2  # seconds that a turn lasts at least: a short step is taken several times
SIZES: tuple[Size, ...] = ((4, 32, 32, 1024), (2, 16, 32, 384))
GRIDS: tuple[Size, ...] = ((16, 16, 16, 384), (4, 32, 32, 384), (1, 64, 64, 384))  # of as many patches each
TOKENS, RANK = 100, 16
BACKBONE, CROP, BATCH, LAST = "dinov2-small-saliency", (224, 448), 4, (9, 10, 11, 12)  # of a training step
DINOV2 = {"S": (384, 12, 6), "L": (1024, 24, 16)}  # channels, layers, attention heads
LAYER = "layer 9"  # of a swap of features
PAPER = (512, 1024)  # crops of the paper's profiles
TOKEN_REFINERS, HEAVY = ("none", "rein", "set"), 3  # of the paper's steps, and their repeats
BASELINES = ("none", "full", "lora", "vpt", "adaptformer", "rein", "fada", "set")


class Case(NamedTuple):
    """One line of the table. prepare: builds the inputs and returns the step to measure; it must be picklable."""

    bench: str
    variant: str
    size: str
    prepare: Callable[[], Step]
    repeats: int = REPEATS


class Own(float):
    """Seconds that a step has measured itself."""


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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
    refiner = build_refiner(name, (1,), size[-1], TOKENS, RANK).to(_device())
    step = backward_step([torch.randn(size, device=_device())], lambda x: [refiner(x, 1)])

    def whole() -> None:
        step()
        refiner.zero_grad()

    return whole


def part_step(part: str, size: Size) -> Step:
    """One part of what SET's refiner does in a layer, forward and backward: "spectrum" (split and join), of it
    "Fourier" (both ways, twice), "attention" of both branches, their "linear maps"."""
    torch.manual_seed(0)
    x, grid = torch.randn(size, device=_device()), size[1:3]
    if part == "spectrum":
        return backward_step([x], lambda y: [spectral.join_spectrum(spectral.split_spectrum(y), grid)])
    if part == "Fourier":
        return lambda: [spectral.from_parts(spectral.to_parts(x), grid) for _ in range(2)]
    refiner = build_refiner("set", (1,), size[-1], TOKENS, RANK).to(_device())
    positions = [half.flatten(1, 2) for half in spectral.split_spectrum(x)]
    branches = list(refiner.branches().values())
    calls = {
        "attention": lambda *p: [branch.attention(y, 0) for branch, y in zip(branches, p, strict=True)],
        "linear maps": lambda *p: [branch.delta_map(y) for branch, y in zip(branches, p, strict=True)],
    }
    return backward_step(positions, calls[part])


def training_step(refiner: str, layers: Sequence[int] = (), cached: bool = False, checkpointing: bool = False) -> Step:
    """One step of the training loop on random pictures: forward, loss, backward, optimiser.

    layers: refined; () = all. cached: whether the features of the frozen first layers are at hand.
    """
    options = {"model.backbone": BACKBONE, "model.refiner": refiner, "model.feature_layers": "", "train.steps": 10**6}
    options |= {"model.refined_layers": ",".join(map(str, layers)), "train.checkpointing": checkpointing}
    model = Segmenter(Experiment.build("quick", overrides=[f"{key}={value}" for key, value in options.items()]))
    trainer = Trainer(model.train(), None)
    images, labels = torch.rand(BATCH, 3, *CROP, device=_device()), _labels(BATCH, *CROP)
    prefix = model.prefix(images) if cached else None
    return lambda: trainer.step(images, labels, prefix)


def _labels(batch: int, height: int, width: int) -> Tensor:
    """Random labels in squares of 32 pixels, of all classes."""
    coarse = torch.randint(19, (batch, -(-height // 32), -(-width // 32)), device=_device())
    return coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :height, :width]


def paper_model(size: str, refiner: str, *overrides: str) -> Segmenter:
    """The paper profile's model on a DINOv2 of random weights, "S" or "L", patches of 16."""
    channels, layers, heads = DINOV2[size]
    torch.manual_seed(0)
    sizes = {"hidden_size": channels, "num_hidden_layers": layers, "num_attention_heads": heads}
    backbone = FrozenBackbone(Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14)), size, patch_size=16)
    read = ",".join(str(layers * k // 6) for k in (2, 3, 4, 6))
    options = [f"model.refiner={refiner}", f"model.feature_layers={read}", *overrides]
    return Segmenter(Experiment.build("paper", "scenes:game", ["scenes:fog"], overrides=options), backbone)


class Through(Refiner):
    """Changes nothing, but has the gradient go through every layer: what a step costs beside its refiner."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__(layers)
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return features + self.zero


def paper_step(size: str, refiner: str, batch: int, crop: int, *overrides: str) -> Step:
    """One step of the paper's training on random pictures, without the reading of files.

    refiner: "through" for the gradient through every layer without a refiner.
    """
    options = (f"train.batch_size={batch}", "train.steps=1000000", *overrides)
    model = paper_model(size, "none" if refiner == "through" else refiner, *options).train()
    if refiner == "through":
        model.refiner = Through(range(1, model.backbone.num_layers + 1)).to(_device())
    trainer = Trainer(model, None)
    images, labels = torch.rand(batch, 3, crop, crop, device=_device()), _labels(batch, crop, crop)
    return lambda: trainer.step(images, labels, None)


def paper_prediction(size: str, refiner: str) -> Step:
    """Class probabilities of one window."""
    model = paper_model(size, refiner).eval()
    side = PAPER[0]
    view = Windows(torch.rand(1, 3, side, side), [(0, 0)], (side, side))
    return lambda: model.probabilities([view])


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


def loading_step(variant: str, suffix: str, size: tuple[int, int]) -> Step:
    """One labelled picture (h, w) from its files: by Pillow alone, as a domain's sample, or for a "crop" of 512."""
    folder = tempfile.TemporaryDirectory(prefix="setlib-bench-")
    root, random = Path(folder.name), np.random.default_rng(0)
    coarse = random.integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
    picture = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    label = Image.fromarray(coarse[..., 0] % 19).resize(size[::-1], Image.Resampling.NEAREST)
    for name, made, end in (("images", picture, suffix), ("labels", label, "png")):
        (root / name).mkdir()
        made.save(root / name / f"a.{end}")
    if variant == "Pillow":
        paths = [root / "images" / f"a.{suffix}", root / "labels" / "a.png"]
        return lambda _=folder: [np.asarray(Image.open(path)) for path in paths]
    domain = domains.load(f"folder@{root}", Data())
    return lambda _=folder: domain.sample(0, 512 if variant == "crop" else 0)


def metric_step(variant: str) -> Step:
    """Mean IoU of 8 pictures of 512 x 1024 in 19 classes: counted, or as the metrics' hub does it."""
    random = np.random.default_rng(0)
    maps = random.integers(0, 19, (2, 8, 512, 1024), np.uint8)

    def counted() -> float:
        metric = MeanIoU(19)
        metric.add_batch(predictions=maps[0], references=maps[1])
        return metric.compute()["miou"]

    return (
        counted
        if variant == "counts"
        else lambda: _RowsAndHistograms().compute(predictions=maps[0], references=maps[1])
    )


class _RowsAndHistograms(evaluate.Metric):
    """The way of the hub's mean_iou, to compare with: Arrow rows of pixels, and three histograms a picture."""

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))
        features = datasets.Features({"predictions": rows, "references": rows})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        areas = np.zeros((3, 19))
        for prediction, reference in zip(predictions, references, strict=True):
            one, other = np.array(prediction), np.array(reference)
            for row, values in enumerate((one[one == other], one, other)):
                areas[row] += np.histogram(values, bins=19, range=(0, 18))[0]
        return {"miou": float(100 * np.mean(areas[0] / (areas[1] + areas[2] - areas[0])))}


def loading_cases() -> list[Case]:
    """A sample against bare decoding: a PNG as GTAV's, a JPEG as Mapillary's."""
    kinds = (("png", (1052, 1914)), ("jpg", (2448, 3264)))
    return [
        Case("loading", variant, f"{size[1]} x {size[0]} {suffix}", partial(loading_step, variant, suffix, size))
        for suffix, size in kinds
        for variant in ("Pillow", "sample", "crop")
    ]


def metric_cases() -> list[Case]:
    """The metric against the way of the hub's."""
    names = ("counts", "rows, histograms")
    return [Case("metric", name, "8 x 512 x 1024", partial(metric_step, name)) for name in names]


def step_cases() -> list[Case]:
    """A training step of every baseline against the frozen backbone with its head alone."""
    size = f"B={BATCH}, {CROP[0]} x {CROP[1]}, all layers"
    return [Case("step", name, size, partial(training_step, name)) for name in BASELINES]


def cache_cases() -> list[Case]:
    """A training step of SET on the last layers, with the frozen features at hand and without."""
    size = f"set, layers {LAST[0]} to {LAST[-1]}"
    return [
        Case("cache", "with frozen features", size, partial(training_step, "set", LAST, True)),
        Case("cache", "without", size, partial(training_step, "set", LAST)),
    ]


def checkpointing_cases() -> list[Case]:
    """A training step of SET on all layers, with activation checkpointing and without."""
    size = f"set, B={BATCH}, all layers"
    return [
        Case("checkpointing", "without", size, partial(training_step, "set")),
        Case("checkpointing", "with", size, partial(training_step, "set", checkpointing=True)),
    ]


def paper_cases() -> list[Case]:
    """Training steps and a prediction with the paper's head, without a refiner, with Rein and with SET."""
    cases = []
    for size, batch in (("S", 2), ("L", 1)):
        name = f"DINOv2-{size}, B={batch}, 512 x 512"
        cases += [Case("paper", r, name, partial(paper_step, size, r, batch, PAPER[0]), HEAVY) for r in TOKEN_REFINERS]
    name = "DINOv2-L, prediction, 512 x 512"
    return cases + [Case("paper", r, name, partial(paper_prediction, "L", r), HEAVY) for r in TOKEN_REFINERS]


def gpu_cases() -> list[Case]:
    """The paper's training step on a GPU: bfloat16, with and without torch.compile; nothing without a GPU.

    The share of the refiners: what a step takes beyond "through", where the gradient goes through every layer too.
    """
    cases = []
    for crop, batch in ((crop, 4) for crop in PAPER if torch.cuda.is_available()):
        name, options = f"DINOv2-L, B={batch}, {crop} x {crop}, bfloat16", ("train.precision=bfloat16",)
        for refiner in ("none", "through", "rein", "set"):
            cases.append(Case("gpu", refiner, name, partial(paper_step, "L", refiner, batch, crop, *options), HEAVY))
        options += ("train.compile=true",)
        cases.append(Case("gpu", "set, compiled", name, partial(paper_step, "L", "set", batch, crop, *options), HEAVY))
    return cases


def slider_step(options: Sequence[str], space: str, with_model: bool) -> Step:
    """A key on the explorer's slider, until its picture has changed; as the browser has measured it."""
    press = browser.swap_step("quick", options, space, with_model)
    return lambda: Own(press() / 1000)


def explorer_cases() -> list[Case]:
    """From a slider's event to the changed picture, in a real browser; nothing without one (see `browser.program`)."""
    size = f"{CROP[0]} x {CROP[1]}, in the browser"
    options = (f"model.backbone={BACKBONE}", "model.refiner=set", "data.eval_images=2")
    variants = {
        "pixels": ("pixels", False),
        "with segmentation": ("pixels", True),
        "layer, segmentation": (LAYER, True),
    }
    return [
        Case("explorer", name, size, partial(slider_step, options, *variant))
        for name, variant in variants.items()
        if browser.program()
    ]


BENCHES: dict[str, Callable[[], list[Case]]] = {
    "refiner": refiner_cases,
    "parts": part_cases,
    "grid": grid_cases,
    "loading": loading_cases,
    "metric": metric_cases,
    "step": step_cases,
    "cache": cache_cases,
    "checkpointing": checkpointing_cases,
    "paper": paper_cases,
    "explorer": explorer_cases,
    "gpu": gpu_cases,
}


def bench(names: Iterable[str] = ()) -> list[dict]:
    """Measures the named benches (all of them without names): rows of bench, variant, size, seconds, peak_bytes.

    seconds: of a step, median over the repeats. peak_bytes: what a step needs at its highest beyond what it leaves
    behind; 0 where the system does not tell. Raises ValueError for an unknown name (the nearest are listed).
    """
    names = list(dict.fromkeys(names)) or list(BENCHES)
    for name in names:
        if name not in BENCHES:
            raise ValueError(f"Unknown bench '{name}' ({nearest(name, BENCHES)}).")
    groups = [list(group) for name in names for _, group in groupby(BENCHES[name](), key=lambda case: case.size)]
    rows: list[dict] = []
    turns = sum(case.repeats + 2 for group in groups for case in group)
    with tqdm(total=turns, desc="bench", unit="turn") as bar:
        for group in groups:
            bar.set_postfix_str(f"{group[0].bench}, {group[0].size}")
            alone = [[case] for case in group] if group[0].bench == "gpu" else [group]  # one at a time in its memory
            seconds, peaks = [second for cases in alone for second in _times(cases, bar)], _peaks(group, bar)
            for case, second, peak in zip(group, seconds, peaks, strict=True):
                rows.append(case._asdict() | {"seconds": second, "peak_bytes": peak})
                del rows[-1]["prepare"], rows[-1]["repeats"]
    return rows


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
        if case.bench == "explorer":  # what it needs lies in other processes
            peaks.append(0)
        else:
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
    """Seconds of a step, averaged over a turn; those that a step has measured itself, where it returns them."""
    _step()
    count, own, start = 0, 0.0, time.perf_counter()
    while not count or time.perf_counter() - start < TURN:
        taken = _step()
        own += taken if isinstance(taken, Own) else 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        count += 1
    return (own or time.perf_counter() - start) / count


def _peak(prepare: Callable[[], Step]) -> int:
    """Bytes that a step adds at its highest."""
    if torch.cuda.is_available():
        _prepare(prepare)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
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
