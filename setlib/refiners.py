"""Every refiner by name: Rein and SET (`tokens.py`, `variants.py`), and the baselines that a reviewer asks for.

All are trained with the same data, head, schedule and seeds. A new refiner is a class and its line in REFINERS.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setlib import variants
from setlib.files import nearest
from setlib.style import OCTAVES, SourceStyle
from setlib.tokens import Refiner, Rein, SpectralTokens
from setlib.wavelets import WaveletTokens

ADAPTER_SCALE = 0.1  # of what an adapter adds. Source: AdaptFormer, Sec. 4
QUERY_AND_VALUE = ("q_proj", "v_proj", "query", "value", "qkv")  # SAM and timm keep query, key and value in one map


class FullFineTuning(Refiner):
    """Every weight of the backbone that the features depend on learns, with a tenth of the head's learning rate.

    Source: Rein, Sec. 4.1 (the rates).
    """

    inside = True
    rate = 0.1

    def adapt(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        """Unfreezes the embeddings and the layers; what stands behind the layers (norm, pooler, neck) is not used."""
        named, in_layers = list(model.named_parameters()), {id(p) for layer in layers for p in layer.parameters()}
        last = max(place for place, (_, p) in enumerate(named) if id(p) in in_layers)
        for name, p in named[: last + 1]:
            p.requires_grad_(not name.endswith("mask_token"))

    def frozen_until(self, depth: int) -> int:
        """No layer is frozen."""
        return 0


class LowRankAdaptation(Refiner):
    """LoRA: query and value maps W x of the refined layers become W x + B A x, A and B of rank r, B = 0 at first.

    Where query, key and value are one map (SAM, most of timm), that map is changed, the key with it.
    Made by peft. Raises ValueError without it. Source: LoRA (ICLR 2022), Sec. 4, applied to query and value.
    """

    inside = True

    def __init__(self, layers: Sequence[int], lora_rank: int) -> None:
        super().__init__(layers)
        self.rank = lora_rank
        if importlib.util.find_spec("peft") is None:
            raise ValueError("Refiner lora needs the package peft: install it with pip install -e '.[lora]'.")

    def adapt(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        """Puts A and B into the layers. Raises ValueError if they have no query and value maps under a known name."""
        from peft import LoraConfig, inject_adapter_in_model

        chosen = {module for layer in self.layers for module in layers[layer - 1].modules()}
        names = [
            name
            for name, module in model.named_modules()
            if module in chosen and isinstance(module, nn.Linear) and name.rpartition(".")[2] in QUERY_AND_VALUE
            if getattr(model.get_submodule(name.rpartition(".")[0]), "q_bias", None) is None  # else read past the map
        ]
        if not names:
            expected = ", ".join(QUERY_AND_VALUE)
            raise ValueError(f"Refiner lora needs maps called {expected}: {type(model).__name__} calls none of them.")
        inject_adapter_in_model(LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=names), model)


class Prompts(Refiner):
    """VPT-deep: every refined layer reads learnable prompts of its own beside the tokens; they do not leave it.

    Source: VPT (ECCV 2022), Sec. 3.2, deep; initialised as there for patches of 16 pixels.
    """

    inside = True

    def __init__(self, layers: Sequence[int], channels: int, num_prompts: int) -> None:
        super().__init__(layers)
        bound = math.sqrt(6 / (3 * 16**2 + channels))
        self.tokens = nn.Parameter(torch.empty(len(self.layers), num_prompts, channels).uniform_(-bound, bound))

    def prompts(self, layer: int) -> Tensor:
        """(P, C) of a layer."""
        return self.tokens[self.layers.index(layer)]


class Adapters(Refiner):
    """AdaptFormer-style bottlenecks: f + 0.1 up(relu(down(f))) on the patches after a layer; up = 0 at first.

    Source: AdaptFormer (NeurIPS 2022), Sec. 3.2. Departure: behind the whole layer and on patches alone, where the
    paper's stands beside the layer's MLP and sees every token.
    """

    def __init__(self, layers: Sequence[int], channels: int, adapter_width: int) -> None:
        super().__init__(layers)
        downs = [nn.Linear(channels, adapter_width) for _ in self.layers]
        ups = [nn.Linear(adapter_width, channels) for _ in self.layers]
        self.down, self.up = nn.ModuleList(downs), nn.ModuleList(ups)
        for down, up in zip(downs, ups, strict=True):
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            for zeros in (down.bias, up.weight, up.bias):
                nn.init.zeros_(zeros)

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        index = self.layers.index(layer)
        return features + ADAPTER_SCALE * self.up[index](F.relu(self.down[index](features)))


class Options(NamedTuple):
    """What a refiner may be built with, beside its layers and channels; named as the fields of `experiment.Model`."""

    num_tokens: int = 100  # M, per layer
    rank: int = 16
    query_channels: int = 0  # width D of the queries for a mask head; 0 = none
    any_batch: bool = False  # lets set-released be evaluated at another batch size than it was trained with
    num_prompts: int = 150
    adapter_width: int = 64
    lora_rank: int = 8
    style_layers: Sequence[int] = (1, 2, 3)

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Of the refiners with tokens."""
        return self.num_tokens, self.rank, self.query_channels


