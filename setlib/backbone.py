"""Any frozen vision transformer, opened at every layer: features out, a refiner in.

Every layer's forward is wrapped while the model runs: the wrapper hands the patch features to whatever refiner the
caller brings and puts its answer back, so that the next frozen layer reads it. Layers are found by structure, not by
family. Where the weights come from is said in `weights.py`, what a refiner computes in `tokens.py` and `refiners.py`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from setlib.weights.load import IMAGENET, fingerprint, load_model, normalisation

Colour = Sequence[float]  # red, green, blue
Grid = tuple[int, int]  # patches in height and width
Output = Tensor | tuple  # of a layer: the tokens, or a tuple that starts with them


@dataclass(frozen=True)
class Prefix:
    """What the first layers made of some images, kept so that they need not run again.

    hidden: all tokens that layer `stop` itself answered with, before any refiner: (B, N, C) with class and register
    tokens first, or (B, H, W, C). maps: patch features (B, H, W, C) of other layers, as they are without a refiner.
    is_tuple: whether the layers of this backbone answer with a tuple.
    """

    hidden: Tensor
    maps: dict[int, Tensor]
    stop: int
    is_tuple: bool = False

    def map(self, change: Callable[[Tensor], Tensor]) -> Prefix:
        """The prefix with each of its tensors changed: moved, or some images of it taken."""
        return replace(self, hidden=change(self.hidden), maps={layer: change(m) for layer, m in self.maps.items()})

    @staticmethod
    def cat(parts: Sequence[Prefix]) -> Prefix:
        """Prefixes of several batches as one."""
        if len(parts) == 1:
            return parts[0]
        maps = {layer: torch.cat([part.maps[layer] for part in parts]) for layer in parts[0].maps}
        return replace(parts[0], hidden=torch.cat([part.hidden for part in parts]), maps=maps)


class FrozenBackbone(nn.Module):
    """A frozen vision transformer whose patch features can be read and refined after every layer.

    Layers are numbered from 1. A refiner is a module with an attribute `layers` (the numbers it refines) and the call
    `refiner(features (B, H, W, C), layer) -> (B, H, W, C)`; class and register tokens pass by it untouched. One that
    works `inside` the layers is not called: it may give `prompts(layer) -> (P, C)`, tokens that a layer reads beside
    its own and that do not leave it, or change a copy of the model (`adapted`). Nothing else in here ever learns, and
    nothing leaves eval mode, whatever `train` is called on.

    model: a vision model of transformers with a plain column of layers (ViT, DINOv2, DINOv3, CLIP, SigLIP, SigLIP 2,
    MAE, SAM, timm's EVA-02). mean, std: of the images it was trained on, RGB in [0, 1]. patch_size: to resize its
    patches to, see `resize_patches`; 0 keeps them.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str = "",
        mean: Colour = IMAGENET[0],
        std: Colour = IMAGENET[1],
        patch_size: int = 0,
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self._layers = _find_layers(model)  # a tuple: registered once only, inside the model
        if patch_size:
            resize_patches(model, patch_size)
        projection = _patch_convolution(model)
        if not (projection or hasattr(model.config, "patch_size")) or hasattr(model.config, "num_detection_tokens"):
            raise ValueError(f"{type(model).__name__} has no patches in its last tokens: expected a plain ViT.")
        self.num_layers = len(self._layers)
        self.channels = projection.out_channels if projection else model.config.hidden_size
        self.patch_size = projection.kernel_size[0] if projection else model.config.patch_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        if hasattr(model.config, "mask_ratio"):
            model.config.mask_ratio = 0.0  # a masked autoencoder would drop patches

    @classmethod
    def load(cls, name: str, seed: int = 0, patch_size: int = 0) -> FrozenBackbone:
        """The backbone of a preset, folder, file or hub id; see `weights.load_model`."""
        model = load_model(name, seed)
        return cls(model, name, *normalisation(name), patch_size)

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Takes note of the mode; the frozen model stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the frozen weights; an adapted copy keeps that of its original."""
        return fingerprint(self.model)

    def adapted(self, adapt: Callable[[nn.Module, Sequence[nn.Module]], object] | None) -> FrozenBackbone:
        """A copy whose model `adapt(model, layers)` has changed, layers in order; the backbone itself without one."""
        if adapt is None:
            return self
        original = self.fingerprint
        twin = copy.deepcopy(self)
        adapt(twin.model, twin._layers)
        twin.fingerprint = original
        return twin

    def forward(
        self,
        images: Tensor,
        refiner: nn.Module | None = None,
        layers: Sequence[int] | None = None,
        prefix: Prefix | None = None,
        checkpointing: bool = False,
    ) -> dict[int, Tensor]:
        """Patch features after the requested layers, after the refiner where it refines them, without the final norm.

        images: (B, 3, h, w) in [0, 1]; below and to the right the last pixels are repeated up to multiples of the
        patch size, so that H and W are h and w in patches, rounded up.
        layers: numbers from 1 to `num_layers`; by default the last one. Layers behind the last requested do not run.
        prefix: of the same images; its layers do not run again. checkpointing: layers keep only their input for the
        gradient and run again for it, refiner included.
        Returns {layer: (B, H, W, C)} in the order of `layers`. No graph is kept before the first refined layer.

        Raises ValueError for unknown layers, a refiner that this backbone cannot take, or a prefix that does not fit.
        """
        wanted = self._checked(layers or (self.num_layers,))
        start = prefix.stop if prefix else 0
        refined = self._checked(refiner.layers) if refiner is not None else ()
        first = start + bool(getattr(refiner, "inside", False))  # the first layer that can still be changed
        if early := [layer for layer in refined if layer < first]:
            raise ValueError(f"The prefix ends with layer {start} but the refiner refines {early}: end it before them.")
        if absent := [layer for layer in wanted if layer < start and layer not in prefix.maps]:
            raise ValueError(f"The prefix holds no maps of layers {absent}: name them when it is made.")
        maps = dict(prefix.maps) if prefix else {}
        if prefix and start in wanted and not refined:
            maps[start] = _patches(prefix.hidden, self._padded(images)[1])
        if refined or not set(wanted) <= set(maps):
            maps |= self._run(images, max(wanted), wanted, refiner, prefix, checkpointing)[0]
        return {layer: maps[layer] for layer in wanted}

    @torch.no_grad()
    def prefix(self, images: Tensor, stop: int, layers: Sequence[int] = ()) -> Prefix:
        """Runs layers 1 to `stop`, or to the last of `layers`, once for any number of later calls with the same images.

        images: (B, 3, h, w) in [0, 1]. layers: whose maps are kept; with those behind `stop` too, a model that refines
        nothing need not run at all.
        """
        last = max(self._checked((stop, *layers)))
        maps, output = self._run(images, last, {*layers} - {stop}, None, None, stop=stop)
        return Prefix(_hidden(output), maps, stop, isinstance(output, tuple))

    def _run(
        self,
        images: Tensor,
        last: int,
        wanted: Collection[int],
        refiner: nn.Module | None,
        prefix: Prefix | None,
        checkpointing: bool = False,
        stop: int = 0,
    ) -> tuple[dict[int, Tensor], Output]:
        """The maps of the wanted layers, and what layer `stop` answered (0: the last one)."""
        images, grid = self._padded(images)
        inside, prompts = getattr(refiner, "inside", False), getattr(refiner, "prompts", None)
        refined = refiner.layers if refiner is not None else ()
        start = prefix.stop if prefix else 0
        maps: dict[int, Tensor] = {}
        answers: dict[int, Output] = {}

        def compute(layer: int, own: Callable, hidden: Tensor, *args: Any, **kwargs: Any) -> Output:
            """The layer's own answer, refined."""
            if layer == start:
                output = (prefix.hidden,) if prefix.is_tuple else prefix.hidden
            elif layer in refined and prompts is not None:
                output = _with_prompts(self._layers[layer - 1], own, prompts(layer), hidden, *args, **kwargs)
            else:
                output = own(hidden, *args, **kwargs)
            return output if inside or layer not in refined else _refine(output, refiner, layer, grid)

        def answer(layer: int, own: Callable, hidden: Tensor, *args: Any, **kwargs: Any) -> Output:
            """What the layer answers with in place of its own forward."""
            if layer > last:
                return answers[last]
            if layer <= start and hidden.shape != prefix.hidden.shape:
                expected, found = tuple(hidden.shape), tuple(prefix.hidden.shape)
                raise ValueError(f"The prefix is of other images: expected tokens {expected}, it holds {found}.")
            if layer < start:
                return (hidden,) if prefix.is_tuple else hidden
            learns = torch.is_grad_enabled() and (hidden.requires_grad or layer in refined)
            if checkpointing and learns:
                output = checkpoint(compute, layer, own, hidden, *args, use_reentrant=False, **kwargs)
            else:
                output = compute(layer, own, hidden, *args, **kwargs)
            if layer in wanted:
                maps[layer] = _patches(_hidden(output), grid)
            if layer in (stop, last):
                answers[layer] = output
            return output

        with contextlib.ExitStack() as stack:
            for layer, module in enumerate(self._layers, start=1):
                stack.enter_context(_replaced(module, partial(answer, layer, module.forward)))
            self.model.eval()  # somebody may have called train() on the inner model
            pixels = ((images - self.mean) / self.std).to(next(self.model.parameters()).dtype)
            self._call(pixels, grid)
        return maps, answers[stop or last]

    def _call(self, pixels: Tensor, grid: Grid) -> object:
        """The model's own forward, at any size: families differ in what they must be told."""
        known = inspect.signature(self.model.forward).parameters
        options: dict[str, Any] = {}
        if "interpolate_pos_encoding" in known:  # CLIP, SigLIP, ViT, MAE: fit the position embedding
            options["interpolate_pos_encoding"] = True
        if "noise" in known:  # MAE: do not shuffle the patches
            options["noise"] = torch.arange(grid[0] * grid[1], device=pixels.device).expand(len(pixels), -1)
        if "spatial_shapes" in known:  # SigLIP 2 with any aspect takes patches, not pictures
            pixels = pixels.unfold(2, self.patch_size, self.patch_size).unfold(3, self.patch_size, self.patch_size)
            pixels = pixels.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # (B, N, p*p*3)
            shapes = torch.tensor(grid, device=pixels.device).expand(len(pixels), 2)
            options |= {"spatial_shapes": shapes, "pixel_attention_mask": None}
        with _fitted(self.model, grid, tuple(pixels.shape[-2:])) as parameters:
            return torch.func.functional_call(self.model, parameters, (pixels,), options)

    def _padded(self, images: Tensor) -> tuple[Tensor, Grid]:
        """The images at multiples of the patch size, the last pixels repeated, and their grid."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            found = f"{tuple(images.shape)} of {images.dtype}"
            raise ValueError(f"Expected images of shape (B, 3, h, w), floats in [0, 1], got {found}.")
        (height, width), size = images.shape[2:], self.patch_size
        grid = (-(-height // size), -(-width // size))
        below, right = grid[0] * size - height, grid[1] * size - width
        return (F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images), grid

    def _checked(self, layers: Sequence[int]) -> tuple[int, ...]:
        if wrong := [layer for layer in layers if not 1 <= layer <= self.num_layers]:
            raise ValueError(f"Expected layers from 1 to {self.num_layers} ({self.name or 'this model'}), got {wrong}.")
        return tuple(layers)


def resize_patches(model: nn.Module, size: int) -> None:
    """Gives a model patches of another size, in place: its patch kernel is resized, bicubically; positions, which are
    fitted to the grid in every call, follow.

    The kernel is not divided by its larger area, as released tokens and heads were trained so; from 14 to 16 pixels the
    features of `dinov2-small-saliency` keep a cosine of 0.95 with the same scene's at 14 (0.98 in the last layer).
    Raises ValueError if the patches are not cut by a convolution. Source: Rein's released conversion.
    """
    projection = _patch_convolution(model)
    if projection is None:
        raise ValueError(f"{type(model).__name__} cuts its patches without a convolution: leave model.patch_size at 0.")
    if projection.kernel_size == (size, size):
        return
    kernel = F.interpolate(projection.weight.float(), (size, size), mode="bicubic", align_corners=False)
    projection.weight = nn.Parameter(kernel.to(projection.weight.dtype), requires_grad=projection.weight.requires_grad)
    projection.kernel_size = projection.stride = (size, size)
    for holder in (model.config, *model.modules()):
        if isinstance(before := getattr(holder, "patch_size", None), int | tuple | list):
            holder.patch_size = size if isinstance(before, int) else (size, size)


def _patch_convolution(model: nn.Module) -> nn.Conv2d | None:
    """The convolution that cuts a picture into patches."""
    return next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)


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


@contextlib.contextmanager
def _fitted(model: nn.Module, grid: Grid, size: tuple[int, int]) -> Iterator[dict[str, Tensor]]:
    """Parameters to run the model with at another size than its own: SAM keeps a map of positions (1, H, W, C), which
    is resized as Rein's released conversion does, and refuses other sizes unless its patch embedding is told."""
    maps = {name: p for name, p in model.named_parameters() if name.endswith("pos_embed") and p.dim() == 4}
    checks = [module for module in model.modules() if maps and hasattr(module, "image_size")]
    before = [module.image_size for module in checks]
    for module in checks:
        module.image_size = size
    try:
        yield {
            name: F.interpolate(p.permute(0, 3, 1, 2), grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
            for name, p in maps.items()
            if p.shape[1:3] != grid
        }
    finally:
        for module, own in zip(checks, before, strict=True):
            module.image_size = own


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
    refined = refined.to(hidden.dtype)
    if hidden.dim() == 3:
        patches = refined.flatten(1, 2)  # (B, H*W, C)
        refined = torch.cat([hidden[:, : hidden.shape[1] - patches.shape[1]], patches], dim=1)
    return (refined, *output[1:]) if isinstance(output, tuple) else refined


def _with_prompts(
    layer: nn.Module, own: Callable, prompts: Tensor, hidden: Tensor, *args: Any, **kwargs: Any
) -> Output:
    """What a layer answers when it reads prompts (P, C) in front of its tokens (B, N, C); they do not leave it."""
    if hidden.dim() != 3:
        raise ValueError(
            f"Prompts need tokens in a row, but this backbone keeps a grid {tuple(hidden.shape)}: take another refiner."
        )
    longer = torch.cat([prompts.to(hidden.dtype).expand(len(hidden), -1, -1), hidden], dim=1)  # (B, P + N, C)
    rotating = [module for module in layer.modules() if hasattr(module, "num_prefix_tokens")]  # timm's, with RoPE
    try:
        for module in rotating:
            module.num_prefix_tokens += len(prompts)
        output = own(longer, *args, **kwargs)
    finally:
        for module in rotating:
            module.num_prefix_tokens -= len(prompts)
    kept = _hidden(output)[:, len(prompts) :]
    return (kept, *output[1:]) if isinstance(output, tuple) else kept
