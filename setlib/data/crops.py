"""What training sees, random crops of the source by number, and what it does not see: held out pictures of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from setlib.data import domains
from setlib.data.augment import augment, to_tensor
from setlib.data.domains import Domain
from setlib.experiment import Experiment
from setlib.files import outlive_stops
from setlib.spectral import PIXELS, mix_amplitude

if TYPE_CHECKING:
    from setlib.features import FrozenFeatures


class Crop(NamedTuple):
    """An augmented crop (3, h, w) uint8 and its labels (h, w) uint8 train ids."""

    image: Tensor
    label: Tensor


class Batch(NamedTuple):
    """Crops of a training step: images (B, 3, h, w) and labels (B, h, w) uint8, and what is kept of their features."""

    images: Tensor
    labels: Tensor
    frozen: FrozenFeatures | None = None

    def to(self, device: torch.device | str) -> tuple[Tensor, Tensor, FrozenFeatures | None]:
        """On a device, as the network takes them: images float in [0, 1], labels int64."""
        frozen = self.frozen and self.frozen.to(device)
        return self.images.to(device).float() / 255, self.labels.to(device).long(), frozen


@dataclass
class RandomCrops:
    """Augmented crops of the source by number: crop i is the same picture, place and colours at every call."""

    domain: Domain
    experiment: Experiment

    def __getitem__(self, index: int) -> Crop:
        """Crop `index`. A damaged picture stops it with ValueError, or is replaced by the next (data.on_error=skip)."""
        data, train = self.experiment.data, self.experiment.train
        seed = data.content_seed if train.views else self.experiment.seed  # kept crops are shared by all seeds
        image, label = self._augmented(index, seed)
        if weight := 0.0 if train.mix_layer else mix_weight(train.mix, seed, index):
            other, _ = self._augmented(index ^ 1, seed)
            image = mix_amplitude(image[None], other[None], weight, high=train.mix_high, axes=PIXELS)[0].clamp(0, 1)
        return Crop((image * 255).round().byte(), label.byte())

    def _augmented(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        """Crop `index` before any mixing: (3, h, w) float in [0, 1] and (h, w) int64 train ids."""
        data = self.experiment.data
        epoch, place = divmod(index, len(self.domain))
        order = np.random.default_rng([seed, 0, epoch]).permutation(len(self.domain))
        largest = int(np.ceil(data.long_edge * data.scale_max))  # that a crop needs of its picture
        sample = next((one for _, one in self.domain.samples(np.roll(order, -place).tolist(), largest)), None)
        if sample is None:
            raise ValueError(f"No picture of {self.domain.spec.text} can be decoded.")
        seed = np.random.SeedSequence([seed, 1, index]).generate_state(1, np.uint64)[0] >> 1
        generator = Generator().manual_seed(int(seed))
        image = to_tensor(sample.image)[0]
        label = torch.from_numpy(self.domain.ids.to_train[sample.label]).long()
        return augment(image, label, data, generator)

    def batches(self, chosen: Sequence[list[int]]) -> Iterator[Batch]:
        """Crops by their numbers, a batch for each list, made by data.workers processes."""
        workers = {"num_workers": self.experiment.data.workers, "worker_init_fn": outlive_stops}
        try:  # a generator of its own: the user's draws nothing
            for images, labels in DataLoader(self, batch_sampler=chosen, generator=torch.Generator(), **workers):
                yield Batch(images, labels)
        except ValueError as error:  # of a worker, it ends a traceback
            raise ValueError(str(error).rpartition("ValueError: ")[2].strip()) from None
        except (OSError, EOFError):  # a worker was killed: SIGCHLD is on its way, at which torch says so
            time.sleep(1)
            raise


def batch_indices(experiment: Experiment, step: int) -> list[int]:
    """Crops of one step: always new ones, or all kept ones in a new order each epoch."""
    size, views = experiment.train.batch_size, experiment.train.views
    positions = range(step * size, (step + 1) * size)
    if not views:
        return list(positions)
    orders = (np.random.default_rng([experiment.seed, 2, p // views]).permutation(views) for p in positions)
    return [int(order[p % views]) for order, p in zip(orders, positions, strict=True)]


def mix_weight(share: float, seed: int, number: int) -> float:
    """How far a crop moves towards its neighbour's amplitudes: even in [0, 1) for a share of all crops, else 0.

    0 and 1, 2 and 3, ... are neighbours, i and i ^ 1; phases are kept. Source: AmpMix of FACT (Xu, CVPR 2021).
    """
    if not share:
        return 0.0
    chance, weight = np.random.default_rng([seed, 4, number]).random(2).tolist()
    return weight if chance < share else 0.0


def held_out(experiment: Experiment, source: Domain) -> Domain:
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