def _released_set(layers: Sequence[int], channels: int, options: Options) -> Refiner:
    """SET as released: apart, in the room above that knows the releases, so it is imported when it is asked for."""
    from setlib.release.released_set import ReleasedSpectralTokens

    return ReleasedSpectralTokens(layers, channels, *options.tokens, options.any_batch)


Build = Callable[[Sequence[int], int, Options], Refiner]


def _tokens(kind: Callable[..., Refiner], **fixed: Any) -> Build:
    """How a refiner with tokens is built; fixed: what its name says beside its kind."""
    return lambda layers, channels, options: kind(layers, channels, *options.tokens, **fixed)


def _styled(build: Build, **fixed: Any) -> Build:
    """How a refiner is built behind whose first layers features have the style of the source; fixed: of the style."""

    def built(layers: Sequence[int], channels: int, options: Options) -> Refiner:
        refiner = build(layers, channels, options)
        refiner.style = SourceStyle(options.style_layers, channels, **fixed)
        return refiner

    return built


REFINERS: dict[str, Build] = {
    "none": lambda layers, channels, options: Refiner(),
    "full": lambda layers, channels, options: FullFineTuning(layers),
    "lora": lambda layers, channels, options: LowRankAdaptation(layers, options.lora_rank),
    "soma": lambda layers, channels, options: variants.MinorAdaptation(layers),
    "vpt": lambda layers, channels, options: Prompts(layers, channels, options.num_prompts),
    "adaptformer": lambda layers, channels, options: Adapters(layers, channels, options.adapter_width),
    "rein": _tokens(Rein),
    "fada": _tokens(WaveletTokens),
    "set": _tokens(SpectralTokens),
    "set-amplitude": _tokens(SpectralTokens, phase=False),
    "set-phase": _tokens(SpectralTokens, amplitude=False),
    "set-unnormalised": _tokens(SpectralTokens, normalise=""),
    "set-tokens": _tokens(SpectralTokens, normalise="tokens"),
    "set-channels": _tokens(variants.ChannelSpectra),
    "set-space": _tokens(variants.SpaceResidual),
    "set-phasor": _tokens(variants.PhasorTokens),
    "set-cosine": _tokens(variants.CosineTokens),
    "set-dct": _tokens(variants.CosineTransformTokens),
    "set-placebo": _tokens(variants.RandomBasisTokens),
    "set-released": _released_set,
    "style": _styled(lambda layers, channels, options: Refiner()),
    "style-bands": _styled(lambda layers, channels, options: Refiner(), edges=OCTAVES),
    "style-gains": _styled(lambda layers, channels, options: Refiner(), edges=OCTAVES, gains=True),
    "rein-style": _styled(_tokens(Rein)),
    "set-style": _styled(_tokens(SpectralTokens)),
    "set-style-placebo": _styled(_tokens(variants.RandomBasisTokens), scrambled=True),
}


def build_refiner(name: str, layers: Sequence[int], channels: int, *options: Any, **named: Any) -> Refiner:
    """The refiner called `name` for features of C channels; layers: that it refines, from 1; options: of `Options`.

    Raises ValueError for an unknown name (the nearest are listed) and for lora without peft.
    """
    if name not in REFINERS:
        raise ValueError(f"Unknown refiner '{name}' ({nearest(name, REFINERS)}).")
    return REFINERS[name](layers, channels, Options(*options, **named))
