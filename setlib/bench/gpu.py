"""The paper's training step and prediction, and what `python -m setlib bench --only gpu` measures of them.

One case follows the other in this process, which makes the paper's backbone once. A batch that does not fit, an error,
and a case that was not reached in time are rows that say so. Nothing is fetched: weights that are not on this machine
are random.
"""

from __future__ import annotations

import functools
import gc
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from setlib._memory import keep_freed_memory
from setlib.backbone import FrozenBackbone
from setlib.checkpoint import build_segmenter
from setlib.data.labels import CITYSCAPES
from setlib.distributed import default_device
from setlib.experiment import Experiment
from setlib.features import FrozenFeatures, SharedFeatures
from setlib.segmenter import Segmenter
from setlib.training import make_optimiser
from setlib.weights.convert import resize_patches
from setlib.weights.presets import is_here

Step = Callable[[], object]
DEVICE = default_device()
DINOV2 = {"tiny": (24, 6, 2), "S": (384, 12, 6), "L": (1024, 24, 16)}  # channels, layers, attention heads
REFINERS = ("none", "rein", "set", "set-released")
NO_END = "train.steps=1000000"  # the learning rate stays where it starts
NO_FIT, NOT_REACHED = "does not fit", "not reached"
WARM_UP = 2  # steps before those that are measured


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long it may take."""

    backbone: str = "L"
    crops: tuple[int, ...] = (512, 1024)  # pixels
    batches: tuple[int, ...] = (4, 2, 1)  # images; the first that fits
    precisions: tuple[str, ...] = ("bfloat16", "float32")
    options: tuple[str, ...] = ()  # of the paper's model
    profile: str = "quick"  # of the step on the offline backbone
    seconds: float = 1.0  # for which a case is measured at least
    steps: int = 3  # in that time, at least
    limit: float = 265.0  # seconds; what was not reached by then is left out


PLAN = Plan()


# Steps


@functools.cache
def random_backbone(size: str, patch_size: int = 0) -> FrozenBackbone:
    """A DINOv2 of random weights, one for all that ask; patches of 14 pixels unless they are resized."""
    channels, layers, heads = DINOV2[size]
    torch.manual_seed(0)
    sizes = {"hidden_size": channels, "num_hidden_layers": layers, "num_attention_heads": heads}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14))
    if patch_size:
        resize_patches(model, patch_size)
    return FrozenBackbone(model, f"random DINOv2-{size}").to(DEVICE)


def random_batch(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, h, w) in [0, 1] and labels (B, h, w) in squares of 32 pixels, of all classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=generator)
    labels = torch.randint(len(CITYSCAPES), (batch, -(-height // 32), -(-width // 32)), generator=generator)
    labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :height, :width]
    return images.to(DEVICE), labels.to(DEVICE)


def training_step(model: Segmenter, images: Tensor, labels: Tensor, frozen: FrozenFeatures | None = None) -> Step:
    """Forward, loss, backward, optimiser."""
    keep_freed_memory()
    settings, optimiser = model.experiment.train, make_optimiser(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        optimiser.zero_grad()
        model.loss(model(images, frozen), labels).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm or math.inf)
        optimiser.step()

    return step


def paper_model(size: str, refiner: str, *options: str) -> Segmenter:
    """The paper profile's model on a DINOv2 of random weights."""
    read = ",".join(str(DINOV2[size][1] * k // 6) for k in (2, 3, 4, 6))
    options = (f"model.refiner={refiner}", f"model.feature_layers={read}", "model.any_batch=true", *options)
    experiment = Experiment.build("paper", "scenes:game", ["scenes:fog"], overrides=options)
    return build_segmenter(experiment, random_backbone(size, experiment.model.patch_size))


def paper_step(size: str, refiner: str, batch: int, crop: int, *options: str) -> Step:
    """One step of the paper's training on random images: forward, loss, backward, optimiser."""
    model = paper_model(size, refiner, f"train.batch_size={batch}", NO_END, *options)
    model.train()
    images, labels = random_batch(batch, crop, crop)
    return training_step(model, images, labels)


def paper_prediction(size: str, refiner: str, batch: int, crop: int, *options: str) -> Step:
    """Class probabilities (B, 19, h, w) of windows, before these are blended on the CPU."""
    model = paper_model(size, refiner, *options).eval()
    images = random_batch(batch, crop, crop)[0]
    return torch.no_grad()(lambda: model.pixel_probabilities(model(images), (crop, crop)))


PAPER = {"step": paper_step, "prediction": paper_prediction}


def profile_step(profile: str, refiner: str, *options: str, kept: bool = True) -> Step:
    """One training step of a profile that has domains of its own, on random images.

    kept: whether the features of the frozen first layers are at hand. A backbone that is not here has DINOv2-S's shape.
    """
    experiment = Experiment.build(profile, overrides=[f"model.refiner={refiner}", NO_END, *options])
    backbone = None if is_here(experiment.model.backbone) else random_backbone("S")
    model = build_segmenter(experiment, backbone).train()
    images, labels = random_batch(experiment.train.batch_size, experiment.data.height, experiment.data.width)
    return training_step(model, images, labels, SharedFeatures([model])(images) if kept else None)


# What is measured


def has_gpu() -> bool:
    """Whether models run on a GPU here."""
    return DEVICE.type == "cuda"


def wait() -> None:
    """Until the GPU has done what it was told; fails where it has."""
    if has_gpu():
        torch.cuda.synchronize(DEVICE)


def free() -> None:
    """Gives back the memory of what is no longer used, and counts its peak anew."""
    gc.collect()
    wait()
    if has_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)


def timed(prepare: Callable[[], Step], images: int, plan: Plan) -> dict:
    """Median seconds of a step, images per second, and the GPU's memory at its highest, weights included, in bytes."""
    free()
    step = prepare()
    for _ in range(WARM_UP):
        step()
    wait()
    taken: list[float] = []
    while len(taken) < plan.steps or sum(taken) < plan.seconds:
        start = time.perf_counter()
        step()
        wait()
        taken.append(time.perf_counter() - start)
    median, peak = statistics.median(taken), torch.cuda.max_memory_allocated()  # 0 without a GPU
    return {"seconds": median, "images_per_second": images / median, "peak_bytes": peak}


def compared(refiner: str, *options: str) -> dict:
    """Largest differences of a small model in float32 on the GPU and on the CPU, relative to the largest value.

    The loss is the per-pixel head's; a mask head's draws its points on the device, the mean of its masks takes its
    place.
    """
    model = paper_model("tiny", refiner, *options).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.refiner.parameters():  # refiners start at or near no change
            p.add_(0.02 * torch.randn(p.shape).to(DEVICE))
    images, labels = random_batch(2, 64, 96)
    found: list[dict[str, Tensor]] = []
    for device in (torch.device("cpu"), DEVICE):
        model.to(device).zero_grad()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            maps = model.backbone(images.to(device), model.refiner, model.feature_layers)
            output = model(images.to(device))
            with_labels = torch.is_tensor(output)  # of the per-pixel head
            loss = model.loss(output, labels.to(device)) if with_labels else output.masks[-1].sigmoid().mean()
            loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append({"features": torch.stack(list(maps.values())), "loss": loss, "gradients": gradients})
    on_cpu, on_gpu = ({key: value.detach().cpu() for key, value in values.items()} for values in found)
    differences = {key: ((on_gpu[key] - x).abs().max() / x.abs().max()).item() for key, x in on_cpu.items()}
    return {"differences": differences, "note": ", ".join(f"{key} {x:.0e}" for key, x in differences.items())}


def machine() -> dict:
    """Card, and the versions of torch and CUDA; empty where there is none."""
    card = torch.cuda.get_device_name(DEVICE) if has_gpu() else ""
    return {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda or ""}


# The rows


class Rows:
    """Rows of bench, variant, size, seconds, peak_bytes, images_per_second, note and differences, as they are made."""

    def __init__(self, limit: float) -> None:
        self.end, self.rows = time.monotonic() + limit, []

    def add(self, refiner: str, size: str, call: Callable[[], dict]) -> bool:
        """Measures a row; whether its batch fits. What could not be measured has a note that says why."""
        row = {"bench": "gpu", "variant": refiner, "size": size, "seconds": 0.0, "peak_bytes": 0}
        row |= {"images_per_second": 0.0, "note": NOT_REACHED if time.monotonic() > self.end else ""}
        try:
            row |= {} if row["note"] else call()
        except Exception as error:  # its traceback holds the memory of the case
            out = re.search("out of memory|ALLOC_FAILED", str(error))
            row["note"] = NO_FIT if out else f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        self.rows.append(row)
        shown = row["note"] or "{images_per_second:.1f} images/s, {peak_bytes:.3g} bytes".format(**row)
        print(f"{size}, {refiner}: {shown}", file=sys.stderr, flush=True)
        return row["note"] != NO_FIT


def measure(plan: Plan) -> list[dict]:
    """Every row of the plan."""
    rows = Rows(plan.limit)
    gc.freeze()  # the modules' own objects need not be looked through before every row
    for head, refiner in product(("per-pixel", "mask2former"), REFINERS):
        rows.add(refiner, f"GPU against CPU, {head}", partial(compared, refiner, *plan.options, f"model.head={head}"))
    experiment = Experiment.build(plan.profile)
    name, batch, data = experiment.model.backbone, experiment.train.batch_size, experiment.data
    name += "" if is_here(name) else " (random weights)"
    for precision, refiner in product(plan.precisions, REFINERS):
        size = f"{plan.profile} step, {name}, B={batch}, {data.height} x {data.width}, {precision}"
        prepare = partial(profile_step, plan.profile, refiner, f"train.precision={precision}")
        rows.add(refiner, size, partial(timed, prepare, batch, plan))
    for crop, precision, kind in product(plan.crops, plan.precisions, PAPER):
        add_paper(rows, plan, kind, crop, precision)
    gc.unfreeze()
    return rows.rows


def add_paper(rows: Rows, plan: Plan, kind: str, crop: int, precision: str) -> None:
    """Rows of every refiner with the largest batch that fits it, and of the head alone with each of these batches."""

    def fits(refiner: str, batch: int) -> bool:
        size = f"{kind}, DINOv2-{plan.backbone}, B={batch}, {crop} x {crop}, {precision}"
        options = (f"train.precision={precision}", *plan.options)
        prepare = partial(PAPER[kind], plan.backbone, refiner, batch, crop, *options)
        return rows.add(refiner, size, partial(timed, prepare, batch, plan))

    largest = {refiner: next((b for b in plan.batches if fits(refiner, b)), None) for refiner in REFINERS}
    for batch in sorted({b for b in largest.values() if b} - {largest["none"]}, reverse=True):
        fits("none", batch)
