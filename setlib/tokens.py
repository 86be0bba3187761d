"""Learnable tokens that change the features between the frozen layers: Rein, SET, and SET as released.

A refiner is called as `refiner(features: (B, H, W, C), layer)` for each of its `layers` (counted from 1) and returns
refined features of the same shape; `refiner.queries()` gives its tokens to a mask head. Every refiner by name, and
those that work without tokens, are in `refiners.py`. Nothing here knows of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setlib import spectral


class Refiner(nn.Module):
    """No refiner: the frozen features as they are. Base of all refiners.

    inside: whether it works inside its layers (on what they read, or on their weights) instead of behind them.
    adapt: `adapt(model, layers)`, for a refiner that changes weights in a copy of the backbone's model; None = it does
    not. rate: learning rate of all that it has learn, here and there, in units of the head's (`train.refiner_rates`
    sets others).
    prompts: `prompts(layer) -> (P, C)`, tokens that a layer reads beside its own; None = it has none.
    """

    inside = False
    rate = 1.0  # source: the releases of Rein and SET
    adapt: Callable[[nn.Module, Sequence[nn.Module]], object] | None = None
    prompts: Callable[[int], Tensor] | None = None

    def __init__(self, layers: Sequence[int] = (), **_: int | str) -> None:
        super().__init__()
        self.layers = tuple(layers)

    def frozen_until(self, depth: int) -> int:
        """Number of first layers, of `depth`, whose own answer nothing trainable can change."""
        return min(self.layers, default=depth + self.inside) - self.inside

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), after frozen layer `layer` (counted from 1)."""
        return features

    def branches(self) -> dict[str, TokenBranch]:
        """The branches of tokens by name: "patches", or "amplitude" before "phase"."""
        return {name: child for name, child in self.named_children() if isinstance(child, TokenBranch)}

    def queries(self) -> Tensor | None:
        """Queries (M, Q) for a mask head, made from the tokens; None where there are none."""
        return None


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


class FullRankTokens(nn.Module):
    """M free tokens of C channels for each of L layers, as the released code has them in its amplitude branch."""

    def __init__(self, num_layers: int, num_tokens: int, channels: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (3 * 16**2 + channels))
        self.t = nn.Parameter(torch.empty(num_layers, num_tokens, channels).uniform_(-bound, bound))

    def forward(self) -> Tensor:
        """Tokens of all layers, (L, M, C)."""
        return self.t

    def of_layer(self, index: int) -> Tensor:
        """Tokens of one layer, (M, C)."""
        return self.t[index]


class TokenBranch(nn.Module):
    """Learnable tokens of one layer stack that refine a set of vectors (patches, or spectral positions).

    Every position x attends to the tokens, beta(x) = MLP(softmax(x T^t / sqrt(C)) MLP(T) + x); the MLPs are one Linear
    each, shared by all layers. Token 0 only absorbs attention: a position may attend to nothing.
    normalise = "positions": the similarities are instance normalised in place of the division by sqrt(C), per image and
    token over all positions, so that the style-dependent level of an image's amplitudes does not drive the attention;
    "tokens": as released, over the tokens of a position and then divided, which leaves the attention all but uniform.
    Source: Rein, Sec. 3.3; SET, Sec. 3.2, normalised Sec. 3.3 (the paper does not name the axis).
    """

    def __init__(self, tokens: nn.Module, channels: int, normalise: str = "", zero: bool = False) -> None:
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
        """Share of each token, (B, P, M), sums to 1 over the tokens; x: (B, P, C)."""
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
        tokens = self.tokens.of_layer(index)
        values = self.token_map(tokens[1:])  # (M - 1, C)
        return self.delta_map(self._attend(x, tokens)[..., 1:] @ values + x)


