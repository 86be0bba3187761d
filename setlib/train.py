"""The training loop: views of the source, optimiser, schedule, checkpoint, resume, history.

Only the source domain is touched here. Same seed and machine give the same numbers, also after a kill and a resume.
Several processes, or several parts of a step one after the other, take the steps that one process would.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as save_bytes
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from setlib.backbone import FrozenBackbone, Prefix
from setlib.data import domains
from setlib.data.augment import augment
from setlib.distributed import accelerator, add_up, keep_freed_memory, state
from setlib.evaluate import evaluate_models, share_prefix
from setlib.experiment import Experiment, Run, Train
from setlib.files import write_atomic
from setlib.model import DEVICE, FILES, Segmenter


class View(NamedTuple):
    """An augmented crop (3, h, w) uint8, its labels (h, w) uint8 train ids, and the damaged pictures passed over."""

    image: Tensor
    label: Tensor
    skipped: tuple[str, ...] = ()


@dataclass
class Views:
    """Augmented crops of the source by number: view i is the same picture, crop and colours at every call."""

    domain: domains.Domain
    experiment: Experiment

    def __getitem__(self, index: int) -> View:
        """View `index`. A damaged picture stops it with ValueError, or is replaced by the next (data.on_error=skip)."""
        data, train = self.experiment.data, self.experiment.train
        seed = data.content_seed if train.views else self.experiment.seed  # kept views are shared by all seeds
        epoch, place = divmod(index, len(self.domain))
        order = np.random.default_rng([seed, 0, epoch]).permutation(len(self.domain))
        sample, skipped = self._sample(int(order[(place + i) % len(order)]) for i in range(len(order)))
        generator = Generator().manual_seed(
            int(np.random.SeedSequence([seed, 1, index]).generate_state(1, np.uint64)[0] >> 1)
        )
        image = torch.from_numpy(sample.image.copy()).permute(2, 0, 1).float() / 255
        label = torch.from_numpy(self.domain.ids.to_train[sample.label]).long()
        image, label = augment(image, label, data, generator)
        return View((image * 255).round().byte(), label.byte(), skipped)

    def _sample(self, order: Iterable[int]) -> tuple[domains.Sample, tuple[str, ...]]:
        """The first picture that can be decoded, at the size that the largest crop needs, and what is wrong before."""
        data, skipped = self.experiment.data, []
        for index in order:
            try:
                return self.domain.sample(index, math.ceil(data.long_edge * data.scale_max)), tuple(skipped)
            except ValueError as error:
                if data.on_error != "skip":
                    raise
                skipped.append(str(error))
        raise ValueError(f"No picture of {self.domain.spec.text} can be decoded: {skipped[0]}")

    def batches(self, chosen: Sequence[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of views, images (B, 3, h, w) in [0, 1] and labels (B, h, w) int64, made by data.workers processes.

        A damaged picture that is skipped is named once.
        """
        named: set[str] = set()
        workers = self.experiment.data.workers
        for images, labels, skipped in DataLoader(self, batch_sampler=chosen, num_workers=workers, collate_fn=_collate):
            for problem in dict.fromkeys(skipped):
                if problem not in named:
                    named.add(problem)
                    tqdm.write(f"skipped ({len(named)}): {problem}")
            yield images.float() / 255, labels.long()


def _collate(views: list[View]) -> tuple[Tensor, Tensor, list[str]]:
    images, labels, skipped = zip(*views, strict=True)
    return torch.stack(images), torch.stack(labels), [problem for problems in skipped for problem in problems]


@dataclass
class Bank:
    """Views with the features of the frozen first layers, computed once. Shared by refiners and seeds."""

    views: list[tuple[Tensor, Tensor, Prefix | None]]  # (1, 3, h, w) and (1, h, w) uint8; None when no layer is frozen

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, Prefix | None]:
        """Images, labels and frozen features of some views."""
        images, labels, prefixes = zip(*(self.views[i] for i in indices), strict=True)
        prefix = Prefix.cat(prefixes).map(lambda kept: kept.to(DEVICE)) if prefixes[0] else None
        return torch.cat(images).float() / 255, torch.cat(labels).long(), prefix


