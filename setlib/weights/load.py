"""The frozen model behind a name: a preset, a folder, a weight file, the hub's cache, the hub.

Every road ends in a frozen transformers model in eval mode, or in one sentence that says what to fetch and where
to put it; nothing waits for a dead network and no pickle runs (safetensors first, else tensors alone).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from pathlib import Path

import torch
from torch import nn

from setlib.backbone import IMAGENET, FrozenBackbone
from setlib.files import hub_answers, small
from setlib.weights.convert import check_complete, from_file, quiet, reason, resize_patches
from setlib.weights.presets import SALIENCY, TINY, cached_file, check_name, hub_id
from setlib.weights.saliency import saliency_folder


def load_backbone(name: str, patch_size: int = 0) -> FrozenBackbone:
    """The frozen backbone of a preset, folder, file or hub id; see `load_model`.

    patch_size: pixels, to resize its patches to, see `convert.resize_patches`; 0 keeps them.
    """
    model = load_model(name)
    if patch_size:
        resize_patches(model, patch_size)
    return FrozenBackbone(model, name, *normalisation(name))


def load_model(name: str, seed: int = 0) -> nn.Module:
    """A frozen vision transformer in eval mode, float32.

    name: a preset; a folder with config.json and weights; a weight file in Meta's or timm's layout; or a hub id
    `org/name` (the hub's local cache first, then the hub if it answers within 3 s).
    seed: draws the weights of `tiny-random`; the global random state is left as it was.

    Raises ValueError if the name is unknown or its weights cannot be had here; the message says what to do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        path = saliency_folder() if name == SALIENCY else Path(os.path.expanduser(name))
        if name == TINY:
            model = _tiny_random()
        elif path.is_dir():
            model = _from_folder(path)
        elif path.is_file():
            model = from_file(path)
        else:
            check_name(name)
            model = _from_hub(hub_id(name))
    if hasattr(model.config, "vision_config"):  # CLIP and SigLIP bring a text tower, SAM a mask decoder
        model = getattr(model, "vision_model", None) or getattr(model, "vision_encoder", model)
    return model.float().eval().requires_grad_(False)  # files in half precision too: autocast decides what runs in it


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (R, G, B) of the images, in [0, 1], that the backbone was trained on.

    Read from the model's preprocessor_config.json (timm: config.json); the two presets of ours, and models without
    one, take ImageNet's.
    """
    if name in (TINY, SALIENCY):
        return IMAGENET
    path = cached_file(name, "preprocessor_config.json") or cached_file(name, "config.json")
    try:
        stored = json.loads(small(path)) if path else {}
        timm = stored.get("pretrained_cfg") or {}
        given = [stored.get(f"image_{key}") or timm.get(key) or () for key in ("mean", "std")]
        mean, std = (tuple(float(one) for one in values) for values in given)
    except (ValueError, AttributeError, TypeError, ArithmeticError, RecursionError):
        raise ValueError(f"{path} cannot be read as the settings of a model: fetch it anew.") from None
    if not mean:
        warnings.warn(f"{name} has no preprocessor_config.json: ImageNet's mean and deviation are used", stacklevel=2)
    mean, std = mean or IMAGENET[0], std or IMAGENET[1]
    if not len(mean) == len(std) == 3 or not all(0 < s < math.inf for s in std):
        raise ValueError(f"{path} gives the mean {mean} and deviation {std}: expected three numbers each, std above 0.")
    return mean, std


def _tiny_random() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, patch_size=8, image_size=64)
    # At the library's deviation of 0.02 a layer hardly changes its input; this one keeps the variance.
    return Dinov2Model(Dinov2Config(**sizes, initializer_range=32**-0.5, layerscale_value=1.0))


def _from_folder(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json: expected a folder written by transformers' save_pretrained; a weight file"
            " in Meta's or timm's layout is named itself."
        )
    try:
        return _pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged or foreign folder makes its readers say
        raise ValueError(f"{folder} holds no model that can be used: {reason(error)}.") from error


def _from_hub(name: str) -> nn.Module:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    cache, hub = constants.HF_HUB_CACHE, constants.ENDPOINT
    try:
        return _pretrained(name, local_files_only=True)
    except OSError:
        pass  # not in the cache, or not whole
    except Exception as error:
        raise ValueError(f"The copy of {name} in the cache {cache} cannot be used: {reason(error)}.") from error
    if constants.HF_HUB_OFFLINE or not hub_answers(f"{hub}/{name}/resolve/main/config.json"):
        raise ValueError(
            f"{name} is neither a folder here nor in the cache {cache}, and {hub} does not answer: run 'hf download"
            f" {name} --local-dir FOLDER' where there is a network, copy FOLDER here and name it instead, or use"
            f" {SALIENCY}."
        )
    try:
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(name, "preprocessor_config.json")  # for `normalisation`
        return _pretrained(name, local_files_only=False)
    except Exception as error:
        raise ValueError(f"{name} cannot be loaded from {hub}: {reason(error)}.") from error


def _pretrained(source: str | Path, local_files_only: bool) -> nn.Module:
    """A model of transformers, from safetensors, else from a .bin that is read as weights alone."""
    from transformers import AutoConfig, AutoModel

    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else the hub is asked to convert a .bin
    # A model that brings code of its own is refused.
    options = {"local_files_only": local_files_only, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(source, **options)
    if config.model_type == "timm_wrapper":
        config.model_args = {**(config.model_args or {}), "dynamic_img_size": True}
    options |= {"config": config, "weights_only": True, "output_loading_info": True}
    with quiet() if local_files_only else contextlib.nullcontext():  # downloads keep their bar
        model, report = AutoModel.from_pretrained(source, **options)
    check_complete(report)
    return model
