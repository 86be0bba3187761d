"""The paper's training step and prediction, and what `python -m setlib bench --only gpu` measures of them.

One case follows the other in this process, which makes the paper's backbone once. A batch that does not fit, an error,
and a case that was not reached in time are rows that say so. Nothing is fetched: weights that are not on this machine
are random.
"""

from __future__ import annotations

import functools
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from setlib.backbone import FrozenBackbone
from setlib.bench.measure import DEVICE, Step, timings
from setlib.checkpoint import build_segmenter
from setlib.data.labels import CITYSCAPES
from setlib.experiment import Experiment
from setlib.features import FrozenFeatures, SharedFeatures
from setlib.segmenter import Segmenter
from setlib.training import make_optimiser
from setlib.weights.convert import resize_patches
from setlib.weights.load import load_backbone
from setlib.weights.presets import find_preset, is_here

REFINERS = ("none", "rein", "set", "set-released")
PROFILE = "quick"  # of the step on the offline backbone
BACKBONE, CROPS, BATCHES = "L", (512, 1024), (4, 1)  # of the paper's model; pixels; images, the paper's first
DINOV2 = {  # options of the paper's model on another size
    "S": ("model.backbone=dinov2-small", "model.feature_layers=4,6,8,12"),
    "L": ("model.backbone=dinov2-large",),
}
PRECISIONS, KINDS = ("bfloat16", "float32"), ("step", "prediction")  # kinds: of `paper_step`
WARM_UP, STEPS, SECONDS = 2, 3, 1.0  # steps before those that are measured, of which at least so many for so long
LIMIT = 265.0  # seconds; what was not reached by then is left out
NO_END = "train.steps=1000000"  # the learning rate stays where it starts
STEPS_IN_ALL, CARDS = 40_000, (24, 80)  # of the paper's training; GB of cards that people have
NO_FIT, NOT_REACHED = "does not fit", "not reached"


@functools.cache
def backbone(name: str, patch_size: int = 0) -> FrozenBackbone:
    """A backbone on the device, one for all that ask; a DINOv2 of a preset's shape with random weights if not here."""
    known = find_preset(name)
    if known is None or is_here(name):
        return load_backbone(name, patch_size).to(DEVICE)
    sizes = {"num_hidden_layers": known.layers, "num_attention_heads": known.channels // 64}
    sizes |= {"patch_size": known.patch, "image_size": 37 * known.patch}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Dinov2Model(Dinov2Config(hidden_size=known.channels, **sizes))
    if patch_size:
        resize_patches(model, patch_size)
    return FrozenBackbone(model, f"{name} (random weights)").to(DEVICE)


def random_batch(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, h, w) in [0, 1] and labels (B, h, w) of all classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=generator)
    labels = torch.randint(len(CITYSCAPES), (batch, height, width), generator=generator)
    return images.to(DEVICE), labels.to(DEVICE)


def training_step(model: Segmenter, images: Tensor, labels: Tensor, frozen: FrozenFeatures | None = None) -> Step:
    """Forward, loss, backward, optimiser."""
    settings, optimiser = model.experiment.train, make_optimiser(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        optimiser.zero_grad()
        model.loss(model(images, frozen), labels).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm or float("inf"))
        optimiser.step()

    return step


