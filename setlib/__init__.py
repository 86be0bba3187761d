"""Spectral-decomposed tokens for domain generalised semantic segmentation: the public names.

Each is imported when it is first used, so that `python -m setlib --help` stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

PLACES = {  # public name -> where it is, below setlib
    "Experiment": "experiment.Experiment",
    "Run": "run.Run",
    "Domain": "data.domains.Domain",
    "load_domain": "data.domains.load",
    "RandomCrops": "data.crops.RandomCrops",
    "FrozenBackbone": "backbone.FrozenBackbone",
    "load_backbone": "weights.load.load_backbone",
    "KeptCrops": "features.KeptCrops",
    "keep_crops": "features.keep_crops",
    "REFINERS": "refiners.REFINERS",
    "build_refiner": "refiners.build_refiner",
    "Segmenter": "segmenter.Segmenter",
    "build_segmenter": "checkpoint.build_segmenter",
    "save_segmenter": "checkpoint.save_segmenter",
    "load_segmenter": "checkpoint.load_segmenter",
    "share": "checkpoint.share",
    "predict": "inference.predict",
    "batch_indices": "data.crops.batch_indices",
    "point_seeds": "training.point_seeds",
    "make_optimiser": "training.make_optimiser",
    "set_learning_rate": "training.set_learning_rate",
    "train": "training.train",
    "train_together": "analysis.ablation.train_together",
    "MeanIoU": "metric.MeanIoU",
    "evaluate": "evaluation.evaluate",
    "evaluate_run": "evaluation.evaluate_run",
    "run_ablation": "analysis.ablation.run_ablation",
    "Studio": "explorer.studio.Studio",
}
MODULES = ("plots", "spectral")
__all__ = [*PLACES, *MODULES]


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name in MODULES:
        return import_module(f"setlib.{name}")
    if name not in PLACES:
        raise AttributeError(f"module 'setlib' has no attribute '{name}'")
    module, _, inside = PLACES[name].rpartition(".")
    return getattr(import_module(f"setlib.{module}"), inside)


def __dir__() -> list[str]:
    """What completion offers."""
    return sorted({*globals(), *__all__})
