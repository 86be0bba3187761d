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
from setlib.weights.presets import is_here

DINOV2 = {"tiny": (24, 6, 14), "S": (384, 12, 14), "L": (1024, 24, 14)}  # channels, layers, pixels of a patch
REFINERS = ("none", "rein", "set", "set-released")
PROFILE = "quick"  # of the step on the offline backbone
BACKBONE, CROPS, BATCHES = "L", (512, 1024), (4, 2, 1)  # of the paper's model; pixels; images, the first that fit
PRECISIONS, KINDS = ("bfloat16", "float32"), ("step", "prediction")  # kinds: of `paper_step`
WARM_UP, STEPS, SECONDS = 2, 3, 1.0  # steps before those that are measured, of which at least so many for so long
LIMIT = 265.0  # seconds; what was not reached by then is left out
NO_END = "train.steps=1000000"  # the learning rate stays where it starts
STEPS_IN_ALL, CARDS = 40_000, (24, 80)  # of the paper's training; GB of cards that people have
NO_FIT, NOT_REACHED = "does not fit", "not reached"


# Steps


@functools.cache
def random_backbone(shape: tuple[int, int, int], patch_size: int = 0) -> FrozenBackbone:
    """A DINOv2 of random weights, one for all that ask. shape: as in DINOV2; patches are resized to patch_size."""
    channels, layers, patch = shape
    sizes = {"hidden_size": channels, "num_hidden_layers": layers, "num_attention_heads": max(channels // 64, 2)}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Dinov2Model(Dinov2Config(**sizes, image_size=37 * patch, patch_size=patch))
        if patch_size:
            resize_patches(model, patch_size)
    return FrozenBackbone(model, f"random DINOv2 of {channels} channels").to(DEVICE)


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


def paper_model(size: str, refiner: str, *options: str) -> Segmenter:
    """The paper profile's model on a DINOv2 of random weights."""
    read = ",".join(str(DINOV2[size][1] * k // 6) for k in (2, 3, 4, 6))
    options = (f"model.refiner={refiner}", f"model.feature_layers={read}", "model.any_batch=true", *options)
    experiment = Experiment.build("paper", "scenes:game", ["scenes:fog"], overrides=options)
    return build_segmenter(experiment, random_backbone(DINOV2[size], experiment.model.patch_size))


def paper_step(kind: str, size: str, refiner: str, batch: int, crop: int, *options: str) -> Step:
    """One step of the paper's training, or one prediction, on random images.

    kind: "step": forward, loss, backward, optimiser; "prediction": class probabilities (B, 19, h, w) of windows, before
    these are blended on the CPU.
    """
    model = paper_model(size, refiner, f"train.batch_size={batch}", NO_END, *options).train(kind == "step")
    images, labels = random_batch(batch, crop, crop)
    if kind == "step":
        return training_step(model, images, labels)
    return torch.no_grad()(lambda: model.pixel_probabilities(model(images), (crop, crop)))


def profile_step(refiner: str, *options: str, kept: bool = True) -> Step:
    """One training step of the profile on random images; a backbone that is not here has DINOv2-S's shape.

    kept: whether the features of the frozen first layers are at hand.
    """
    experiment = Experiment.build(PROFILE, overrides=[f"model.refiner={refiner}", NO_END, *options])
    backbone = None if is_here(experiment.model.backbone) else random_backbone(DINOV2["S"])
    model = build_segmenter(experiment, backbone).train()
    images, labels = random_batch(experiment.train.batch_size, experiment.data.height, experiment.data.width)
    return training_step(model, images, labels, SharedFeatures([model])(images) if kept else None)


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
    model = paper_model("tiny", refiner, *options).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.refiner.parameters():  # refiners start at or near no change
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(DEVICE))
    on_cpu, on_gpu = (answer(model, device) for device in (torch.device("cpu"), DEVICE))
    differences = {key: ((on_gpu[key] - x).abs().max() / x.abs().max()).item() for key, x in on_cpu.items()}
    return {"differences": differences, "note": ", ".join(f"{key} {x:.0e}" for key, x in differences.items())}


def answer(model: Segmenter, device: torch.device) -> dict[str, Tensor]:
    """Features, loss and gradients of a model for random images on a device, on the CPU.

    The loss is the per-pixel head's; a mask head's draws its points on the device, the mean of its masks takes its
    place.
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
    name, batch, data = experiment.model.backbone, experiment.train.batch_size, experiment.data
    name += "" if is_here(name) else " (random weights)"
    for precision, refiner in product(PRECISIONS, REFINERS):
        size = f"{PROFILE} step, {name}, B={batch}, {data.height} x {data.width}, {precision}"
        prepare = partial(profile_step, refiner, f"train.precision={precision}")
        rows.append(measured(refiner, size, end, partial(timed, prepare, batch)))
    for crop, precision, kind in product(CROPS, PRECISIONS, KINDS):
        rows += paper_rows(kind, crop, precision, end)
    gc.unfreeze()
    return rows


def paper_rows(kind: str, crop: int, precision: str, end: float) -> list[dict]:
    """Rows of every refiner with the largest batch that fits it, and of the head alone with each of these batches.

    A step's row says how long the paper's training would take, and, from its memory and that of one image, how many
    images would fill a card.
    """

    def row(refiner: str, batch: int) -> dict:
        size = f"{kind}, DINOv2-{BACKBONE}, B={batch}, {crop} x {crop}, {precision}"
        prepare = partial(paper_step, kind, BACKBONE, refiner, batch, crop, f"train.precision={precision}")
        return measured(refiner, size, end, partial(timed, prepare, batch)) | {"images": batch}

    rows, largest = [], {}
    for refiner in REFINERS:
        for batch in BATCHES:
            rows.append(row(refiner, batch))
            if rows[-1]["note"] != NO_FIT:
                largest[refiner] = batch
                break
    others = set(largest.values()) - {largest.get("none")}
    rows += [row("none", batch) for batch in sorted(others, reverse=True)]
    for large in [one for one in rows if kind == "step" and not one["note"]]:
        batch = large["images"]
        large["note"] = f"{STEPS_IN_ALL:,} steps: {STEPS_IN_ALL * large['seconds'] / 3600:.1f} h"
        one = row(large["variant"], 1) if batch > 1 else large
        each = (large["peak_bytes"] - one["peak_bytes"]) / max(batch - 1, 1)
        if each > 0 and one["peak_bytes"]:
            fits = {size: int((size * 1e9 - one["peak_bytes"]) / each) + 1 for size in CARDS}
            large["note"] += "".join(f"; {number} images would fill {size} GB" for size, number in fits.items())
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
