"""Private: what differs between families of vision transformers, so that `backbone.py` need not know; their hash."""

from __future__ import annotations

import hashlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:  # transformers takes 3 s to import
    from transformers import PreTrainedModel

Grid = tuple[int, int]  # patches in height and width
Arguments = tuple[tuple, dict[str, Any]]  # of a layer, beside its tokens


class _Caught(Exception):
    """Ends the model's own forward at its first layer, with what that layer would have read."""

    @staticmethod
    def throw(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Caught(args, kwargs)


def first_input(model: PreTrainedModel, layer: nn.Module, pixels: Tensor, grid: Grid) -> tuple[Tensor, Arguments]:
    """What a model hands to its first layer, at any size: all tokens, and the arguments that every layer gets."""
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "interpolate_pos_encoding" in known:  # CLIP, SigLIP, ViT, MAE: fit the position embedding
        options["interpolate_pos_encoding"] = True
    if "noise" in known:  # MAE: do not shuffle the patches
        options["noise"] = torch.arange(grid[0] * grid[1], device=pixels.device).expand(len(pixels), -1)
    maps = {name: p for name, p in model.named_parameters() if name.endswith("pos_embed") and p.dim() == 4}
    checks: list[Any] = [module for module in model.modules() if maps and hasattr(module, "image_size")]
    before = [module.image_size for module in checks]
    for module in checks:  # SAM refuses other sizes unless it is told
        module.image_size = tuple(pixels.shape[-2:])
    resized = {  # SAM's map of positions (1, H, W, C), as Rein's released conversion resizes it
        name: F.interpolate(p.permute(0, 3, 1, 2), grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
        for name, p in maps.items()
        if p.shape[1:3] != grid
    }
    if "spatial_shapes" in known:  # SigLIP 2 with any aspect takes patches, not pictures
        side = model.config.patch_size
        pixels = pixels.unfold(2, side, side).unfold(3, side, side)
        pixels = pixels.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # (B, N, p*p*3)
        shapes = torch.tensor(grid, device=pixels.device).expand(len(pixels), 2)
        options |= {"spatial_shapes": shapes, "pixel_attention_mask": None}
    hook = layer.register_forward_pre_hook(_Caught.throw, with_kwargs=True)
    try:
        torch.func.functional_call(model, resized, (pixels,), options)
    except _Caught as caught:
        (hidden, *args), kwargs = caught.args
        return hidden, (tuple(args), kwargs)
    finally:
        hook.remove()
        for module, own in zip(checks, before, strict=True):
            module.image_size = own
    raise ValueError(f"{type(model).__name__} does not call its first layer: expected a plain ViT.")


def run_layer(layer: nn.Module, hidden: Tensor, arguments: Arguments, prompts: Tensor | None = None) -> Tensor:
    """What a layer makes of all tokens; with prompts (P, C) in front of them, which do not leave it."""
    (args, kwargs), count = arguments, 0
    if prompts is not None:
        if hidden.dim() != 3:
            raise ValueError("Prompts need tokens in a row, but this backbone keeps a grid: take another refiner.")
        count = len(prompts)
        hidden = torch.cat([prompts.to(hidden.dtype).expand(len(hidden), -1, -1), hidden], dim=1)  # (B, P + N, C)
    rotating: list[Any] = [module for module in layer.modules() if hasattr(module, "num_prefix_tokens")]
    try:
        for module in rotating:  # timm's rotary attention is told of the tokens in front of the patches
            module.num_prefix_tokens += count
        output = layer(hidden, *args, **kwargs)
    finally:
        for module in rotating:
            module.num_prefix_tokens -= count
    hidden = output[0] if isinstance(output, tuple) else output
    return hidden[:, count:] if count else hidden


def patch_convolution(model: nn.Module) -> nn.Conv2d | None:
    """The convolution that cuts a picture into patches."""
    return next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)


def find_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The column of layers: the first list of as many modules as the config says, of one class, that hold a norm."""
    expected = getattr(model.config, "num_hidden_layers", None)
    for column in model.modules():
        if not isinstance(column, (nn.ModuleList, nn.Sequential)) or len({type(layer) for layer in column}) != 1:
            continue
        has_norm = any("norm" in type(module).__name__.lower() for module in column[0].modules())
        if has_norm and len(column) == (expected or len(column)):
            return tuple(column)
    raise ValueError(f"{type(model).__name__} has no column of equal layers: expected a plain vision transformer.")


def hash_weights(model: nn.Module) -> str:
    """The first 16 hex digits of the SHA-256 over the names and bytes of all weights, in the order of names."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
