"""Spectral-decomposed tokens for domain generalised semantic segmentation: the public names.

Each is imported when it is first used, so that `python -m setlib --help` stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

NAMES = {  # by the module, below setlib, that they are in
    "experiment": ("Experiment",),
    "run": ("Run",),
    "data.domains": ("Domain", "load_domain"),
    "data.crops": ("RandomCrops", "batch_indices"),
    "backbone": ("FrozenBackbone",),
    "weights.load": ("load_backbone",),
    "features": ("KeptCrops", "keep_crops"),
    "refiners": ("REFINERS", "build_refiner"),
    "segmenter": ("Segmenter",),
    "checkpoint": ("build_segmenter", "save_segmenter", "load_segmenter", "share"),
    "inference": ("predict",),
    "training": ("train", "point_seeds", "make_optimiser", "set_learning_rate"),
    "metric": ("MeanIoU",),
    "evaluation": ("evaluate", "evaluate_run"),
    "analysis.ablation": ("train_together", "run_ablation"),
    "explorer.studio": ("Studio",),
}
PLACES = {name: module for module, names in NAMES.items() for name in names}
MODULES = ("plots", "spectral")
__all__ = [*PLACES, *MODULES]


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name in MODULES:
        return import_module(f"setlib.{name}")
    if name not in PLACES:
        raise AttributeError(f"module 'setlib' has no attribute '{name}'")
    return getattr(import_module(f"setlib.{PLACES[name]}"), name)


def __dir__() -> list[str]:
    """What completion offers."""
    return sorted({*globals(), *__all__})
