"""What stands beside Rein and SET: the baselines that a reviewer asks for. `refiners.py` knows them by name."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setlib.tokens import LowRankTokens, Refiner, TokenBranch

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


class WaveletTokens(Refiner):
    """FADA: tokens refine the low and the high half of a Haar transform over the patch grid, f + s * inverse(beta).

    The low band (content) has a branch as Rein's; the three high bands (style) share one whose similarities are
    instance normalised, per image, band and token; s is a learnable scalar from 1e-3. Queries come from the low tokens.
    Source: FADA (NeurIPS 2024), Sec. 3. Departures: the high bands share tokens of all C channels, and the similarities
    are normalised over positions, as SET's; the paper prints 11.65 M values at DINOv2-L, where this has 5.52 M. The
    released code (2.05 M) transforms reshaped memory, not the patch grid, and does not transform back.
    """

    linked = "low"

    def __init__(self, layers: Sequence[int], channels: int, num_tokens: int, rank: int, query_channels: int) -> None:
        super().__init__(layers, channels, query_channels)
        sizes = (len(layers), num_tokens, channels, rank)
        self.low = TokenBranch(LowRankTokens(*sizes), channels)
        self.high = TokenBranch(LowRankTokens(*sizes), channels, normalise="positions")
        self.scale = nn.Parameter(torch.tensor(1e-3))

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        bands, index = split_haar(features), self.layers.index(layer)  # (4, B, H', W', C)
        low = self.low(bands[0].flatten(1, 2), index)  # (B, H'W', C)
        high = self.high(bands[1:].flatten(0, 1).flatten(1, 2), index)  # (3 B, H'W', C)
        change = join_haar(
            torch.cat([low, high]).view_as(bands).to(bands.dtype), (features.shape[1], features.shape[2])
        )
        return features + (self.scale * change).to(features.dtype)


def split_haar(x: Tensor) -> Tensor:
    """One step of the Haar wavelet transform over the patch grid, orthonormal: four bands at half the resolution.

    x: (B, H, W, C); odd sides are lengthened by repeating their last patches. Returns (4, B, H', W', C), H' and W' half
    of H and W, rounded up: the mean of each 2 x 2 square (doubled), then its differences along W, along H and across.
    """
    x = x if x.dtype == torch.float64 else x.float()
    x = torch.cat([x, x[:, -1:]], 1) if x.shape[1] % 2 else x
    x = torch.cat([x, x[:, :, -1:]], 2) if x.shape[2] % 2 else x
    return _haar(x[:, 0::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 0::2], x[:, 1::2, 1::2])


def join_haar(bands: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `split_haar`; size: (H, W), which tells odd sides from even ones."""
    one, right, below, across = _haar(*bands)  # (B, H', W', C) each
    top, bottom = torch.stack([one, right], 3).flatten(2, 3), torch.stack([below, across], 3).flatten(2, 3)
    return torch.stack([top, bottom], 2).flatten(1, 2)[:, : size[0], : size[1]]


def _haar(one: Tensor, right: Tensor, below: Tensor, across: Tensor) -> Tensor:
    """Sums and differences over 2 x 2 squares, or over their four bands, (4, ...); its own inverse."""
    top, bottom, top_step, bottom_step = one + right, below + across, one - right, below - across
    return torch.stack([top + bottom, top_step + bottom_step, top - bottom, top_step - bottom_step]) / 2
