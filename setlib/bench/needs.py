"""What a training needs, told before it starts: weights, pictures, disk, memory, time. Nothing is trained or fetched.

Memory and time are a step's, on random pictures in a process of its own; weights that are not here are random there.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants
from tqdm import tqdm

from setlib.analysis import ablation
from setlib.bench.gpu import own_step
from setlib.bench.measure import FRESH, HAS_GPU, timings
from setlib.data import domains
from setlib.data.crops import held_out
from setlib.distributed import accelerator
from setlib.experiment import Data, Experiment
from setlib.files import cure, hub_answers, peak_bytes
from setlib.run import Run
from setlib.weights.presets import check_name, find_preset, hub_id, is_here

Rows = list[list[str]]


def needs(run: Run, start: Callable[[Path], Run], ablates: bool) -> tuple[Rows, list[str]]:
    """Rows of what, what is here and what is needed, with a header; and what stands in the way.

    start: opens the run elsewhere, with all that is checked then. ablates: all trainings of its ablation, not the one.
    """
    experiment, problems = run.experiment, list[str]()
    weights, fetched = _weights(experiment.model.backbone, problems)
    pairs, times = [(experiment.data.source, experiment.data.targets)], 1
    variants = {experiment.model.refiner: experiment}
    if ablates:
        settings, pairs = experiment.ablation, experiment.transfers
        times, variants = len(settings.seeds) * len(pairs), {}
        for variant in settings.variants:
            refiner, *options = variant.split()
            variants[variant] = experiment.override(*settings.overrides, f"model.refiner={refiner}", *options)
    rows, data = [["", "here", "needed"], weights], next(iter(variants.values())).data
    for source, targets in pairs:
        for text, role in [(source, "source"), *((target, "target") for target in targets)]:
            row = [text, _pictures(text, role, data, problems), ""]
            rows += [row] if row not in rows else []
    if not problems and not any(name.startswith("hub:") for name, _, _ in rows):  # these would be fetched
        with tempfile.TemporaryDirectory() as place:
            try:
                run.check_same()
                started = start(Path(place))
                if ablates:
                    ablation.plan(started)
                elif experiment.train.validate_on:
                    held_out(experiment, domains.load(experiment.data.source, data, role="source"))
            except (ValueError, OSError) as error:
                problems.append(str(error).rstrip("."))
    if fetched is not None:
        rows += _steps(run.path, variants, times, fetched, problems)
    return rows, list(dict.fromkeys(problems))


def _steps(folder: Path, variants: dict[str, Experiment], times: int, fetched: float, problems: list[str]) -> Rows:
    """A row of a step of each variant, which is trained so many times, and rows of what all of them need."""
    rows, memory, disk, seconds = [], 0.0, fetched, 0.0
    for variant, experiment in tqdm(variants.items(), desc="a step of each", leave=False):
        try:
            with FRESH() as process:
                step = process.submit(one_step, experiment).result()
        except (RuntimeError, MemoryError, ValueError) as error:
            full = "MemoryError" if isinstance(error, BrokenProcessPool) else f"{type(error).__name__}: {error}"
            problems.append(f"{variant}: {cure(full, 'train') or error}".rstrip("."))
            return rows
        took = times * experiment.train.steps * step["seconds"]
        needed = f"{experiment.train.steps:,} steps x {times}: {tqdm.format_interval(took)}"
        rows.append([variant, f"{step['seconds']:.2f} s a step", needed])
        memory, seconds = max(memory, step["memory"]), seconds + took
        disk += (times + 6) * step["learns"]  # models; two checkpoints with AdamW's averages while one is written
    on_disk = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if folder.is_file() or not os.access(on_disk, os.W_OK):
        problems.append(f"{folder} cannot be made or written: choose another folder with --run")
    free = torch.cuda.mem_get_info()[0] if HAS_GPU else psutil.virtual_memory().available
    for kind, here, needed in (
        ("GPU memory" if HAS_GPU else "memory", free, memory),
        ("disk", shutil.disk_usage(on_disk).free, disk),
    ):
        rows.append([kind, f"{here / 1e9:.1f} GB", f"{needed / 1e9:.2f} GB"])
        if needed > here:
            problems.append(f"{kind}: {needed / 1e9:.2f} GB are needed, {here / 1e9:.2f} GB are free")
    return [*rows, ["steps in all", "", tqdm.format_interval(seconds)]]


def _weights(name: str, problems: list[str]) -> tuple[list[str], float | None]:
    """The row of a backbone, and the bytes that are fetched; None where nobody knows its shape."""
    if is_here(name) or os.path.exists(os.path.expanduser(name)):
        return [name, "on this machine", ""], 0.0
    check_name(name)
    if not (known := find_preset(name)):
        problems.append(f"{name} is not on this machine: fetch it first, then what it needs can be told")
        return [name, "not here", "size and licence: on its page"], None
    hub, size = f"{constants.ENDPOINT}/{hub_id(name)}/resolve/main/config.json", 4e6 * known.millions
    if "/" in hub_id(name) and (constants.HF_HUB_OFFLINE or not hub_answers(hub)):
        problems.append(f"{name} is not on this machine, and {constants.ENDPOINT} does not answer")
    return [name, "not here", f"{size / 1e9:.2f} GB are fetched; licence: {known.licence}"], size


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
    """Of a training: seconds of a step; bytes of memory, the GPU's or with all kept crops; bytes of what learns."""
    settings, constants.HF_HUB_OFFLINE = experiment.train, True  # nothing is fetched
    step, model, frozen = own_step(experiment, kept=bool(settings.views))
    accelerator(model)  # refuses a batch that it cannot part
    step()
    seconds = statistics.median(timings(step, 1, 1.0)) * settings.accumulate
    kept = sum(x.nbytes for x in (frozen.hidden, *frozen.maps.values())) / len(frozen.hidden) if frozen else 0
    kept += 4 * experiment.data.height * experiment.data.width  # the crop itself and its labels
    memory = torch.cuda.max_memory_allocated() if HAS_GPU else peak_bytes() + settings.views * kept
    learns = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {"seconds": seconds, "memory": memory, "learns": learns}
