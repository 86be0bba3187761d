"""Weights in other layouts as models of transformers: files with Meta's or timm's names, patches of another size."""

from __future__ import annotations

import contextlib
import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from setlib._families import patch_convolution

WRAPPERS = ("model", "state_dict", "teacher", "student")  # what training scripts put their weights into
UNUSED = re.compile(r"(decoder\w*|head\w*|fc_norm|mask_token|dino_head|ibot_head)\b")  # nothing that features need
SIGNS = {"rope_embed": "DINOv3", "rel_pos": "SAM", "attn.q_proj": "EVA-02", "inner_attn": "EVA-02"}  # of other layouts
# Missing, these change no feature: what stands behind the layers or in another tower, and the token of masked training.
UNNEEDED = re.compile(r"mask_token|pooler|head|decoder|text|logit|layernorm\.|layer_norm\.|(^|\.)norm\.|neck")
HEADS = {1280: 16, 1408: 16, 1664: 16}  # of ViT-H, -g and -G; heads are 64 wide in all others

# Meta's and timm's names, and those that transformers reads; # is a number. Query, key and value are split before.
QUERY_KEY_VALUE = ("attn.query.", "attn.key.", "attn.value.")
NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "reg_token": "embeddings.register_tokens",  # timm
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "blocks.#.attn.proj": "encoder.layer.#.attention.output.dense",
    "blocks.#.attn": "encoder.layer.#.attention.attention",
}
DINOV2 = NAMES | {
    "blocks.#.ls1.gamma": "encoder.layer.#.layer_scale1.lambda1",
    "blocks.#.ls2.gamma": "encoder.layer.#.layer_scale2.lambda1",
    "blocks.#.mlp.w12": "encoder.layer.#.mlp.weights_in",
    "blocks.#.mlp.w3": "encoder.layer.#.mlp.weights_out",
    "blocks.#": "encoder.layer.#",
}
VIT = NAMES | {
    "blocks.#.norm1": "encoder.layer.#.layernorm_before",
    "blocks.#.norm2": "encoder.layer.#.layernorm_after",
    "blocks.#.mlp.fc1": "encoder.layer.#.intermediate.dense",
    "blocks.#.mlp.fc2": "encoder.layer.#.output.dense",
}
TIMM_SWIGLU = {"blocks.#.mlp.fc1": "blocks.#.mlp.w12", "blocks.#.mlp.fc2": "blocks.#.mlp.w3"}


def resize_patches(model: nn.Module, size: int) -> None:
    """Gives a model patches of another size, in place, by resizing its patch kernel, bicubically.

    Positions, which are fitted to the grid in every call, follow.

    The kernel is not divided by its larger area, as released tokens and heads were trained so; from 14 to 16 pixels the
    features of `dinov2-small-saliency` keep a cosine of 0.95 with the same scene's at 14 (0.98 in the last layer).
    Raises ValueError if the patches are not cut by a convolution. Source: Rein's released conversion.
    """
    projection = patch_convolution(model)
    if projection is None:
        raise ValueError(f"{type(model).__name__} cuts its patches without a convolution: leave model.patch_size at 0.")
    kernel = F.interpolate(projection.weight.float(), (size, size), mode="bicubic", align_corners=False)
    projection.weight = nn.Parameter(kernel.to(projection.weight.dtype), requires_grad=projection.weight.requires_grad)
    projection.kernel_size = projection.stride = (size, size)
    for holder in (model.config, *model.modules()):
        if isinstance(before := getattr(holder, "patch_size", None), int | tuple | list):
            holder.patch_size = size if isinstance(before, int) else (size, size)


def from_file(path: Path) -> nn.Module:
    """The vision transformer in a weight file with Meta's or timm's names.

    DINOv2 (with registers, with SwiGLU), and plain ViTs such as MAE's and DINO's. Sizes are read off the weights; the
    number of heads follows from the width.

    Raises ValueError if the file cannot be read or holds something else.
    """
    tensors = read_tensors(path)
    try:
        return build_model(_renamed(tensors))
    except Exception as error:  # whatever tensors of unexpected names and shapes lead to
        known = isinstance(error, ValueError | RuntimeError)
        text = reason(error) if known else "its tensors do not fit together"
        raise ValueError(f"{path} is no vision transformer that can be used: {text}.") from error


