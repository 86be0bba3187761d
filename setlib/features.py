"""Features of the frozen first layers, computed once: for a training's crops, for pictures scored by several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from setlib.data.crops import Batch, RandomCrops
from setlib.style import SourceStyle, fit_style, same

if TYPE_CHECKING:
    from setlib.segmenter import Segmenter


@dataclass(frozen=True)
class FrozenFeatures:
    """What the first `stop` layers made of some images, kept so that they need not run again.

    hidden: all tokens that layer `stop` itself put out, before any refiner: (B, N, C) with class and register
    tokens first, or (B, H, W, C). maps: patch features (B, H, W, C) of layers that a head reads, as they are without a
    refiner; with those behind `stop`, a model that refines nothing need not run at all. style: that they have been
    brought to.
    """

    hidden: Tensor
    maps: dict[int, Tensor]
    stop: int
    style: SourceStyle | None = None

    def __getitem__(self, images: slice | Sequence[int] | np.ndarray | Tensor) -> FrozenFeatures:
        """Those of some of the images."""
        return replace(self, hidden=self.hidden[images], maps={layer: m[images] for layer, m in self.maps.items()})

    def to(self, device: torch.device | str) -> FrozenFeatures:
        """The same on a device."""
        maps = {layer: m.to(device) for layer, m in self.maps.items()}
        return replace(self, hidden=self.hidden.to(device), maps=maps)

    @staticmethod
    def cat(parts: Sequence[FrozenFeatures]) -> FrozenFeatures:
        """Those of several batches as one."""
        maps = {layer: torch.cat([part.maps[layer] for part in parts]) for layer in parts[0].maps}
        return replace(parts[0], hidden=torch.cat([part.hidden for part in parts]), maps=maps)


class SharedFeatures:
    """The frozen first layers of models that share one backbone, run once for all of them.

    Layers 1 to `stop` are shared, the fewest that any of the models leaves frozen (one that leaves none is passed
    over); maps that a head reads are kept as far as the model goes that leaves most. Models whose refiner has another
    style than the last one's are passed over.
    """

    def __init__(self, models: Iterable[Segmenter]) -> None:
        models = list(models)
        self.style = models[-1].refiner.style
        models = [model for model in models if same(model.refiner.style, self.style)]
        self.model = max(models, key=lambda model: model.frozen_until)
        self.stop = min((model.frozen_until for model in models if model.frozen_until), default=0)
        read = {layer for model in models for layer in model.feature_layers}
        self.layers = sorted(layer for layer in read if layer <= self.model.frozen_until and layer != self.stop)

    def __call__(self, images: Tensor) -> FrozenFeatures | None:
        """Features of images (B, 3, h, w) in [0, 1], on the model's device; None if no layer is frozen."""
        if not self.stop:
            return None
        backbone, device = self.model.backbone, self.model.device
        parts = images.split(self.model.experiment.inference.windows)
        with self.model.autocast():
            kept = [backbone.frozen_features(one.to(device), self.stop, self.layers, style=self.style) for one in parts]
        return FrozenFeatures.cat(kept)


class KeptCrops:
    """A fixed set of crops, as many as train.views, with their frozen features, made once; shared by models and seeds.

    Kept on the CPU: crops as uint8, features in the model's precision.
    """

    def __init__(self, models: Iterable[Segmenter], crops: RandomCrops, progress: bool = True) -> None:
        features, settings = SharedFeatures(models), crops.experiment.train
        self.style = features.style
        chunks = [chunk.tolist() for chunk in torch.arange(settings.views).split(settings.batch_size)]
        self.crops: list[Batch] = []
        with tqdm(total=settings.views, desc="frozen features", unit="crop", leave=None, disable=not progress) as bar:
            for images, labels, _ in crops.batches(chunks):
                frozen = features(images.float() / 255)
                for i in range(len(images)):
                    own = frozen and frozen[i : i + 1].to("cpu")
                    self.crops.append(Batch(images[i : i + 1], labels[i : i + 1], own))
                bar.update(len(images))

    def batches(self, chosen: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Crops by their numbers, a batch for each list."""
        for indices in chosen:
            images, labels, frozen = zip(*(self.crops[i] for i in indices), strict=True)
            yield Batch(torch.cat(images), torch.cat(labels), FrozenFeatures.cat(frozen) if frozen[0] else None)


def keep_crops(models: Iterable[Segmenter], crops: RandomCrops, progress: bool = True) -> KeptCrops | RandomCrops:
    """What models are trained on: crops that are kept, or, where train.views is 0, fresh ones. Fits their styles."""
    models, known = list(models), None
    for model in models:
        fit_style(model, crops, known)
        known = model.refiner.style or known
    return KeptCrops(models, crops, progress) if crops.experiment.train.views else crops