def make_bank(model: Segmenter, domain: domains.Domain, progress: bool = True, stop: int = 0) -> Bank:
    """Cuts train.views crops of the source and runs the frozen layers over them, once; stop: see `Segmenter.prefix`."""
    experiment = model.experiment
    views, kept = Views(domain, experiment), []
    with tqdm(total=experiment.train.views, desc="frozen features", unit="crop", disable=not progress) as bar:
        chunks = torch.arange(experiment.train.views).split(experiment.train.batch_size)
        for images, labels in views.batches([chunk.tolist() for chunk in chunks]):
            prefix = model.prefix(images, stop)
            parts = [prefix and prefix.map(lambda kept, i=i: kept[i : i + 1].cpu()) for i in range(len(images))]
            kept += zip((images * 255).round().byte().split(1), labels.byte().split(1), parts, strict=True)
            bar.update(len(images))
    return Bank(kept)


def batch_indices(experiment: Experiment, step: int) -> list[int]:
    """Views of one step: always new ones, or all kept ones in a new order each epoch."""
    size, views = experiment.train.batch_size, experiment.train.views
    positions = range(step * size, (step + 1) * size)
    if not views:
        return list(positions)
    orders = {
        e: np.random.default_rng([experiment.seed, 2, e]).permutation(views) for e in {p // views for p in positions}
    }
    return [int(orders[p // views][p % views]) for p in positions]


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


def validation_pictures(experiment: Experiment, source: domains.Domain) -> domains.Domain:
    """Pictures of the source's data set that are not among those it is trained on.

    Raises ValueError if there are none, or if train.validate_on names another data set.
    """
    text = experiment.train.validate_on or source.spec.text
    if domains.parse(text).name != source.spec.name:
        raise ValueError(f"Option train.validate_on is for the source's own data set {source.spec.name}, not '{text}'.")
    own = domains.load(text, experiment.data)
    trained = set(source.keys)
    kept = [i for i, key in enumerate(own.keys) if key not in trained]
    if not kept or not own.has_labels:
        raise ValueError(
            f"'{text}' has no labelled picture that is not trained on: name a part of the data set that has with "
            "train.validate_on, or leave train.validate_every at 0."
        )
    return replace(own, dataset=own.dataset.select(kept))


class Trainer:
    """Everything that changes from step to step, with its checkpoint."""

    def __init__(self, model: Segmenter, run: Run) -> None:
        self.model, self.run, self.train = model, run, model.experiment.train
        keep_freed_memory()
        unread = max(model.refiner.layers, default=0) > max(model.feature_layers)
        self.engine = accelerator(some_unused=unread or model.refiner.adapt is not None)
        parts = self.engine.num_processes * self.train.accumulate
        if self.train.batch_size % parts:
            raise ValueError(
                f"Option train.batch_size ({self.train.batch_size}) must be a multiple of {parts}: "
                f"{self.engine.num_processes} processes x train.accumulate ({self.train.accumulate})."
            )
        self.prepared = self.engine.prepare_model(model, device_placement=False)
        self.optimiser = make_optimiser(model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if self.train.ema else {}
        self.history: list[dict] = []
        self.next_step = 0

    def step(self, images: Tensor, labels: Tensor, prefix: Prefix | None) -> dict:
        """One optimiser step on this process's views of it; returns its history entry.

        Raises ValueError when the loss is not finite.
        """
        began, number = time.perf_counter(), self.next_step + 1
        rate = learning_rate(self.train, self.next_step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["share"]
        self.optimiser.zero_grad()
        loss = self.backward(images, labels, prefix)
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.train.clip_norm or math.inf)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise ValueError(
                f"Training stopped at step {number}: the loss is {loss.item()}, its gradient norm {norm.item()}; "
                f"lower train.learning_rate ({self.train.learning_rate})."
            )
        self.optimiser.step()
        for name, value in self.average.items():
            value.lerp_(self.parameters[name].detach(), 1 - self.train.ema)
        self.next_step = number
        seconds = round(time.perf_counter() - began, 4)
        entry = {"step": number, "loss": loss.item(), "lr": rate, "grad_norm": norm.item(), "seconds": seconds}
        self.history.append(entry)
        return entry

    def backward(self, images: Tensor, labels: Tensor, prefix: Prefix | None) -> Tensor:
        """Gradients of a step, taken in train.accumulate parts; returns its loss over all processes."""
        counts = add_up(self.model.head.counts(labels))
        first = self.next_step * self.train.batch_size + state().process_index * len(images)  # view, counted from start
        seeds = [np.random.SeedSequence([self.model.experiment.seed, 3, first + i]) for i in range(len(images))]
        seeds = [int(seed.generate_state(1)[0]) for seed in seeds]
        total = torch.zeros((), device=labels.device)
        parts = np.array_split(np.arange(len(images)), self.train.accumulate)
        for part in parts:
            own = prefix and prefix.map(lambda kept, part=part: kept[part])
            more = part is not parts[-1]
            with self.engine.no_sync(self.prepared) if more else contextlib.nullcontext():
                output = self.prepared(images[part], own)
                loss = self.model.loss(output, labels[part], counts, [seeds[i] for i in part])
                (loss * self.engine.num_processes).backward()  # the engine takes the processes' mean
            total += loss.detach()
        return add_up(total)

    def save(self) -> None:
        """Writes history.jsonl and checkpoint.safetensors (weights, optimiser, average, step), whole or not at all."""
        if not self.engine.is_main_process:
            return
        tensors = {f"model.{name}": value.detach() for name, value in self.model.trainable_state().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimiser.{name}.{key}": value for key, value in self.optimiser.state.get(p, {}).items()}
        notes = {"step": str(self.next_step)}
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
                self.next_step = int(saved.metadata()["step"])
                tensors = {name: saved.get_tensor(name) for name in saved.keys()}
            self.history = [entry for entry in read_history(self.run) if entry["step"] <= self.next_step]
            with torch.no_grad():
                for name, value in self.model.trainable_state().items():  # buffers too
                    value.copy_(tensors[f"model.{name}"])
                for name, p in self.parameters.items():
                    kept = {key: tensors.get(f"optimiser.{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
                    if kept["step"] is not None:
                        self.optimiser.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in kept.items()}
                    if name in self.average:
                        self.average[name].copy_(tensors[f"average.{name}"])
        except Exception as error:
            raise ValueError(f"{path} cannot be resumed ({error}): delete it to train from the start.") from None

    def validate(self, own: domains.Domain) -> float:
        """mIoU of the model as it is on pictures of the source that it is not trained on, percent."""
        self.model.eval()
        score = evaluate_models({"": self.model}, own, progress=False)[""]
        self.model.train()
        return score.miou

    def use_average(self) -> None:
        """Puts the moving average of the weights, if one is kept, in place of the weights."""
        with torch.no_grad():
            for name, value in self.average.items():
                self.parameters[name].copy_(value)


def train(
    run: Run,
    *,
    source: domains.Domain | None = None,
    backbone: FrozenBackbone | None = None,
    bank: Bank | None = None,
    progress: bool = True,
) -> tuple[Segmenter, list[dict]]:
    """Trains the run's segmenter on its source and returns it, in evaluation mode, with its history.

    A finished run is loaded as it is, an interrupted one goes on from its checkpoint; the model ends in RUN/model.
    `bank` (of `make_bank`) may be shared by runs that differ only in refiner and seed.
    Raises ValueError when the loss is not finite or the source cannot be used.
    """
    experiment, settings = run.experiment, run.experiment.train
    if is_finished(run):
        return Segmenter.load(run.path / "model", backbone), read_history(run)
    with state().main_process_first():  # what is fetched, converted or rendered once is then there for all
        model = Segmenter(experiment, backbone)
        source = source or domains.load(experiment.data.source, experiment.data, role="source")
        own = validation_pictures(experiment, source) if settings.validate_every else None
    trainer = Trainer(model, run)
    trainer.resume()
    progress = progress and state().is_main_process
    bank = bank or (make_bank(model, source, progress) if settings.views else None)
    model.train()
    label, done = f"train {experiment.model.refiner}, seed {experiment.seed}", trainer.next_step
    shown: dict[str, str] = {}
    chosen = [own_part(batch_indices(experiment, step)) for step in range(done, settings.steps)]
    fresh = ((*batch, None) for batch in Views(source, experiment).batches(chosen))
    with tqdm(total=settings.steps, initial=done, desc=label, unit="step", smoothing=0, disable=not progress) as bar:
        for images, labels, prefix in map(bank.batch, chosen) if bank else fresh:
            entry = trainer.step(images.to(DEVICE), labels.to(DEVICE), prefix)
            if own and (entry["step"] % settings.validate_every == 0 or entry["step"] == settings.steps):
                entry["source_miou"] = trainer.validate(own)
                shown = {"source mIoU": f"{entry['source_miou']:.1f}"}
            bar.set_postfix({"loss": f"{entry['loss']:.3f}"} | shown, refresh=False)
            bar.update()
            if trainer.next_step % settings.checkpoint_every == 0 or trainer.next_step == settings.steps:
                trainer.save()
    trainer.use_average()
    if state().is_main_process:
        model.save(run.path / "model")
        (run.path / "checkpoint.safetensors").unlink(missing_ok=True)
    state().wait_for_everyone()
    return model.eval(), trainer.history


def own_part(indices: list[int]) -> list[int]:
    """This process's views of a step."""
    length = len(indices) // state().num_processes
    return indices[state().process_index * length :][:length]


def train_together(runs: dict[str, Run], progress: bool = True) -> dict[str, tuple[Segmenter, list[dict]]]:
    """Trains runs that share source, views and backbone one after the other: the frozen layers are computed once."""
    first = next(iter(runs.values())).experiment
    backbone = FrozenBackbone.load(first.model.backbone, patch_size=first.model.patch_size)
    source = domains.load(first.data.source, first.data, role="source")
    bank = None
    if first.train.views and not all(is_finished(run) for run in runs.values()):
        maker, stop = share_prefix({n: Segmenter(run.experiment, backbone).frozen_until for n, run in runs.items()})
        bank = make_bank(Segmenter(runs[maker].experiment, backbone), source, progress, stop)
    return {
        name: train(run, source=source, backbone=backbone, bank=bank, progress=progress) for name, run in runs.items()
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


def summary(trained: dict[str, tuple[Segmenter, list[dict]]], window: int = 10) -> list[dict]:
    """Rows per model: parameters by part, mean loss of first and last `window` steps, median seconds; NaN if lost."""
    rows = []
    for name, (model, history) in trained.items():
        losses = [entry["loss"] for entry in history] or [math.nan]
        parts = {f"parameters of the {part}": count for part, count in model.num_trainable().items()}
        ends = {"first loss": float(np.mean(losses[:window])), "last loss": float(np.mean(losses[-window:]))}
        seconds = {"seconds per step": float(np.median([entry["seconds"] for entry in history] or [math.nan]))}
        steps = {"steps": model.experiment.train.steps, "precision": model.precision}
        rows.append({"model": name} | parts | steps | ends | seconds)
    return rows


def verdict(rows: list[dict]) -> str:
    """What `summary` shows, in words made from its numbers."""
    rows = [row for row in rows if row["last loss"] == row["last loss"]]
    parts = [f"{row['model']} from {row['first loss']:.2f} to {row['last loss']:.2f}" for row in rows]
    text = f"The loss on the source went, over {rows[0]['steps']} steps: {'; '.join(parts)}. " if rows else ""
    if len(rows) > 1:
        text += f"Lowest at the end is {min(rows, key=lambda row: row['last loss'])['model']}. "
    return text + "A low loss on the source says nothing yet of other domains: that is asked in notebook 04."
