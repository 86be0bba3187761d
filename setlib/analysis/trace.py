"""The shapes of one batch on its way through backbone, refiner and head."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from setlib.segmenter import Segmenter


@torch.no_grad()
def shape_trace(model: Segmenter, images: Tensor) -> list[dict]:
    """What each stage hands to the next: rows of stage, axes and shape, in the order in which they are made.

    images: (B, 3, h, w) in [0, 1]. Of the refined layers the first is followed inside.
    """
    rows = [_row("images", "B, 3, h, w", images)]
    parts = {f"the {name} tokens": ("B, positions, C", branch) for name, branch in model.refiner.branches().items()}
    parts["the refiner"] = ("B, H, W, C", model.refiner)
    with ExitStack() as hooks:
        for name, (axes, module) in parts.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(_note, rows, f"into {name}", axes)))
            hooks.enter_context(module.register_forward_hook(partial(_note, rows, f"out of {name}", axes)))
        maps = model.backbone(images.to(model.device), model.refiner, model.feature_layers)
    rows = rows[: 1 + 2 * len(parts)]  # what the other layers do is the same
    rows += [_row(f"features after layer {layer}, to the head", "B, H, W, C", found) for layer, found in maps.items()]
    output = model.head(list(maps.values()), model.refiner.queries())
    size = (images.shape[-2], images.shape[-1])
    return [*rows, _row("class probabilities", "B, K, h, w", model.pixel_probabilities(output, size))]


def _note(rows: list[dict], stage: str, axes: str, _: nn.Module, given: tuple, answer: Tensor | None = None) -> None:
    rows.append(_row(stage, axes, given[0] if answer is None else answer))


def _row(stage: str, axes: str, tensor: Tensor) -> dict:
    return {"stage": stage, "axes": axes, "shape": " x ".join(map(str, tensor.shape))}
