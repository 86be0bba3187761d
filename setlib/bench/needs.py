"""What a training needs, told before it starts: weights, pictures, disk, memory, time. Nothing is trained or fetched.

Memory and time are those of a step on random pictures, taken in a process of its own. Weights that are not on this
machine are random there.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants
from tqdm import tqdm

from setlib.analysis import ablation
from setlib.bench.gpu import random_backbone, random_batch, training_step
from setlib.bench.measure import FRESH, HAS_GPU, timings
from setlib.checkpoint import build_segmenter
from setlib.data import domains
from setlib.experiment import Data, Experiment, Model
from setlib.features import SharedFeatures
from setlib.files import hub_answers, peak_bytes
from setlib.run import Run
from setlib.weights.load import load_backbone
from setlib.weights.presets import PRESETS, Preset, hub_id, is_here

Rows = list[list[str]]


def needs(experiment: Experiment, folder: Path, ablates: bool = False) -> tuple[Rows, list[str]]:
    """Rows of what, what is here and what is needed, with a header; and what stands in the way.

    folder: of the run, which need not be there. ablates: all trainings of `experiment.ablation`, not the one.
    """
    with tempfile.TemporaryDirectory() as place:
        trials = ablation.plan(Run.open(place, experiment)) if ablates else []
    own = experiment.model.refiner, experiment
    asked = [(trial.variant, trial.run.experiment) for trial in trials] or [own]
    number, first = Counter(name for name, _ in asked), dict(reversed(asked))
    rows, problems = [["", "here", "needed"]], []
    fetched = _weights(experiment.model, rows, problems)
    for source, targets in experiment.transfers if ablates else [(experiment.data.source, experiment.data.targets)]:
        for text, role in ((source, "source"), *((target, "target") for target in targets)):
            row = [text, _pictures(text, role, experiment.data, problems), ""]
            rows += [row] if row not in rows else []
    memory, learned, seconds = 0.0, 0.0, 0.0
    for name in tqdm(number, desc="steps", leave=False):
        one, settings = first[name], first[name].train
        with FRESH() as process:
            step = process.submit(one_step, one).result()
        took = number[name] * settings.steps * step["seconds"] + settings.views * step["keeping"]
        trainings = f"{settings.steps:,} steps" + f" x {number[name]}" * (number[name] > 1)
        peak = step["memory"] + settings.views * step["kept"]
        here = f"{step['seconds']:.2f} s a step, {peak / 1e9:.2f} GB"
        rows.append([name, here, f"{trainings}: {tqdm.format_interval(took)}"])
        seconds, memory = seconds + took, max(memory, peak)
        learned += step["learns"] * (number[name] + 4)  # models; the checkpoint that is written beside the last one
    there = torch.cuda.mem_get_info()[0] if HAS_GPU else psutil.virtual_memory().available
    disk = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
    for what, here, needed in (("memory", there, memory), ("disk", disk, fetched + learned)):
        rows.append([what, f"{here / 1e9:.1f} GB", f"{needed / 1e9:.2f} GB"])
        problems += [f"{what}: {needed / 1e9:.1f} GB are needed, {here / 1e9:.1f} GB are free"] * (needed > here)
    return [*rows, ["training in all", "", tqdm.format_interval(seconds)]], problems


def _preset(name: str) -> Preset | None:
    """What is known of a preset, by its name or by its id on the hub."""
    return PRESETS.get(name) or next((one for one in PRESETS.values() if one.source == name), None)


def _weights(model: Model, rows: Rows, problems: list[str]) -> float:
    """Adds a row of the backbone; returns the bytes that are fetched."""
    name, known = model.backbone, _preset(model.backbone)
    if is_here(name) or os.path.exists(os.path.expanduser(name)):
        rows.append([name, "on this machine", ""])
        return 0.0
    size, licence = (4e6 * known.millions, known.licence) if known else (0.0, "see its page")
    rows.append([name, "not here", f"{size / 1e9:.2f} GB are fetched; licence: {licence}"])
    hub = f"{constants.ENDPOINT}/{hub_id(name)}/resolve/main/config.json"
    if "/" in hub_id(name) and (constants.HF_HUB_OFFLINE or not hub_answers(hub)):
        problems.append(f"{name} is not on this machine, and {constants.ENDPOINT} does not answer")
    return size


def _pictures(text: str, role: str, data: Data, problems: list[str]) -> str:
    """How many pictures a domain has, or why it cannot be used."""
    try:
        if domains.parse(text).name in ("scenes", "hub"):
            return "made or fetched when it is used"
        domain = domains.load(text, data, role=role)
    except (ValueError, OSError) as error:
        problems.append(str(error).rstrip("."))
        return "cannot be used"
    return f"{len(domain):,} pictures" + ", no labels" * (not domain.has_labels)


def one_step(experiment: Experiment) -> dict[str, float]:
    """Of a training: seconds of a step and of keeping a crop; bytes at the highest, of what learns, of a kept crop."""
    settings, data, name = experiment.train, experiment.data, experiment.model.backbone
    if is_here(name) or not (known := _preset(name)):
        backbone = load_backbone(name, patch_size=experiment.model.patch_size)
    else:
        backbone = random_backbone((known.channels, known.layers, known.patch), experiment.model.patch_size)
    model = build_segmenter(experiment, backbone).train()
    images, labels = random_batch(settings.batch_size // settings.accumulate, data.height, data.width)
    began, frozen = time.perf_counter(), SharedFeatures([model])(images) if settings.views else None
    keeping = (time.perf_counter() - began) / len(images)
    step = training_step(model, images, labels, frozen)
    step()
    seconds = statistics.median(timings(step, 2, 1.0)) * settings.accumulate
    kept = sum(x.nbytes for x in (images, *((frozen.hidden, *frozen.maps.values()) if frozen else ()))) / len(images)
    learns = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    memory = torch.cuda.max_memory_allocated() if HAS_GPU else peak_bytes()
    return {"seconds": seconds, "keeping": keeping, "memory": memory, "kept": kept, "learns": learns}
