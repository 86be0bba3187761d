"""Learnable tokens that change the features between the frozen layers: Rein and SET.

A refiner is called as `refiner(features: (B, H, W, C), layer)` for each of its `layers` (counted from 1) and returns
refined features of the same shape; `refiner.queries()` gives its tokens to a mask head. Every refiner by name, and
those that work without tokens, are in `refiners.py`. Nothing here knows of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Fast forms of two functions of `spectral.py`, equal to their definitions there to 1e-6
from setlib._kernels import join_spectrum, split_spectrum
from setlib.spectral import Spectrum, change_phase
from setlib.style import SourceStyle


class Refiner(nn.Module):
    """Base of all refiners; by itself it refines nothing and returns the frozen features as they are."""

    inside = False  # works inside its layers (on what they read, or on their weights) instead of behind them
    rate = 1.0  # learning rate in units of the head's; `train.refiner_rates` sets others. Source: Rein's and SET's code
    adapt: Callable[[nn.Module, Sequence[nn.Module]], object] | None = None  # changes weights in a copy of the backbone
    prompts: Callable[[int], Tensor] | None = None  # (P, C) tokens that layer number i reads beside its own
    linked = ""  # the branch whose tokens make the queries of a mask head
    any_batch = False  # `set-released`: see there

    def __init__(self, layers: Sequence[int] = (), channels: int = 0, query_channels: int = 0) -> None:
        """layers: numbers, from 1, of those that are refined. query_channels: width D of the queries; 0 = none."""
        super().__init__()
        self.layers = tuple(layers)
        self.style: SourceStyle | None = None  # what features behind some first layers are brought to
        self.query_map = TokenQueries(channels, query_channels) if query_channels else None

    def frozen_until(self, depth: int) -> int:
        """Number of first layers, of `depth`, whose own output nothing trainable can change."""
        if not self.layers:
            return depth
        return min(self.layers) - 1 if self.inside else min(self.layers)

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), after frozen layer `layer` (counted from 1)."""
        return features

    def branches(self) -> dict[str, TokenBranch]:
        """The branches of tokens by name: "patches", or "amplitude" before "phase"."""
        return {name: child for name, child in self.named_children() if isinstance(child, TokenBranch)}

    def queries(self) -> Tensor | None:
        """Queries (M, D) for a mask head, made from the linked tokens of all layers; None where there are none."""
        return None if self.query_map is None else self.query_map(self.branches()[self.linked].tokens())


class LowRankTokens(nn.Module):
    """M tokens of C channels for each of L layers, T = A B with rank r. Source: Rein, Sec. 3.4; SET uses the same."""

    def __init__(self, num_layers: int, num_tokens: int, channels: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(num_layers, num_tokens, rank))
        self.b = nn.Parameter(torch.empty(num_layers, rank, channels))
        bound = math.sqrt(6 / (3 * 16**2 + math.sqrt(channels * rank)))
        nn.init.uniform_(self.a, -bound, bound)
        nn.init.uniform_(self.b, -bound, bound)

    def forward(self) -> Tensor:
        """Tokens of all layers, (L, M, C)."""
        return self.a @ self.b

    def of_layer(self, index: int) -> Tensor:
        """Tokens of one layer, (M, C)."""
        return self.a[index] @ self.b[index]


class TokenBranch(nn.Module):
    """Learnable tokens of one layer stack that refine a set of vectors (patches, or spectral positions).

    Every position x attends to the tokens, beta(x) = MLP(softmax(x T^t / sqrt(C)) MLP(T) + x); the MLPs are one Linear
    each, shared by all layers. Token 0 only absorbs attention: a position may attend to nothing.
    normalise = "positions": the similarities are instance normalised in place of the division by sqrt(C), per image and
    token over all positions, so that the style-dependent level of an image's amplitudes does not drive the attention;
    "tokens" (`set-tokens`, `set-released`): over the tokens of a position and then divided: all but uniform attention.
    Source: Rein, Sec. 3.3; SET, Sec. 3.2, normalised Sec. 3.3 (the paper does not name the axis).
    """

    def __init__(self, tokens: LowRankTokens, channels: int, normalise: str = "", zero: bool = False) -> None:
        super().__init__()
        self.tokens, self.normalise = tokens, normalise
        self.token_map = nn.Linear(channels, channels)
        self.delta_map = nn.Linear(channels, channels)
        nn.init.kaiming_uniform_(self.token_map.weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.delta_map.weight, a=math.sqrt(5))
        if zero:  # beta = 0 at step 0: training starts at the frozen backbone
            nn.init.zeros_(self.delta_map.weight)
            nn.init.zeros_(self.delta_map.bias)

    def attention(self, x: Tensor, index: int) -> Tensor:
        """Share of each token, (B, P, M), sums to 1 over the tokens; x: (B, P, C), P positions."""
        return self._attend(x, self.tokens.of_layer(index))

    def _attend(self, x: Tensor, tokens: Tensor) -> Tensor:
        similarity = x @ tokens.T  # (B, P, M)
        if self.normalise == "positions":
            similarity = similarity.transpose(1, 2)  # (B, M, P)
            return F.layer_norm(similarity, similarity.shape[-1:]).transpose(1, 2).softmax(-1)
        if self.normalise == "tokens":
            similarity = F.layer_norm(similarity, similarity.shape[-1:])
        return (similarity / math.sqrt(x.shape[-1])).softmax(-1)

    def forward(self, x: Tensor, index: int) -> Tensor:
        """beta(x), (B, P, C) -> (B, P, C); index: place of the layer in the stack, from 0."""
        tokens = self.tokens.of_layer(index)  # (M, C)
        values = self.token_map(tokens[1:])  # (M - 1, C)
        mixed = self._attend(x, tokens)[..., 1:] @ values  # (B, P, C)
        return self.delta_map(mixed + x)


