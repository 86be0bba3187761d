"""Weights in other libraries' layouts as models of transformers: an ONNX graph, files with Meta's or timm's names."""

from __future__ import annotations

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from setlib._families import patch_convolution

if TYPE_CHECKING:  # transformers takes 3 s to import
    from transformers import PreTrainedModel

WRAPPERS = ("model", "state_dict", "teacher", "student")  # what training scripts put their weights into
UNUSED = re.compile(r"(decoder\w*|head\w*|fc_norm|mask_token|dino_head|ibot_head)\b")  # nothing that features need
SIGNS = {"rope_embed": "DINOv3", "rel_pos": "SAM", "attn.q_proj": "EVA-02", "inner_attn": "EVA-02"}  # of other layouts
CONFUSED = (AttributeError, LookupError, RuntimeError, TypeError)  # what tensors of unexpected shapes lead to
# Missing, these change no feature: what stands behind the layers or in another tower, and the token of masked training.
UNNEEDED = re.compile(r"mask_token|pooler|head|decoder|text|logit|layernorm\.|layer_norm\.|(^|\.)norm\.|neck")
HEADS = {1280: 16, 1408: 16, 1664: 16}  # of ViT-H, -g and -G; heads are 64 wide in all others
EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "reg_token": "embeddings.register_tokens",  # timm
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
DINOV2 = {  # names in a block; transformers still reads these, its first ones
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
VIT = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def resize_patches(model: nn.Module, size: int) -> None:
    """Gives a model patches of another size, in place: its patch kernel is resized, bicubically; positions, which are
    fitted to the grid in every call, follow.

    The kernel is not divided by its larger area, as released tokens and heads were trained so; from 14 to 16 pixels the
    features of `dinov2-small-saliency` keep a cosine of 0.95 with the same scene's at 14 (0.98 in the last layer).
    Raises ValueError if the patches are not cut by a convolution. Source: Rein's released conversion.
    """
    projection = patch_convolution(model)
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


def from_file(path: Path) -> PreTrainedModel:
    """The vision transformer in a weight file with Meta's or timm's names: DINOv2 (with registers, with SwiGLU), and
    plain ViTs such as MAE's and DINO's. Sizes are read off the weights; the number of heads follows from the width.

    Raises ValueError if the file cannot be read or holds something else.
    """
    tensors = read_tensors(path)
    try:
        return _build(*_renamed(_vit_weights(tensors)))
    except (ValueError, *CONFUSED) as error:
        text = reason(error) if isinstance(error, ValueError | RuntimeError) else "its tensors do not fit together"
        raise ValueError(f"{path} is no vision transformer that can be used: {text}.") from error


def _renamed(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], int, bool]:
    """The weights under the names that transformers reads, the number of blocks, and whether they are DINOv2's."""
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    is_dinov2 = "blocks.0.ls1.gamma" in weights
    inner = DINOV2 if is_dinov2 else VIT
    packed, back = (weights.get(f"blocks.0.mlp.fc{n}.weight") for n in (1, 2))
    if is_dinov2 and packed is not None and len(packed) == 2 * back.shape[1]:
        inner = inner | {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}  # SwiGLU as timm packs it
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if name in EMBEDDINGS:
            made[EMBEDDINGS[name]] = value
        elif block and block[2].startswith("attn.qkv."):
            kind = block[2].rpartition(".")[2]
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                made[f"encoder.layer.{block[1]}.attention.attention.{part}.{kind}"] = third.contiguous()
        elif block:
            old = next((old for old in inner if f"{block[2]}.".startswith(f"{old}.")), block[2])
            made[f"encoder.layer.{block[1]}.{inner.get(old, old)}{block[2].removeprefix(old)}"] = value
        elif not UNUSED.match(name):
            made[name] = value  # the model will not know it, and it is named then
    _complete_positions(made)
    return made, len(blocks), is_dinov2


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, or of a .pth or .bin read as weights only. Raises ValueError if it cannot be."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes its reader say
        raise ValueError(
            f"{path} cannot be read ({reason(error)}): expected safetensors or a .pth of tensors."
        ) from error
    values = values if isinstance(values, dict) else {}
    while inner := next((values[key] for key in WRAPPERS if isinstance(values.get(key), dict)), None):
        values = inner
    return {name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, Tensor)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bar of copying weights and its table of what does not fit: our errors say it."""
    from transformers.utils import logging

    has_bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()


def reason(error: Exception) -> str:
    """Why weights cannot be read, in few words; torch's own advice would be to unpickle them."""
    text = " ".join(str(error).split())
    if isinstance(error, UnpicklingError) or "weights_only" in text or not text:
        return "it is damaged or holds more than tensors"
    if "ignore_mismatched_sizes" in text:
        return "the sizes of its tensors do not fit"
    return re.split(r"\.\s", text)[0].rstrip(".")


