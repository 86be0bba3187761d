"""The training loop: crops of the source, optimiser, schedule, checkpoint, resume, history.

Only the source domain is touched here. Same seed and machine give the same numbers, also after a kill and a resume.
Several processes, or several parts of a step one after the other, take the steps that one process would.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as save_bytes
from torch import nn
from tqdm import tqdm

from setlib._memory import keep_freed_memory
from setlib.backbone import FrozenBackbone
from setlib.checkpoint import FILES, build_segmenter, load_segmenter, save_segmenter
from setlib.data import domains
from setlib.data.crops import RandomCrops, held_out
from setlib.data.domains import Domain
from setlib.distributed import accelerator, all_reduce, state
from setlib.evaluation import evaluate
from setlib.experiment import Experiment, Train
from setlib.features import Batch, KeptCrops
from setlib.files import write_atomic
from setlib.run import Run
from setlib.segmenter import Segmenter
from setlib.weights.load import load_backbone


def train(
    run: Run,
    *,
    source: Domain | None = None,
    backbone: FrozenBackbone | None = None,
    crops: KeptCrops | None = None,
    progress: bool = True,
) -> tuple[Segmenter, list[dict]]:
    """Trains the run's segmenter on its source.

    A finished run is loaded as it is, an interrupted one goes on from its checkpoint; the model ends in RUN/model.

    Parameters
    ----------
    source, backbone : loaded already, where several runs share them.
    crops : of runs that differ only in refiner and seed, to share them.

    Returns
    -------
    The segmenter, in evaluation mode, and its history: a dict of step, loss, lr, grad_norm and seconds for each step.

    Raises
    ------
    ValueError : the loss is not finite, or the source cannot be used.
    """
    experiment, settings = run.experiment, run.experiment.train
    if is_finished(run):
        return load_segmenter(run.path, backbone), read_history(run)
    with state().main_process_first():  # what is fetched, converted or rendered once is then there for all
        model = build_segmenter(experiment, backbone)
        source = source or domains.load(experiment.data.source, experiment.data, role="source")
        validation = held_out(experiment, source) if settings.validate_every else None
    keep_freed_memory()
    unread = max(model.refiner.layers, default=0) > max(model.feature_layers)
    engine = accelerator(settings, some_unused=unread or model.refiner.adapt is not None)
    progress = progress and state().is_main_process
    network = engine.prepare_model(model, device_placement=False)
    optimiser = make_optimiser(model)
    training = Training(run, model, optimiser)
    training.resume()
    if settings.views and crops is None:
        crops = KeptCrops([model], RandomCrops(source, experiment), progress)
    model.train()

    label, done = f"train {experiment.model.refiner}, seed {experiment.seed}", training.step
    chosen = [own_part(batch_indices(experiment, step)) for step in range(done, settings.steps)]
    fresh = (Batch(*batch) for batch in RandomCrops(source, experiment).batches(chosen))
    with tqdm(total=settings.steps, initial=done, desc=label, unit="step", smoothing=0, disable=not progress) as bar:
        for step, batch in enumerate(map(crops.batch, chosen) if crops else fresh, start=done):
            began = time.perf_counter()
            images, labels, frozen = batch.to(model.device)
            rate = set_learning_rate(optimiser, settings, step)
            optimiser.zero_grad()
            total = torch.zeros((), device=model.device)
            counts, seeds = all_reduce(model.head.counts(labels)), own_part(point_seeds(experiment, step))
            for part in np.array_split(np.arange(len(images)), settings.accumulate):
                is_last = part[-1] == len(images) - 1
                with contextlib.nullcontext() if is_last else engine.no_sync(network):
                    output = network(images[part], frozen and frozen[part])
                    share = model.loss(output, labels[part], counts, [seeds[i] for i in part])
                    (share * engine.num_processes).backward()  # the engine takes the processes' mean
                total += share.detach()
            loss = all_reduce(total).item()
            norm = nn.utils.clip_grad_norm_(training.parameters.values(), settings.clip_norm or math.inf).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise ValueError(
                    f"Training stopped at step {step + 1}: the loss is {loss}, its gradient norm {norm}; "
                    f"lower train.learning_rate ({settings.learning_rate})."
                )
            optimiser.step()
            training.update_average()

            is_last = step + 1 == settings.steps
            seconds = round(time.perf_counter() - began, 4)
            entry = {"step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm, "seconds": seconds}
            if validation and ((step + 1) % settings.validate_every == 0 or is_last):
                entry["source_miou"] = evaluate({"": model.eval()}, validation, progress=False)[""].miou
                model.train()
            training.history.append(entry)
            training.step = step + 1
            bar.set_postfix(training.latest(), refresh=False)
            bar.update()
            if ((step + 1) % settings.checkpoint_every == 0 or is_last) and engine.is_main_process:
                training.save()
    training.use_average()
    if state().is_main_process:
        save_segmenter(model, run.path / "model")
        (run.path / "checkpoint.safetensors").unlink(missing_ok=True)
    state().wait_for_everyone()
    return model.eval(), training.history


def batch_indices(experiment: Experiment, step: int) -> list[int]:
    """Crops of one step: always new ones, or all kept ones in a new order each epoch."""
    size, views = experiment.train.batch_size, experiment.train.views
    positions = range(step * size, (step + 1) * size)
    if not views:
        return list(positions)
    orders = {
        e: np.random.default_rng([experiment.seed, 2, e]).permutation(views) for e in {p // views for p in positions}
    }
    return [int(orders[p // views][p % views]) for p in positions]


def point_seeds(experiment: Experiment, step: int) -> list[int]:
    """Of what a mask head draws in a step, one for each crop, whatever process it is on."""
    size = experiment.train.batch_size
    numbers = range(step * size, (step + 1) * size)
    return [int(np.random.SeedSequence([experiment.seed, 3, i]).generate_state(1)[0]) for i in numbers]


def own_part(indices: list[int]) -> list[int]:
    """This process's crops of a step."""
    length = len(indices) // state().num_processes
    return indices[state().process_index * length :][:length]


