"""Any frozen vision transformer, opened at every layer: features out, a refiner in.

One hook per layer hands the patch features to whatever refiner the caller brings and puts its answer back, so that
the next frozen layer reads it. Layers are found by structure, not by family. Where the weights come from is said in
`weights.py`, what a refiner computes in `tokens.py`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from setlib.weights import IMAGENET, load_model, normalisation

Colour = Sequence[float]  # red, green, blue
Grid = tuple[int, int]  # patches in height and width
Output = Tensor | tuple  # of a layer: the tokens, or a tuple that starts with them


@dataclass(frozen=True)
class Prefix:
    """What the first layers made of some images, kept so that they need not run again.

    hidden: all tokens after layer `stop`, (B, N, C) with class and register tokens first, or (B, H, W, C).
    maps: patch features (B, H, W, C) of the requested layers up to `stop`.
    is_tuple: whether the layers of this backbone answer with a tuple.
    """

    hidden: Tensor
    maps: dict[int, Tensor]
    stop: int
    is_tuple: bool = False


class FrozenBackbone(nn.Module):
    """A frozen vision transformer whose patch features can be read and refined after every layer.

    Layers are numbered from 1. A refiner is a module with an attribute `layers` (the numbers it refines) and the call
    `refiner(features (B, H, W, C), layer) -> (B, H, W, C)`; class and register tokens pass by it untouched. Nothing
    in here ever learns or leaves eval mode, whatever `train` is called on.

    model: a transformers vision model with a plain column of layers (ViT, DINOv2, DINOv3, CLIP, SigLIP, MAE, SAM;
    SAM takes images of its own size only). mean, std: of the images it was trained on, RGB in [0, 1].
    """

    def __init__(self, model: nn.Module, name: str = "", mean: Colour = IMAGENET[0], std: Colour = IMAGENET[1]) -> None:
        super().__init__()
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self._layers = _find_layers(model)  # a tuple: registered once only, inside the model
        projection = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        self.num_layers, self.channels = len(self._layers), projection.out_channels
        self.patch_size = projection.kernel_size[0]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        if hasattr(model.config, "mask_ratio"):
            model.config.mask_ratio = 0.0  # a masked autoencoder would drop patches

    @classmethod
    def load(cls, name: str, seed: int = 0) -> FrozenBackbone:
        """The backbone of a preset, folder or hub id; see `weights.load_model`."""
        return cls(load_model(name, seed), name, *normalisation(name))

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Takes note of the mode; the frozen model stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self,
        images: Tensor,
        refiner: nn.Module | None = None,
        layers: Sequence[int] | None = None,
        prefix: Prefix | None = None,
    ) -> dict[int, Tensor]:
        """Patch features after the requested layers, after the refiner where it refines them, without the final norm.

        images: (B, 3, h, w) in [0, 1], h and w multiples of the patch size.
        layers: numbers from 1 to `num_layers`; by default the last one. Layers behind the last requested do not run.
        prefix: of the same images; its layers do not run again.
        Returns {layer: (B, H, W, C)} in the order of `layers`. No graph is kept before the first refined layer.

        Raises ValueError for unknown layers, sizes that are no multiples, or a prefix that does not fit.
        """
        wanted = self._checked(layers or (self.num_layers,))
        start = prefix.stop if prefix else 0
        refined = self._checked(refiner.layers) if refiner is not None else ()
        if early := [layer for layer in refined if layer <= start]:
            raise ValueError(f"The prefix ends with layer {start} but the refiner refines {early}: end it before them.")
        if absent := [layer for layer in wanted if layer <= start and layer not in prefix.maps]:
            raise ValueError(f"The prefix holds no maps of layers {absent}: name them when it is made.")
        maps = dict(prefix.maps) if prefix else {}
        if max(wanted) > start:
            maps |= self._run(images, max(wanted), wanted, refiner, prefix)[0]
        return {layer: maps[layer] for layer in wanted}

    @torch.no_grad()
    def prefix(self, images: Tensor, stop: int, layers: Sequence[int] = ()) -> Prefix:
        """Runs layers 1 to `stop` once, for any number of later calls of `forward` with the same images.

        images: (B, 3, h, w) in [0, 1]. layers: those up to `stop` whose maps are kept; later ones are ignored.
        """
        self._checked((stop,))
        wanted = tuple(layer for layer in self._checked(layers) if layer <= stop)
        maps, output = self._run(images, stop, wanted, None, None)
        return Prefix(_hidden(output), maps, stop, isinstance(output, tuple))

    def _run(
        self, images: Tensor, last: int, wanted: Sequence[int], refiner: nn.Module | None, prefix: Prefix | None
    ) -> tuple[dict[int, Tensor], Output]:
        """The maps of the wanted layers, and what layer `last` answered."""
        grid = self._grid(images)
        maps: dict[int, Tensor] = {}
        answers: list[Output] = []  # of layer `last`

        def follow(layer: int, module: nn.Module, inputs: tuple, output: Output) -> Output:
            if refiner is not None and layer in refiner.layers:
                output = _refine(output, refiner, layer, grid)
            if layer in wanted:
                maps[layer] = _patches(_hidden(output), grid)
            if layer == last:
                answers.append(output)
            return output

        def resume(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Output:
            if hidden_states.shape != prefix.hidden.shape:
                expected, found = tuple(hidden_states.shape), tuple(prefix.hidden.shape)
                raise ValueError(f"The prefix is of other images: expected tokens {expected}, it holds {found}.")
            return (prefix.hidden,) if prefix.is_tuple else prefix.hidden

        with contextlib.ExitStack() as stack:
            for layer, module in enumerate(self._layers, start=1):
                if prefix and layer <= prefix.stop:
                    stack.enter_context(_replaced(module, resume))
                elif layer <= last:
                    # In front of the library's own hooks, which then see the refined features too.
                    stack.callback(module.register_forward_hook(partial(follow, layer), prepend=True).remove)
                else:
                    stack.enter_context(_replaced(module, lambda *args, **kwargs: answers[-1]))
            self.model.eval()  # somebody may have called train() on the inner model
            pixels = ((images - self.mean) / self.std).to(next(self.model.parameters()).dtype)
            self.model(pixels, **self._options(len(images), grid))
        return maps, answers[-1]

    def _options(self, num_images: int, grid: Grid) -> dict[str, Any]:
        """What some families must be told: to fit their position embedding, or not to shuffle the patches."""
        order = torch.arange(grid[0] * grid[1], device=self.mean.device).expand(num_images, -1)
        known = inspect.signature(self.model.forward).parameters
        return {name: value for name, value in (("interpolate_pos_encoding", True), ("noise", order)) if name in known}

    def _grid(self, images: Tensor) -> Grid:
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            found = f"{tuple(images.shape)} of {images.dtype}"
            raise ValueError(f"Expected images of shape (B, 3, h, w), floats in [0, 1], got {found}.")
        (height, width), size = images.shape[2:], self.patch_size
        if height % size or width % size:
            padded = (-(-height // size) * size, -(-width // size) * size)
            raise ValueError(
                f"Images of {(height, width)} do not divide into patches of {size}: "
                f"pad them (or set data.height and data.width) to {padded}."
            )
        return height // size, width // size

    def _checked(self, layers: Sequence[int]) -> tuple[int, ...]:
        if wrong := [layer for layer in layers if not 1 <= layer <= self.num_layers]:
            raise ValueError(f"Expected layers from 1 to {self.num_layers} ({self.name or 'this model'}), got {wrong}.")
        return tuple(layers)


def _find_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The column of layers: the first list of as many modules as the config says, of one class, that hold a norm."""
    expected = getattr(model.config, "num_hidden_layers", None)
    for column in model.modules():
        if not isinstance(column, (nn.ModuleList, nn.Sequential)) or len({type(layer) for layer in column}) != 1:
            continue
        has_norm = any("norm" in type(module).__name__.lower() for module in column[0].modules())
        if has_norm and len(column) == (expected or len(column)):
            return tuple(column)
    raise ValueError(f"{type(model).__name__} has no column of equal layers: expected a plain vision transformer.")