def build_model(weights: dict[str, Tensor]) -> nn.Module:
    """The DINOv2 (with registers) or ViT of weights under the names that transformers reads; sizes are read off them.

    Raises ValueError naming what is missing or left over; tensors that do not fit together raise what they may.
    """
    from transformers import MODEL_MAPPING, AutoConfig

    width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    if width % 64:
        raise ValueError(f"it is {width} wide, no multiple of 64, the width of an attention head")
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": count_layers(weights, "encoder.layer."),
        "num_attention_heads": HEADS.get(width, width // 64),
        "patch_size": patch,
        "image_size": patch * math.isqrt(weights["embeddings.position_embeddings"].shape[1] - 1),
        "layer_norm_eps": 1e-6,
        "qkv_bias": "encoder.layer.0.attention.attention.query.bias" in weights,
    }
    family, options = "dinov2", {}
    if "encoder.layer.0.layer_scale1.lambda1" not in weights:
        family, options = "vit", {"add_pooling_layer": False}
        sizes["intermediate_size"] = len(weights["encoder.layer.0.intermediate.dense.weight"])
    else:
        weights = weights | {"embeddings.mask_token": torch.zeros(1, width)}  # only masked training uses it
        sizes["use_swiglu_ffn"] = "encoder.layer.0.mlp.weights_in.weight" in weights
        if not sizes["use_swiglu_ffn"]:
            sizes["mlp_ratio"] = len(weights["encoder.layer.0.mlp.fc1.weight"]) // width
        if "embeddings.register_tokens" in weights:
            family = "dinov2_with_registers"
            sizes["num_register_tokens"] = weights["embeddings.register_tokens"].shape[1]
    config = AutoConfig.for_model(family, **sizes)
    kind = MODEL_MAPPING[type(config)]
    options |= {"config": config, "state_dict": weights, "output_loading_info": True}
    with quiet():
        model, report = kind.from_pretrained(None, **options)
    check_complete(report)
    if left := sorted(report["unexpected_keys"]):
        raise ValueError(f"{', '.join(left[:5])} left over for {kind.__name__}")
    return model


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the vision transformer, whatever holds it, under the names that transformers reads."""
    mark = "patch_embed.proj.weight"
    holder = next((name.removesuffix(mark) for name in tensors if name.endswith(mark)), None)
    if holder is None:
        raise ValueError(
            f"it has no {mark}, as DINOv2 in Meta's layout and timm's names have it; a model of transformers is named"
            " by its folder, with its config.json"
        )
    weights = under(tensors, holder)
    for sign, what in SIGNS.items():
        if any(sign in name for name in weights):
            raise ValueError(f"it looks like {what} in its original layout: name its preset or hub id instead")
    weights = {name: value for name, value in weights.items() if not UNUSED.match(name)}
    weights = split_three(weights, "attn.qkv.", QUERY_KEY_VALUE)
    is_dinov2 = "blocks.0.ls1.gamma" in weights
    first, second = (weights.get(f"blocks.0.mlp.fc{n}.weight") for n in (1, 2))
    if is_dinov2 and first is not None and len(first) == 2 * second.shape[1]:
        weights = rename(weights, TIMM_SWIGLU)
    weights = rename(weights, DINOV2 if is_dinov2 else VIT)
    positions = weights["embeddings.position_embeddings"]
    count = positions.shape[1]
    if math.isqrt(count) ** 2 == count:  # timm adds the class token's to the token itself where there are registers
        weights["embeddings.position_embeddings"] = F.pad(positions, (0, 0, 1, 0))
    elif math.isqrt(count - 1) ** 2 != count - 1:
        raise ValueError(f"it has {count} positions, which are not those of a square grid and a class token")
    return weights


# Files of tensors, and their names


class Inert:
    """What stands for every object of a file that is no tensor: nothing in it is run or kept."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        """Takes anything."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None: ...


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors, .pth or .bin, however nested; unpickles nothing. ValueError for another file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        is_zip = zipfile.is_zipfile(path)  # else of torch before 1.6
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes its reader say
        raise ValueError(f"{path} cannot be read ({reason(error)}): expected safetensors or .pth of tensors.") from None
    values = values if isinstance(values, dict) else {}
    while inner := next((values[key] for key in WRAPPERS if isinstance(values.get(key), dict)), None):
        values = inner
    return {name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, Tensor)}


def rename(tensors: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """Tensors whose name starts as the table says (# is a number) under the new name; all others keep theirs."""
    patterns = [
        (re.compile(re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)"), new.replace("#", r"\1"))
        for old, new in table.items()
    ]
    made = {}
    for name, value in tensors.items():
        fitting = (pattern.sub(new, name, count=1) for pattern, new in patterns if pattern.match(name))
        made[next(fitting, name)] = value
    return made


def split_three(tensors: dict[str, Tensor], packed: str, parts: Sequence[str]) -> dict[str, Tensor]:
    """Query, key and value, one below the other under a name with `packed` in it, as tensors of their own."""
    made = {}
    for name, value in tensors.items():
        if packed not in name:
            made[name] = value
            continue
        for part, third in zip(parts, value.chunk(3), strict=True):
            made[name.replace(packed, part)] = third.contiguous()
    return made


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def count_layers(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow the prefix in names such as prefix0.weight."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


# What transformers says when it loads


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


def check_complete(report: dict) -> None:
    """Raises ValueError if weights that features depend on are missing in what transformers says of its loading."""
    if missing := sorted(name for name in report["missing_keys"] if not UNNEEDED.search(name)):
        raise ValueError(f"{', '.join(missing[:5])} missing ({len(missing)} in all)")


def reason(error: Exception) -> str:
    """Why weights cannot be read, in few words; torch's own advice would be to unpickle them."""
    text = " ".join(str(error).split())
    if isinstance(error, UnpicklingError) or "weights_only" in text or not text:
        return "it is damaged or holds more than tensors"
    if isinstance(error, ImportError) and "timm" in text:
        return "it needs the package timm: install it with pip install -e '.[timm]'"
    if "ignore_mismatched_sizes" in text:
        return "the sizes of its tensors do not fit"
    return re.split(r"\.\s", text)[0].rstrip(".")
