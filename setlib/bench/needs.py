"""What a training needs, told before it starts: weights, pictures, disk, memory, time. Nothing is trained or fetched.

Memory and time are those of a step on random pictures, taken in a process of its own. Weights that are not on this
machine are random there.
"""

from __future__ import annotations

import os
import shutil
import statistics
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants
from tqdm import tqdm

from setlib.bench.gpu import own_step
from setlib.bench.measure import FRESH, HAS_GPU, timings
from setlib.data import domains
from setlib.experiment import Data, Experiment
from setlib.files import hub_answers, peak_bytes
from setlib.weights.presets import find_preset, hub_id, is_here


def needs(experiment: Experiment, folder: Path, ablates: bool = False) -> tuple[list[list[str]], list[str]]:
    """Rows of what, what is here and what is needed, with a header; and what stands in the way.

    folder: of the run, which need not be there. ablates: all trainings of `experiment.ablation`, not the one.
    """
    problems: list[str] = []
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
    memory, learned, seconds = {"memory": 0.0, "GPU memory": 0.0}, 0.0, 0.0
    for variant, one in tqdm(variants.items(), desc="a step of each", leave=False):
        try:
            with FRESH() as process:
                step = process.submit(one_step, one).result()
        except (RuntimeError, MemoryError, ValueError) as error:  # a process that was killed is a RuntimeError too
            problems.append(f"{variant}: no step can be taken here ({type(error).__name__}: {error})")
            continue
        took = times * one.train.steps * step["seconds"]
        steps = f"{one.train.steps:,} steps" + f" x {times}" * (times > 1)
        rows.append([variant, f"{step['seconds']:.2f} s a step", f"{steps}: {tqdm.format_interval(took)}"])
        memory = {kind: max(most, step[kind]) for kind, most in memory.items()}
        learned += (times + 6) * step["learns"]  # models; two checkpoints with AdamW's averages while one is written
        seconds += took
    on_disk = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = {"memory": psutil.virtual_memory().available, "disk": shutil.disk_usage(on_disk).free}
    free |= {"GPU memory": torch.cuda.mem_get_info()[0]} if HAS_GPU else {}
    for kind, here in free.items():
        needed = (memory | {"disk": fetched + learned})[kind]
        rows.append([kind, f"{here / 1e9:.1f} GB", f"{needed / 1e9:.2f} GB"])
        if needed > here:
            problems.append(f"{kind}: {needed / 1e9:.1f} GB are needed, {here / 1e9:.1f} GB are free")
    return [*rows, ["training in all", "", tqdm.format_interval(seconds)]], problems


def _weights(name: str, problems: list[str]) -> tuple[list[str], float]:
    """The row of a backbone, and the bytes that are fetched."""
    if is_here(name) or os.path.exists(os.path.expanduser(name)):
        return [name, "on this machine", ""], 0.0
    known, hub = find_preset(name), f"{constants.ENDPOINT}/{hub_id(name)}/resolve/main/config.json"
    if "/" in hub_id(name) and (constants.HF_HUB_OFFLINE or not hub_answers(hub)):
        problems.append(f"{name} is not on this machine, and {constants.ENDPOINT} does not answer")
    if known is None:
        return [name, "not here", "its size and licence are on its page"], 0.0
    size = 4e6 * known.millions
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
    """Of a training: seconds of a step; bytes of memory, on the GPU too, with kept crops; bytes of what learns."""
    settings, constants.HF_HUB_OFFLINE = experiment.train, True  # nothing is fetched
    step, model, frozen = own_step(experiment, kept=bool(settings.views))
    step()
    seconds = statistics.median(timings(step, 1, 1.0)) * settings.accumulate
    kept = sum(x.nbytes for x in (frozen.hidden, *frozen.maps.values())) / len(frozen.hidden) if frozen else 0
    learns = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    on_gpu = torch.cuda.max_memory_allocated() if HAS_GPU else 0
    return {"seconds": seconds, "memory": peak_bytes() + settings.views * kept, "GPU memory": on_gpu, "learns": learns}