class TokenQueries(nn.Module):
    """Queries for a mask head: tokens of all layers, projected, pooled over the layers (max, mean, last), merged.

    Source: Rein, Sec. 3.3, with the order of its released code (max, mean and last side by side for each channel).
    """

    def __init__(self, channels: int, query_channels: int) -> None:
        super().__init__()
        self.transform = nn.Linear(channels, query_channels)
        self.merge = nn.Linear(3 * query_channels, query_channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(L, M, C) -> (M, Q)."""
        tokens = self.transform(tokens)
        pooled = torch.stack([tokens.amax(0), tokens.mean(0), tokens[-1]], dim=-1)  # (M, Q, 3)
        return self.merge(pooled.flatten(1))


class TokenRefiner(Refiner):
    """Base of the refiners with tokens: what they share, and their queries.

    query_channels: Q of the queries, 0 = none; they are made of the tokens of the `linked` branch, or of the only one.
    any_batch: lets a refiner whose output depends on the batch (set-released) be evaluated at another batch size than
    it was trained with.
    """

    linked = "phase"

    def __init__(
        self,
        layers: Sequence[int],
        channels: int,
        num_tokens: int,
        rank: int,
        query_channels: int = 0,
        any_batch: bool = False,
        **_: int,
    ) -> None:
        super().__init__(layers)
        self.any_batch = any_batch
        self.low_rank = partial(LowRankTokens, len(self.layers), num_tokens, channels, rank)
        self.query_map = TokenQueries(channels, query_channels) if query_channels else None

    def queries(self) -> Tensor | None:
        """(M, Q) from the tokens of all layers; None without query channels."""
        if self.query_map is None:
            return None
        branches = self.branches()
        return self.query_map(branches.get(self.linked, next(iter(branches.values()))).tokens())


class Rein(TokenRefiner):
    """f + s * beta(f) on the patches themselves, s a learnable scalar from 1e-3. Source: Rein (CVPR 2024), Sec. 3.3."""

    def __init__(self, layers: Sequence[int], channels: int, *sizes: int, **options: int | str) -> None:
        super().__init__(layers, channels, *sizes, **options)
        self.patches = TokenBranch(self.low_rank(), channels)
        self.scale = nn.Parameter(torch.tensor(1e-3))

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        delta = self.patches(features.flatten(1, 2), self.layers.index(layer))
        return features + self.scale * delta.view_as(features)


class SpectralTokens(TokenRefiner):
    """SET: tokens refine amplitude and phase of the features over the patch grid, each beta(x) + x.

    The refined amplitude is kept >= 0 and the change of phase odd, so that the spectrum stays that of a real signal.
    At step 0 both betas are 0 and the features pass unchanged. `amplitude=False` or `phase=False` leaves one part as
    it is, `normalise=""` leaves the attention optimisation out: SET's parts, for ablation.
    Source: SET, Sec. 3.1-3.3. Departure: the output map starts at zero instead of at random.
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: int,
        *sizes: int,
        amplitude: bool = True,
        phase: bool = True,
        normalise: str = "positions",
        **options: int | str,
    ) -> None:
        super().__init__(layers, channels, *sizes, **options)
        self.amplitude = TokenBranch(self.low_rank(), channels, normalise, zero=True) if amplitude else None
        self.phase = TokenBranch(self.low_rank(), channels, zero=True) if phase else None

    def refine_spectrum(self, features: Tensor, layer: int) -> spectral.Spectrum:
        """The refined half spectrum of features (B, H, W, C): amplitude >= 0, and phase in radians (not wrapped)."""
        amplitude, phase = spectral.split_spectrum(features)
        index, positions = self.layers.index(layer), amplitude.shape
        if self.phase is not None:
            change = self.phase(phase.flatten(1, 2), index).view(positions)
            phase = spectral.change_phase(phase, change, features.shape[2])
        if self.amplitude is not None:
            change = self.amplitude(amplitude.flatten(1, 2), index).view(positions)
            amplitude = (amplitude + change).relu_()
        return spectral.Spectrum(amplitude, phase)

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return spectral.join_spectrum(self.refine_spectrum(features, layer), features.shape[1:3]).to(features.dtype)


class ReleasedSpectralTokens(TokenRefiner):
    """The function that the authors' released code computes, to the digit, kept to compare with: not the paper's.

    What is wrong with it: it transforms over batch and channel, not over the patch grid, so an image's result depends
    on its batch mates and their order, and no spatial frequency is ever seen; its inverse reads only half of a
    spectrum that belongs to no real signal and scales by sqrt(B / 2); "amplitudes" may be negative; the normalisation
    runs over the tokens of a position, so that with M tokens none can get more than about 1.4 / M of the attention;
    the amplitude tokens have full rank. In eval mode it refuses another batch size than the one it was trained with;
    `any_batch=True` lets it run all the same.
    Source: the code released with SET.
    """

    def __init__(self, layers: Sequence[int], channels: int, num_tokens: int, rank: int, **options: int | str) -> None:
        super().__init__(layers, channels, num_tokens, rank, **options)
        tokens = FullRankTokens(len(self.layers), num_tokens, channels)
        self.amplitude = TokenBranch(tokens, channels, normalise="tokens")
        self.phase = TokenBranch(self.low_rank(), channels)
        self.scale = nn.Parameter(torch.tensor(1e-3))
        self.register_buffer("trained_batch", torch.tensor(0))

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C). Raises ValueError in eval mode for another batch size than that of training."""
        batch, channels = features.shape[0], features.shape[-1]
        self._check_batch(batch)
        patches = features.flatten(1, 2).transpose(0, 1)  # (N, B, C)
        patches = patches if patches.dtype == torch.float64 else patches.float()
        spectrum, index = torch.fft.fft2(patches, dim=(1, 2)), self.layers.index(layer)
        amplitude, phase = self.amplitude(spectrum.abs(), index), self.phase(spectrum.angle(), index)
        amplitude, phase = amplitude.to(patches.dtype), phase.to(patches.dtype)  # lower under autocast
        refined = torch.complex(
            amplitude * phase.cos(), amplitude * phase.sin()
        )  # polar's gradient wants amplitude >= 0
        delta = math.sqrt(batch / 2) * torch.fft.irfft2(refined, s=(batch, channels), dim=(1, 2))  # (N, B, C)
        return features + (self.scale * delta.transpose(0, 1).reshape(features.shape)).to(features.dtype)

    def _check_batch(self, batch: int) -> None:
        if self.training:
            self.trained_batch.fill_(batch)
        elif not self.any_batch and self.trained_batch not in (0, batch):
            raise ValueError(
                f"Refiner set-released was trained with batches of {int(self.trained_batch)}, and its output depends "
                f"on the batch: evaluate it with the same size instead of {batch}, or set model.any_batch=true."
            )