def make_optimiser(model: Segmenter) -> torch.optim.AdamW:
    """AdamW over all that learns, no decay on tokens, norms, biases and scales; `share`: of the step's learning rate.

    Source: Rein's released settings. Departure: there biases outside of norms decay too.
    """
    kinds = (nn.Linear, nn.Conv2d)
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    matrices |= {id(module.in_proj_weight) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    train, groups = model.experiment.train, defaultdict(list)
    rate = train.refiner_rate(model.experiment.model.refiner, model.refiner.rate)
    for name, p in model.named_parameters():
        if p.requires_grad:
            share = 1.0 if name.startswith("head.") else rate
            groups[id(p) in matrices, share].append(p)
    decays = {True: train.weight_decay, False: 0.0}
    settings = [{"params": ps, "weight_decay": decays[m], "share": share} for (m, share), ps in groups.items()]
    return torch.optim.AdamW(settings, lr=train.learning_rate)


def learning_rate(settings: Train, step: int) -> float:
    """Of a step, from 0: even rise over settings.warmup steps, then polynomial decay to 0 at the last."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    left = 1 - (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.learning_rate * left**settings.power


def set_learning_rate(optimiser: torch.optim.Optimizer, settings: Train, step: int) -> float:
    """Gives each group of an optimiser its share of a step's learning rate, which is returned."""
    rate = learning_rate(settings, step)
    for group in optimiser.param_groups:
        group["lr"] = rate * group["share"]
    return rate


class Training:
    """What changes from step to step, and its checkpoint: weights, optimiser, moving average, history."""

    def __init__(self, run: Run, model: Segmenter, optimiser: torch.optim.Optimizer) -> None:
        self.run, self.model, self.optimiser, self.decay = run, model, optimiser, model.experiment.train.ema
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if self.decay else {}
        self.history: list[dict] = []
        self.step = 0  # steps that are done

    def update_average(self) -> None:
        """Moves the average, if one is kept, towards the weights."""
        for name, value in self.average.items():
            value.lerp_(self.parameters[name].detach(), 1 - self.decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Puts the average, if one is kept, in place of the weights."""
        for name, value in self.average.items():
            self.parameters[name].copy_(value)

    def latest(self) -> dict[str, str]:
        """For a progress bar."""
        scores = [entry["source_miou"] for entry in self.history if "source_miou" in entry]
        return {"loss": f"{self.history[-1]['loss']:.3f}"} | ({"source mIoU": f"{scores[-1]:.1f}"} if scores else {})

    def save(self) -> None:
        """Writes history.jsonl and checkpoint.safetensors (weights, optimiser, average, step), whole or not at all."""
        tensors = {f"model.{name}": value.detach() for name, value in self.model.trainable_state().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimiser.{name}.{key}": value for key, value in self.optimiser.state.get(p, {}).items()}
        notes = {"step": str(self.step)}
        content = save_bytes({k: v.cpu().contiguous() for k, v in tensors.items()}, metadata=notes)
        write_atomic(self.run.path / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.history))
        write_atomic(self.run.path / "checkpoint.safetensors", content)

    def resume(self) -> None:
        """Goes on from the run's checkpoint, if there is one. Raises ValueError if it cannot be read."""
        path = self.run.path / "checkpoint.safetensors"
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as saved:
                self.step = int(saved.metadata()["step"])
                tensors = {name: saved.get_tensor(name) for name in saved.keys()}
            with torch.no_grad():
                for name, value in self.model.trainable_state().items():  # buffers too
                    value.copy_(tensors[f"model.{name}"])
                for name, p in self.parameters.items():
                    keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimiser.{name}.{key}" in tensors]
                    kept = {key: tensors[f"optimiser.{name}.{key}"] for key in keys}
                    if kept:  # else it had no gradient yet
                        self.optimiser.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in kept.items()}
                for name, value in self.average.items():
                    value.copy_(tensors[f"average.{name}"])
            self.history = [entry for entry in read_history(self.run) if entry["step"] <= self.step]
        except Exception as error:
            raise ValueError(f"{path} cannot be resumed ({error}): delete it to train from the start.") from None


def train_together(runs: dict[str, Run], progress: bool = True) -> dict[str, tuple[Segmenter, list[dict]]]:
    """Trains runs that share source, crops and backbone one after the other: the frozen layers are computed once."""
    first = next(iter(runs.values())).experiment
    backbone = load_backbone(first.model.backbone, patch_size=first.model.patch_size)
    source = domains.load(first.data.source, first.data, role="source")
    crops = None
    if first.train.views and not all(is_finished(run) for run in runs.values()):
        models = [build_segmenter(run.experiment, backbone) for run in runs.values()]
        crops = KeptCrops(models, RandomCrops(source, first), progress)
    return {
        name: train(run, source=source, backbone=backbone, crops=crops, progress=progress) for name, run in runs.items()
    }


def is_finished(run: Run) -> bool:
    """Whether the run holds a trained model."""
    return all((run.path / "model" / name).is_file() for name in FILES)


def read_history(run: Run) -> list[dict]:
    """Entries of the run's history.jsonl: step, loss, lr, grad_norm, seconds; none if it is missing or damaged."""
    path = run.path / "history.jsonl"
    try:
        entries = [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []
        return [entry for entry in entries if {"step", "loss", "seconds"} <= entry.keys()]
    except (ValueError, AttributeError):
        tqdm.write(f"{path} is damaged: its curve is left out; the model does not need it")
        return []
