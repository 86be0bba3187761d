"""Spectral-decomposed tokens for domain generalised semantic segmentation.

Public names are imported when they are first used, so that `python -m setlib --help` stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

WHERE = {  # public name -> the module that holds it
    "Studio": "setlib.explorer.studio",
    "load_segmenter": "setlib.checkpoint",
    "predict": "setlib.inference",
}
__all__ = list(WHERE)


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name not in WHERE:
        raise AttributeError(f"module 'setlib' has no attribute '{name}'")
    return getattr(import_module(WHERE[name]), name)
