"""The training loop: crops of the source, optimiser, schedule, checkpoint, resume, history.

Only the source domain is touched here. Same seed and machine give the same numbers, also after a kill and a resume.
Several processes, or several parts of a step one after the other, take the steps that one process would.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from setlib.backbone import FrozenBackbone
from setlib.checkpoint import Training, build_segmenter, held, load_segmenter, read_history
from setlib.data import domains
from setlib.data.crops import RandomCrops, batch_indices, held_out
from setlib.data.domains import Domain
from setlib.distributed import accelerator, own_part, state
from setlib.evaluation import evaluate
from setlib.experiment import Experiment, Train
from setlib.features import KeptCrops, keep_crops
from setlib.files import on_stop
from setlib.mixing import disagreement, mix_weights, mixing
from setlib.run import Run
from setlib.segmenter import Segmenter
from setlib.style import fit_style


def train(
    run: Run,
    *,
    source: Domain | None = None,
    backbone: FrozenBackbone | None = None,
    crops: KeptCrops | RandomCrops | None = None,
    progress: bool = True,
) -> tuple[Segmenter, list[dict]]:
    """Trains the run's segmenter on its source; the model ends in RUN/model.

    A finished run is loaded as it is, an interrupted one goes on from its checkpoint. SIGINT and SIGTERM let a step
    end, save it, and raise KeyboardInterrupt.

    Parameters
    ----------
    source, backbone, crops : made already, where runs that differ only in refiner and seed share them.

    Returns
    -------
    The segmenter, in evaluation mode, and its history: a dict of step, loss, lr, grad_norm and seconds for each step.

    Raises
    ------
    ValueError : the loss is not finite, the source cannot be used, or another process trains in the folder.
    """
    with held(run) as finished:
        if finished:
            return load_segmenter(run.path, backbone), read_history(run)
        return _train(run, source, backbone, crops, quiet=not (progress and state().is_main_process))


def _train(
    run: Run, source: Domain | None, backbone: FrozenBackbone | None, crops: KeptCrops | RandomCrops | None, quiet: bool
) -> tuple[Segmenter, list[dict]]:
    experiment, settings = run.experiment, run.experiment.train
    with state().main_process_first():  # what is fetched, converted or rendered once is then there for all
        model = build_segmenter(experiment, backbone)
        source = source or domains.load(experiment.data.source, experiment.data, role="source")
        validation = held_out(experiment, source) if settings.validate_every else None
    engine = accelerator(model)
    network = engine.prepare_model(model, device_placement=False)
    optimiser = make_optimiser(model)
    training = Training(run, model, optimiser)
    training.resume()
    fit_style(model, RandomCrops(source, experiment), crops.style if isinstance(crops, KeptCrops) else None)
    crops = crops or keep_crops([model], RandomCrops(source, experiment), progress=not quiet)
    model.train()

    done, label = training.step, f"train {experiment.model.refiner}, seed {experiment.seed}"
    chosen = [own_part(batch_indices(experiment, step)) for step in range(done, settings.steps)]
    look = {"initial": done, "desc": label, "unit": "step", "smoothing": 0, "leave": None, "disable": quiet}
    stops: list[object] = []  # signals; of several processes, one that is asked to stop stops all
    with on_stop(lambda *signal: stops.append(signal)), tqdm(total=settings.steps, **look) as bar:
        for step, batch in enumerate(crops.batches(chosen), start=done):
            began = time.perf_counter()
            images, labels, frozen = batch.to(model.device)
            rate = set_learning_rate(optimiser, settings, step)
            optimiser.zero_grad()
            total = torch.zeros((), device=model.device)
            counts, seeds = engine.reduce(model.head.counts(labels), "sum"), own_part(point_seeds(experiment, step))
            weights = own_part(mix_weights(model, step))
            for part in np.array_split(np.arange(len(images)), settings.accumulate):
                last_part = part[-1] == len(images) - 1
                with contextlib.nullcontext() if last_part else engine.no_sync(network):
                    output = network(images[part], frozen and frozen[part], mixing(model, [weights[i] for i in part]))
                    part_loss = model.loss(output, labels[part], counts, [seeds[i] for i in part])
                    if settings.agree and any(weights[i] for i in part):
                        apart = disagreement(model, output, images[part], frozen and frozen[part])
                        part_loss = part_loss + settings.agree / settings.batch_size * apart
                    (part_loss * engine.num_processes).backward()  # the engine takes the processes' mean
                total += part_loss.detach()
            loss, stop = engine.reduce(torch.stack([total, total.new_tensor(len(stops))]), "sum").tolist()
            norm = nn.utils.clip_grad_norm_(training.parameters.values(), settings.clip_norm or math.inf).item()
            training.check(loss, norm)
            optimiser.step()
            training.update_average()

            last_step = step + 1 == settings.steps
            seconds = round(time.perf_counter() - began, 4)
            entry = {"step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm, "seconds": seconds}
            if validation and ((step + 1) % settings.validate_every == 0 or last_step):
                entry["source_miou"] = evaluate({"": model.eval()}, validation, progress=False)[""].miou
                model.train()
            training.history.append(entry)
            training.step = step + 1
            bar.set_postfix(training.latest(), refresh=False)
            bar.update()
            if (step + 1) % settings.checkpoint_every == 0 or last_step or stop:
                training.save()
            if stop:
                raise KeyboardInterrupt
        training.finish()
    state().wait_for_everyone()
    if stops:  # in the last step
        raise KeyboardInterrupt
    return model.eval(), training.history


def point_seeds(experiment: Experiment, step: int) -> list[int]:
    """Seeds of the points that a mask head draws in a step, one for each crop, whatever process it is on."""
    size = experiment.train.batch_size
    numbers = range(step * size, (step + 1) * size)
    return [int(np.random.SeedSequence([experiment.seed, 3, i]).generate_state(1)[0]) for i in numbers]


def make_optimiser(model: Segmenter) -> torch.optim.AdamW:
    """AdamW over all that learns; tokens, norms, biases and scales do not decay.

    Each group's `share` multiplies the learning rate: 1 for the head, the refiner's rate for all else.

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
    """Learning rate of a step, from 0: even rise over settings.warmup steps, then polynomial decay towards 0."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    left = 1 - (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.learning_rate * left**settings.power


def set_learning_rate(optimiser: torch.optim.Optimizer, settings: Train, step: int) -> float:
    """Sets the learning rate of a step, times `share` in each group, and returns it."""
    rate = learning_rate(settings, step)
    for group in optimiser.param_groups:
        group["lr"] = rate * group["share"]
    return rate
