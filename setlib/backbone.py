"""Any frozen vision transformer, opened at every layer: features out, a refiner in.

The model's own forward makes the tokens that its first layer reads; from there a plain loop runs the layers one by one
and hands the patch features to whatever refiner the caller brings. Layers are found by structure, not by family.
Where the weights come from is said in `weights/`, what a refiner computes in `tokens.py` and `refiners.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from setlib._families import Arguments, Grid, find_layers, first_input, hash_weights, patch_convolution, run_layer
from setlib.features import FrozenFeatures

if TYPE_CHECKING:  # transformers takes 3 s to import
    from transformers import PreTrainedModel

    from setlib.style import SourceStyle
    from setlib.tokens import Refiner

Colour = Sequence[float]  # red, green, blue
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of RGB in [0, 1]


class FrozenBackbone(nn.Module):
    """A frozen vision transformer whose patch features can be read and refined after every layer.

    Layers are numbered from 1. A refiner (`tokens.Refiner`) is called with the patch features behind a layer; class and
    register tokens pass by it untouched, and prompts, if it has them, do not leave their layer. One that changes
    weights gets a copy of the model (`adapted`); otherwise nothing in here learns. The model stays in eval mode,
    whatever `train` is called on.

    Parameters
    ----------
    model : a vision model of transformers with a plain column of layers (ViT, DINOv2, DINOv3, CLIP, SigLIP, SigLIP 2,
        MAE, SAM, timm's EVA-02).
    mean, std : of the images it was trained on, RGB in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: PreTrainedModel, name: str = "", mean: Colour = IMAGENET[0], std: Colour = IMAGENET[1]
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self._layers = find_layers(model)  # a tuple: registered once only, inside the model
        projection = patch_convolution(model)
        if not (projection or hasattr(model.config, "patch_size")) or hasattr(model.config, "num_detection_tokens"):
            raise ValueError(f"{type(model).__name__} has no patches in its last tokens: expected a plain ViT.")
        self.num_layers = len(self._layers)
        self.channels = projection.out_channels if projection else model.config.hidden_size
        self.patch_size = projection.kernel_size[0] if projection else model.config.patch_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        if hasattr(model.config, "mask_ratio"):
            model.config.mask_ratio = 0.0  # a masked autoencoder would drop patches

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Takes note of the mode; the frozen model stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the frozen weights; an adapted copy keeps that of its original."""
        return hash_weights(self.model)

    def adapted(self, adapt: Callable[[nn.Module, Sequence[nn.Module]], object] | None) -> FrozenBackbone:
        """A copy whose model `adapt(model, layers)` has changed, layers in order; the backbone itself without one."""
        if adapt is None:
            return self
        twin = copy.deepcopy(self)
        twin.fingerprint = self.fingerprint
        adapt(twin.model, twin._layers)
        return twin

    def forward(
        self,
        images: Tensor,
        refiner: Refiner | None = None,
        layers: Sequence[int] | None = None,
        frozen: FrozenFeatures | None = None,
        gradient_checkpointing: bool = False,
    ) -> dict[int, Tensor]:
        """Patch features after the requested layers, after the refiner where it refines them, without the final norm.

        Parameters
        ----------
        images : (B, 3, h, w) in [0, 1]; below and to the right the last pixels are repeated up to multiples of the
            patch size, so that H and W are h and w in patches, rounded up.
        layers : numbers from 1 to `num_layers`; by default the last one. Layers behind the last requested do not run.
        frozen : features of the same images; their layers do not run again (what comes before the first layer does).
        gradient_checkpointing : layers keep only their input for the gradient and run again for it, refiner included.

        Returns
        -------
        {layer: (B, H, W, C)} in the order of `layers`. No graph is kept before the first refined layer.

        Raises
        ------
        ValueError : unknown layers, a refiner that this backbone cannot take, or frozen features that do not fit.
        """
        wanted = self._known(layers or (self.num_layers,))
        done, maps = (frozen.stop, dict(frozen.maps)) if frozen else (0, {})
        refined = self._known(refiner.layers) if refiner is not None else ()
        style = refiner.style if refiner is not None else None
        if refiner is not None and done > refiner.frozen_until(self.num_layers):
            raise ValueError(f"Frozen features end with layer {done}, but the refiner refines {refined}: end before.")
        if absent := [layer for layer in wanted if layer < done and layer not in maps]:
            raise ValueError(f"The frozen features hold no maps of layers {absent}: name them when they are made.")
        if frozen and not refined:
            maps[done] = _patches(frozen.hidden, self.grid(images.shape[2:]))
        if not refined and set(wanted) <= set(maps):
            return {layer: maps[layer] for layer in wanted}

        hidden, arguments, grid = self._first_input(images)
        if frozen:
            if hidden.shape != frozen.hidden.shape:
                expected, found = tuple(hidden.shape), tuple(frozen.hidden.shape)
                raise ValueError(f"Frozen features of other images: expected tokens {expected}, they hold {found}.")
            hidden = frozen.hidden

        def step(number: int, hidden: Tensor) -> Tensor:
            """One frozen layer, unless it is done, and the refiner behind it."""
            prompts = refiner.prompts(number) if refiner is not None and refiner.prompts and number in refined else None
            if number > done:
                hidden = _refine(run_layer(self._layers[number - 1], hidden, arguments, prompts), style, number, grid)
            return _refine(hidden, refiner, number, grid)

        for number in range(max(done, 1), max(wanted) + 1):  # layer `done` has run, its refiner has not
            learns = torch.is_grad_enabled() and (hidden.requires_grad or number in refined)
            if gradient_checkpointing and learns:
                hidden = checkpoint(step, number, hidden, use_reentrant=False)
            else:
                hidden = step(number, hidden)
            if number in wanted:
                maps[number] = _patches(hidden, grid)
        return {layer: maps[layer] for layer in wanted}

    @torch.no_grad()
    def frozen_features(
        self,
        images: Tensor,
        stop: int,
        layers: Sequence[int] = (),
        frozen: FrozenFeatures | None = None,
        style: SourceStyle | None = None,
    ) -> FrozenFeatures:
        """Runs layers 1 to `stop`, or to the last of `layers`, once for any number of later calls with the same images.

        images: (B, 3, h, w) in [0, 1]. layers: whose maps are kept. frozen: of the same images, to go on from.
        style: of the refiner that they are for.
        """
        last, maps = max(self._known((stop, *layers))), {}
        hidden, arguments, grid = self._first_input(images)
        done, hidden = (frozen.stop, frozen.hidden) if frozen else (0, hidden)
        for number in range(done + 1, last + 1):
            hidden = _refine(run_layer(self._layers[number - 1], hidden, arguments), style, number, grid)
            if number == stop:
                kept = hidden
            if number in layers:
                maps[number] = _patches(hidden, grid)
        return FrozenFeatures(kept, maps, stop, style)

    def _first_input(self, images: Tensor) -> tuple[Tensor, Arguments, Grid]:
        """What the model hands to its first layer: all tokens, the arguments that every layer gets, and the grid."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            found = f"{tuple(images.shape)} of {images.dtype}"
            raise ValueError(f"Expected images of shape (B, 3, h, w), floats in [0, 1], got {found}.")
        grid = self.grid(images.shape[2:])
        below, right = (n * self.patch_size - side for n, side in zip(grid, images.shape[2:], strict=True))
        images = F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images
        self.model.eval()  # somebody may have called train() on the inner model
        pixels = ((images - self.mean) / self.std).to(next(self.model.parameters()).dtype)
        return *first_input(self.model, self._layers[0], pixels, grid), grid

    def grid(self, size: Sequence[int]) -> Grid:
        """(H, W), the patches that cover images of size (h, w) in pixels, rounded up."""
        height, width = size
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def _known(self, layers: Sequence[int]) -> tuple[int, ...]:
        if wrong := [layer for layer in layers if not 1 <= layer <= self.num_layers]:
            raise ValueError(f"Expected layers from 1 to {self.num_layers} ({self.name or 'this model'}), got {wrong}.")
        return tuple(layers)


def _patches(hidden: Tensor, grid: Grid) -> Tensor:
    """(B, N, C) with the patches last, or (B, H, W, C), as (B, H, W, C)."""
    if hidden.dim() == 4 and hidden.shape[1:3] == grid:
        return hidden
    num_prefix = hidden.shape[1] - grid[0] * grid[1]
    if hidden.dim() != 3 or num_prefix < 0:
        raise ValueError(f"Tokens {tuple(hidden.shape)} do not cover {grid} patches: expected a plain ViT.")
    return hidden[:, num_prefix:].unflatten(1, grid)  # (B, H, W, C)


def _refine(hidden: Tensor, refiner: Refiner | SourceStyle | None, layer: int, grid: Grid) -> Tensor:
    """All tokens with the patches refined, behind the refiner's own layers, and every other token as it was."""
    if refiner is None or layer not in refiner.layers:
        return hidden
    features = _patches(hidden, grid)
    refined = refiner(features, layer)
    if refined is features:  # it works inside the layer
        return hidden
    if refined.shape != features.shape:
        expected, found = tuple(features.shape), tuple(refined.shape)
        raise ValueError(f"The refiner of layer {layer} returned shape {found}, expected {expected}.")
    refined = refined.to(hidden.dtype)
    if hidden.dim() == 4:
        return refined
    patches = refined.flatten(1, 2)  # (B, H*W, C)
    return torch.cat([hidden[:, : hidden.shape[1] - patches.shape[1]], patches], dim=1)