def _vit_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the vision transformer under its own names, whatever holds it."""
    mark = "patch_embed.proj.weight"
    holders = [name.removesuffix(mark) for name in tensors if name.endswith(mark)]
    if not holders:
        raise ValueError(
            f"it has no {mark}, as DINOv2 in Meta's layout and timm's names have it; a model of transformers is named"
            " by its folder, with its config.json"
        )
    weights = {name.removeprefix(holders[0]): value for name, value in tensors.items() if name.startswith(holders[0])}
    for sign, what in SIGNS.items():
        if any(sign in name for name in weights):
            raise ValueError(f"it looks like {what} in its original layout: name its preset or hub id instead")
    return weights


def _complete_positions(made: dict[str, Tensor]) -> None:
    """Positions of class token and grid: timm adds the first to the token itself where there are registers."""
    positions = made.get("embeddings.position_embeddings")
    if positions is None or "embeddings.cls_token" not in made:
        raise ValueError("it has no class token or no positions")
    count = positions.shape[1]
    if math.isqrt(count) ** 2 == count:
        made["embeddings.position_embeddings"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
    elif math.isqrt(count - 1) ** 2 != count - 1:
        raise ValueError(f"it has {count} positions, which are not those of a square grid and a class token")


def _build(made: dict[str, Tensor], depth: int, is_dinov2: bool) -> PreTrainedModel:
    """The model of these weights. Raises ValueError naming what is missing or left over."""
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        ViTConfig,
        ViTModel,
    )

    width, _, patch, _ = made["embeddings.patch_embeddings.projection.weight"].shape
    registers, first = made.get("embeddings.register_tokens"), "encoder.layer.0"
    if width % 64:
        raise ValueError(f"it is {width} wide, no multiple of 64, the width of an attention head")
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS.get(width, width // 64),
        "patch_size": patch,
        "image_size": patch * math.isqrt(made["embeddings.position_embeddings"].shape[1] - 1),
        "layer_norm_eps": 1e-6,
        "qkv_bias": f"{first}.attention.attention.query.bias" in made,
    }
    if not is_dinov2:
        sizes["intermediate_size"] = len(made[f"{first}.intermediate.dense.weight"])
        config, kind, options = ViTConfig(**sizes), ViTModel, {"add_pooling_layer": False}
    else:
        made["embeddings.mask_token"], options = torch.zeros(1, width), {}  # only masked training uses it
        sizes["use_swiglu_ffn"] = f"{first}.mlp.weights_in.weight" in made
        if not sizes["use_swiglu_ffn"]:
            sizes["mlp_ratio"] = len(made[f"{first}.mlp.fc1.weight"]) // width
        config, kind = Dinov2Config(**sizes), Dinov2Model
        if registers is not None:
            sizes["num_register_tokens"] = registers.shape[1]
            config, kind = Dinov2WithRegistersConfig(**sizes), Dinov2WithRegistersModel
    with quiet():
        model, report = kind.from_pretrained(None, config=config, state_dict=made, output_loading_info=True, **options)
    check_complete(report)
    if left := sorted(report["unexpected_keys"]):
        raise ValueError(f"{', '.join(left[:5])} left over for {kind.__name__}")
    return model


def check_complete(report: dict) -> None:
    """Raises ValueError if weights that features depend on are missing in what transformers says of its loading."""
    if missing := sorted(name for name in report["missing_keys"] if not UNNEEDED.search(name)):
        raise ValueError(f"{', '.join(missing[:5])} missing ({len(missing)} in all)")


def convert_onnx(onnx: bytes, folder: Path) -> None:
    """Writes the DINOv2 encoder in an ONNX graph to a folder that transformers loads.

    All sizes are read off the weights; heads are 64 wide, as in every DINOv2. Linear weights stand transposed in
    the graph and are named by the node that uses them; the position embedding is split in class token and grid.
    """
    from transformers import Dinov2Config

    graph = _message(_message(memoryview(onnx))[7][0])
    modules = {}  # weight -> the module that multiplies by it
    for node in map(_message, graph[1]):
        for source in node[1]:
            modules[str(source, "utf-8")] = str(node[3][0], "utf-8").removesuffix("/MatMul").replace("/", ".")
    weights, position = {}, {}
    for tensor in map(_message, graph[5]):
        name = str(tensor[8][0], "utf-8")
        if tensor[2] != [1] or not (name.startswith("backbone.") or "backbone" in modules.get(name, "")):
            continue  # not float32, or of the saliency decoder
        value = torch.from_numpy(np.frombuffer(tensor[9][0], "<f4").reshape(tensor[1]).copy())
        if name.startswith("backbone."):
            weights[name.removeprefix("backbone.")] = value
        elif value.dim() == 2:
            weights[modules[name].removeprefix(".backbone.") + ".weight"] = value.T.contiguous()
        else:
            position["class" if value.shape[1] == 1 else "grid"] = value  # (1, 1, C), (1, N, C)
    patch, width = weights["embeddings.patch_embeddings.projection.weight"], weights["embeddings.cls_token"].shape[-1]
    weights["embeddings.position_embeddings"] = torch.cat([position["class"], position["grid"]], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)  # only masked training uses it
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("norm1.weight") for name in weights),
        num_attention_heads=max(1, width // 64),
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.bias"].numel() // width,
        patch_size=patch.shape[-1],
        image_size=patch.shape[-1] * math.isqrt(position["grid"].shape[1]),
    )
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # a cache folder may be shared by a class


def _message(data: memoryview) -> dict[int, list[int | memoryview]]:
    """The fields of a protobuf message by number: integers, or the bytes of strings, arrays and inner messages."""
    fields, place = defaultdict(list), 0
    while place < len(data):
        key, place = _varint(data, place)
        value, place = (0, place) if key & 7 in (1, 5) else _varint(data, place)
        if key & 7:  # 2: so many bytes follow; 1 and 5: fixed sizes
            size = {1: 8, 2: value, 5: 4}[key & 7]
            value, place = data[place : place + size], place + size
        fields[key >> 3].append(value)
    return fields


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """The integer of 7-bit groups, lowest first, that starts at `place`, and the place after it."""
    value = shift = 0
    while True:
        byte, place = data[place], place + 1
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, place