def own_step(experiment: Experiment, kept: bool) -> tuple[Step, Segmenter, FrozenFeatures | None]:
    """A training step of an experiment on random images, its model, and, if kept, features of its frozen layers."""
    settings, data = experiment.train, experiment.data
    model = build_segmenter(experiment, backbone(experiment.model.backbone, experiment.model.patch_size)).train()
    images, labels = random_batch(max(1, settings.batch_size // settings.accumulate), data.height, data.width)
    frozen = SharedFeatures([model])(images) if kept else None
    return training_step(model, images, labels, frozen), model, frozen


def profile_step(refiner: str, *options: str, kept: bool = True) -> Step:
    """One training step of the profile. kept: whether the features of the frozen first layers are at hand."""
    return own_step(Experiment.build(PROFILE, overrides=[f"model.refiner={refiner}", NO_END, *options]), kept)[0]


def paper_step(kind: str, size: str, refiner: str, batch: int, crop: int, *options: str) -> Step:
    """One step of the paper's training on a DINOv2, or one prediction, on random images.

    kind: "step": forward, loss, backward, optimiser; "prediction": class probabilities (B, 19, h, w) of windows, before
    these are blended on the CPU.
    """
    sizes = f"train.batch_size={batch}", f"data.height={crop}", f"data.width={crop}"
    options = (f"model.refiner={refiner}", "model.any_batch=true", NO_END, *DINOV2[size], *sizes, *options)
    experiment = Experiment.build("paper", "scenes:game", ["scenes:fog"], overrides=options)
    step, model, _ = own_step(experiment, kept=False)
    if kind == "step":
        return step
    images, _ = random_batch(batch, crop, crop)
    model.eval()
    return torch.no_grad()(lambda: model.pixel_probabilities(model(images), (crop, crop)))


# What is measured


def timed(prepare: Callable[[], Step], images: int) -> dict:
    """Median seconds of a step, images per second, and the GPU's memory at its highest, weights included, in bytes."""
    gc.collect()  # what is no longer used leaves the memory, and the peak is counted anew
    torch.cuda.synchronize()  # fails where what the GPU was told has failed
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = prepare()
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    median = statistics.median(timings(step, STEPS, SECONDS))
    peak = torch.cuda.max_memory_allocated()
    return {"seconds": median, "images_per_second": images / median, "peak_bytes": peak}


def compared(refiner: str, *options: str) -> dict:
    """Largest differences of a small model in float32 on the GPU and on the CPU, relative to the largest value."""
    options = (f"model.refiner={refiner}", "model.any_batch=true", "model.head_channels=32", *options)
    experiment = Experiment.build("smoke", overrides=options)
    model = build_segmenter(experiment, backbone(experiment.model.backbone)).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.refiner.parameters():  # refiners start at or near no change
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(DEVICE))
    on_cpu, on_gpu = (answer(model, device) for device in (torch.device("cpu"), DEVICE))
    differences = {key: ((on_gpu[key] - x).abs().max() / x.abs().max()).item() for key, x in on_cpu.items()}
    return {"differences": differences, "note": ", ".join(f"{key} {x:.0e}" for key, x in differences.items())}


def answer(model: Segmenter, device: torch.device) -> dict[str, Tensor]:
    """Features, loss and gradients of a model for random images on a device, on the CPU.

    A mask head's loss draws its points on the device: the mean of its masks takes its place.
    """
    model.to(device).zero_grad()
    images, labels = (x.to(device) for x in random_batch(2, 64, 96))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        maps = model.backbone(images, model.refiner, model.feature_layers)
        output = model(images)
        loss = model.loss(output, labels) if torch.is_tensor(output) else output.masks[-1].sigmoid().mean()
        loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    found = {"features": torch.stack(list(maps.values())), "loss": loss, "gradients": gradients}
    return {key: value.detach().cpu() for key, value in found.items()}


# The rows


def measure() -> list[dict]:
    """Rows of bench, variant, size, seconds, peak_bytes, images_per_second, note and differences."""
    rows, end = [], time.monotonic() + LIMIT
    gc.freeze()  # the modules' own objects need not be looked through before every row
    for head, refiner in product(("per-pixel", "mask2former"), REFINERS):
        call = partial(compared, refiner, f"model.head={head}")
        rows.append(measured(refiner, f"GPU against CPU, {head}", end, call))
    experiment = Experiment.build(PROFILE)
    name, batch, data = backbone(experiment.model.backbone).name, experiment.train.batch_size, experiment.data
    for precision, refiner in product(PRECISIONS, REFINERS):
        size = f"{PROFILE} step, {name}, B={batch}, {data.height} x {data.width}, {precision}"
        prepare = partial(profile_step, refiner, f"train.precision={precision}")
        rows.append(measured(refiner, size, end, partial(timed, prepare, batch)))
    for crop, precision, kind in product(CROPS, PRECISIONS, KINDS):
        rows += paper_rows(kind, crop, precision, end)
    gc.unfreeze()
    return rows


def paper_rows(kind: str, crop: int, precision: str, end: float) -> list[dict]:
    """Rows of every refiner with each of BATCHES; a step's say what the paper's training takes and what fits a card."""
    rows, most = [], BATCHES[0]
    for batch, refiner in product(BATCHES, REFINERS):
        size = f"{kind}, DINOv2-{BACKBONE}, B={batch}, {crop} x {crop}, {precision}"
        prepare = partial(paper_step, kind, BACKBONE, refiner, batch, crop, f"train.precision={precision}")
        rows.append(measured(refiner, size, end, partial(timed, prepare, batch)))
        if kind == "step" and not rows[-1]["note"]:
            hours = STEPS_IN_ALL * rows[-1]["seconds"] * most / batch / 3600
            rows[-1]["note"] = f"{STEPS_IN_ALL:,} steps of {most}: {hours:.1f} h"
    for many, one in zip(rows, rows[-len(REFINERS) :], strict=False):
        each = (many["peak_bytes"] - one["peak_bytes"]) / (most - 1)
        for card in CARDS if kind == "step" and each > 0 and one["peak_bytes"] else ():
            number = max(0, int((card * 1e9 - one["peak_bytes"]) // each) + 1)
            many["note"] += f"; {card} GB hold {number}"
    return rows


def measured(refiner: str, size: str, end: float, call: Callable[[], dict]) -> dict:
    """One row, made by `call` unless it is after `end`; what could not be measured has a note that says why."""
    row = {"bench": "gpu", "variant": refiner, "size": size, "seconds": 0.0, "peak_bytes": 0}
    row |= {"images_per_second": 0.0, "note": ""}
    if time.monotonic() > end:
        row["note"] = NOT_REACHED
    else:
        try:
            row |= call()
        except Exception as error:  # its traceback holds the memory of the case
            out = re.search("out of memory|ALLOC_FAILED", str(error))
            row["note"] = NO_FIT if out else f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    shown = row["note"] or "{images_per_second:.1f} images/s, {peak_bytes:.3g} bytes".format(**row)
    print(f"{size}, {refiner}: {shown}", file=sys.stderr, flush=True)
    return row