class TokenQueries(nn.Module):
    """Queries for a mask head: tokens of all layers, projected, pooled over the layers (max, mean, last), merged.

    Source: Rein, Sec. 3.3, with the order of its released code (max, mean and last side by side for each channel).
    """

    def __init__(self, channels: int, query_channels: int) -> None:
        super().__init__()
        self.transform = nn.Linear(channels, query_channels)
        self.merge = nn.Linear(3 * query_channels, query_channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(L, M, C) -> (M, D)."""
        tokens = self.transform(tokens)  # (L, M, D)
        pooled = torch.stack([tokens.amax(0), tokens.mean(0), tokens[-1]], dim=-1)  # (M, D, 3)
        return self.merge(pooled.flatten(1))


class Rein(Refiner):
    """f + s * beta(f) on the patches themselves, s a learnable scalar from 1e-3. Source: Rein (CVPR 2024), Sec. 3.3."""

    linked, start = "patches", 1e-3  # of s

    def __init__(self, layers: Sequence[int], channels: int, num_tokens: int, rank: int, query_channels: int) -> None:
        super().__init__(layers, channels, query_channels)
        self.patches = TokenBranch(LowRankTokens(len(layers), num_tokens, channels, rank), channels)
        self.scale = nn.Parameter(torch.tensor(self.start))

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        delta = self.patches(features.flatten(1, 2), self.layers.index(layer))  # (B, N, C)
        return features + self.scale * delta.view_as(features)


class SpectralTokens(Refiner):
    """SET: tokens refine amplitude and phase of the features over the patch grid, each beta(x) + x.

    Each part has tokens and maps of its own; the attention of the amplitude alone is normalised. For ablation
    `amplitude=False` or `phase=False` leaves a part as it is, `normalise=""` leaves the normalisation out.
    Source: SET, Sec. 3.1-3.3. Departures: the output maps start at zero, so that at step 0 the features pass unchanged;
    the refined amplitude is kept >= 0 and the change of phase odd, so that the spectrum stays that of a real signal.
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: int,
        num_tokens: int,
        rank: int,
        query_channels: int,
        amplitude: bool = True,
        phase: bool = True,
        normalise: str = "positions",
    ) -> None:
        super().__init__(layers, channels, query_channels)
        self.linked = "phase" if phase else "amplitude"
        sizes = (len(layers), num_tokens, channels, rank)
        self.amplitude = TokenBranch(LowRankTokens(*sizes), channels, normalise, zero=True) if amplitude else None
        self.phase = TokenBranch(LowRankTokens(*sizes), channels, zero=True) if phase else None

    def refine_spectrum(self, features: Tensor, layer: int) -> Spectrum:
        """The refined half spectrum of features (B, H, W, C): amplitude >= 0, and phase in radians (not wrapped)."""
        amplitude, phase = split_spectrum(features)  # (B, H, W // 2 + 1, C) each
        index, shape = self.layers.index(layer), amplitude.shape
        if self.phase is not None:
            change = self.phase(phase.flatten(1, 2), index).view(shape)  # each bin (u, v) is a position
            phase = change_phase(phase, change, features.shape[2])  # beta(rho) + rho
        if self.amplitude is not None:
            change = self.amplitude(amplitude.flatten(1, 2), index).view(shape)
            amplitude = (amplitude + change).relu_()  # beta(alpha) + alpha
        return Spectrum(amplitude, phase)

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        size = (features.shape[1], features.shape[2])
        return join_spectrum(self.refine_spectrum(features, layer), size).to(features.dtype)
