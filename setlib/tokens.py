"""Refiners: the learnable tokens that change the features between the frozen layers.

A refiner is called as `refiner(features: (B, H, W, C), layer)` for each of its `layers` (counted from 1) and returns
refined features of the same shape. Nothing here knows of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setlib import spectral
from setlib.experiment import nearest


class Refiner(nn.Module):
    """No refiner: the frozen features as they are. Base of all refiners."""

    def __init__(self, layers: Sequence[int] = (), **_: int) -> None:
        super().__init__()
        self.layers = tuple(layers)

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), after frozen layer `layer` (counted from 1)."""
        return features


class LowRankTokens(nn.Module):
    """M tokens of C channels for each layer, T = A B with rank r. Source: Rein, Sec. 3.4; SET uses the same."""

    def __init__(self, num_layers: int, num_tokens: int, channels: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(num_layers, num_tokens, rank))
        self.b = nn.Parameter(torch.empty(num_layers, rank, channels))
        bound = math.sqrt(6 / (3 * 16**2 + math.sqrt(channels * rank)))
        nn.init.uniform_(self.a, -bound, bound)
        nn.init.uniform_(self.b, -bound, bound)

    def forward(self, index: int) -> Tensor:
        """Tokens of one layer, (M, C)."""
        return self.a[index] @ self.b[index]


class TokenBranch(nn.Module):
    """Learnable tokens of one layer stack that refine a set of vectors (patches, or spectral positions).

    Every position x attends to the tokens, beta(x) = MLP(softmax(x T^t / sqrt(C)) MLP(T) + x); the MLPs are one Linear
    each, shared by all layers. Token 0 only absorbs attention: a position may attend to nothing. With `normalise` the
    similarities are instance normalised first, per image and token over all positions, so that the style-dependent
    level of an image's amplitudes does not drive the attention.
    Source: Rein, Sec. 3.3; SET, Sec. 3.2, with normalise=True Sec. 3.3 (the paper does not name the axis).
    """

    def __init__(
        self, num_layers: int, channels: int, num_tokens: int, rank: int, normalise: bool = False, zero: bool = False
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.tokens = LowRankTokens(num_layers, num_tokens, channels, rank)
        self.token_map = nn.Linear(channels, channels)
        self.delta_map = nn.Linear(channels, channels)
        nn.init.kaiming_uniform_(self.token_map.weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.delta_map.weight, a=math.sqrt(5))
        if zero:  # beta = 0 at step 0: training starts at the frozen backbone
            nn.init.zeros_(self.delta_map.weight)
            nn.init.zeros_(self.delta_map.bias)

    def attention(self, x: Tensor, index: int) -> Tensor:
        """Share of each token, (B, P, M), sums to 1 over the tokens; x: (B, P, C)."""
        similarity = x @ self.tokens(index).T / math.sqrt(x.shape[-1])  # (B, P, M)
        if self.normalise:
            similarity = F.instance_norm(similarity.transpose(1, 2)).transpose(1, 2)  # over P, per image and token
        return similarity.softmax(-1)

    def forward(self, x: Tensor, index: int) -> Tensor:
        """beta(x), (B, P, C) -> (B, P, C); index: place of the layer in the stack, from 0."""
        values = self.token_map(self.tokens(index)[1:])  # (M - 1, C)
        return self.delta_map(self.attention(x, index)[..., 1:] @ values + x)


class Rein(Refiner):
    """f + s * beta(f) on the patches themselves, s a learnable scalar from 1e-3. Source: Rein (CVPR 2024), Sec. 3.3."""

    def __init__(self, layers: Sequence[int], channels: int, num_tokens: int, rank: int) -> None:
        super().__init__(layers)
        self.branch = TokenBranch(len(self.layers), channels, num_tokens, rank)
        self.scale = nn.Parameter(torch.tensor(1e-3))

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        delta = self.branch(features.flatten(1, 2), self.layers.index(layer))
        return features + self.scale * delta.view_as(features)


class SpectralTokens(Refiner):
    """SET: tokens refine amplitude and phase of the features over the patch grid, each beta(x) + x.

    The refined amplitude is kept >= 0 and the change of phase odd, so that the spectrum stays that of a real signal.
    At step 0 both betas are 0 and the features pass unchanged. `amplitude=False` or `phase=False` leaves one part as
    it is, `normalise=False` leaves the attention optimisation out: SET's parts, for ablation.
    Source: SET, Sec. 3.1-3.3. Departure: the output map starts at zero instead of at random.
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: int,
        num_tokens: int,
        rank: int,
        amplitude: bool = True,
        phase: bool = True,
        normalise: bool = True,
    ) -> None:
        super().__init__(layers)
        branch = partial(TokenBranch, len(self.layers), channels, num_tokens, rank, zero=True)
        self.amplitude = branch(normalise=normalise) if amplitude else None
        self.phase = branch() if phase else None

    def refine_spectrum(self, features: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Refined amplitude >= 0, change of phase (odd, radians) and unit phasor of the input, all half spectra."""
        spectrum = spectral.transform(features)
        index, positions = self.layers.index(layer), spectrum.shape
        amplitude = spectrum.abs()
        change = torch.zeros_like(amplitude)
        if self.phase is not None:
            change = self.phase(spectral.safe_angle(spectrum).flatten(1, 2), index).view(positions)
            change = spectral.make_phase_change_odd(change, features.shape[2])
        if self.amplitude is not None:
            amplitude = (amplitude + self.amplitude(amplitude.flatten(1, 2), index).view(positions)).relu()
        return amplitude, change, spectral.unit_phasor(spectrum)

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        amplitude, change, unit = self.refine_spectrum(features, layer)
        refined = spectral.invert(torch.polar(amplitude, change) * unit, features.shape[1:3])
        return refined.to(features.dtype)


REFINERS: dict[str, Callable[..., Refiner]] = {
    "none": Refiner,
    "rein": Rein,
    "set": SpectralTokens,
    "set-amplitude": partial(SpectralTokens, phase=False),
    "set-phase": partial(SpectralTokens, amplitude=False),
    "set-unnormalised": partial(SpectralTokens, normalise=False),
}


def build_refiner(name: str, layers: Sequence[int], channels: int, num_tokens: int, rank: int) -> Refiner:
    """The refiner called `name`. Raises ValueError for an unknown name (the nearest are listed)."""
    if name not in REFINERS:
        raise ValueError(f"Unknown refiner '{name}' ({nearest(name, REFINERS)}).")
    layers = () if name == "none" else layers
    return REFINERS[name](layers=layers, channels=channels, num_tokens=num_tokens, rank=rank)