@contextlib.contextmanager
def _replaced(module: nn.Module, function: Callable) -> Iterator[None]:
    """Lets `function` answer in place of the module's own forward."""
    own = module.__dict__.get("forward")  # set where another library already replaced it
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _hidden(output: Output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _patches(hidden: Tensor, grid: Grid) -> Tensor:
    """(B, N, C) with the patches last, or (B, H, W, C), as (B, H, W, C)."""
    if hidden.dim() == 4 and hidden.shape[1:3] == grid:
        return hidden
    num_prefix = hidden.shape[1] - grid[0] * grid[1]
    if hidden.dim() != 3 or num_prefix < 0:
        raise ValueError(f"Tokens {tuple(hidden.shape)} do not cover {grid} patches: expected a plain ViT.")
    return hidden[:, num_prefix:].unflatten(1, grid)  # (B, H, W, C)


def _refine(output: Output, refiner: nn.Module, layer: int, grid: Grid) -> Output:
    """The layer's answer with its patches refined and every other token as it was."""
    hidden = _hidden(output)
    features = _patches(hidden, grid)
    refined = refiner(features, layer)
    if refined.shape != features.shape:
        expected, found = tuple(features.shape), tuple(refined.shape)
        raise ValueError(f"The refiner of layer {layer} answered with shape {found}, expected {expected}.")
    if hidden.dim() == 3:
        patches = refined.flatten(1, 2)  # (B, H*W, C)
        refined = torch.cat([hidden[:, : hidden.shape[1] - patches.shape[1]], patches.to(hidden.dtype)], dim=1)
    return (refined, *output[1:]) if isinstance(output, tuple) else refined
