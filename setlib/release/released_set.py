"""SET as its released code computes it, kept to compare with: not the paper's method, which is in `tokens.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from setlib.spectral import Spectrum
from setlib.tokens import LowRankTokens, Refiner, TokenBranch


class FullRankTokens(nn.Module):
    """M free tokens of C channels for each of L layers, as the released code has them in its amplitude branch."""

    def __init__(self, num_layers: int, num_tokens: int, channels: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (3 * 16**2 + channels))
        self.t = nn.Parameter(torch.empty(num_layers, num_tokens, channels).uniform_(-bound, bound))

    def of_layer(self, index: int) -> Tensor:
        """Tokens of one layer, (M, C)."""
        return self.t[index]


class ReleasedSpectralTokens(Refiner):
    """The function that the authors' released code computes, to the digit.

    What is wrong with it: it transforms over batch and channel, not over the patch grid, so an image's result depends
    on its batch mates and their order, and no spatial frequency is ever seen; its inverse reads only half of a
    spectrum that belongs to no real signal and scales by sqrt(B / 2); "amplitudes" may be negative; the normalisation
    runs over the tokens of a position, so that with M tokens none can get more than about 1.4 / M of the attention;
    the amplitude tokens have full rank.
    any_batch: in eval mode it refuses another batch size than the one it was trained with, unless this is True.
    Source: the code released with SET.
    """

    linked = "phase"

    def __init__(
        self, layers: Sequence[int], channels: int, num_tokens: int, rank: int, query_channels: int, any_batch: bool
    ) -> None:
        super().__init__(layers, channels, query_channels)
        self.any_batch = any_batch
        self.amplitude = TokenBranch(FullRankTokens(len(layers), num_tokens, channels), channels, normalise="tokens")
        self.phase = TokenBranch(LowRankTokens(len(layers), num_tokens, channels, rank), channels)
        self.scale = nn.Parameter(torch.tensor(1e-3))
        self.register_buffer("trained_batch", torch.tensor(0))

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C). Raises ValueError in eval mode for another batch size than that of training."""
        batch, channels = features.shape[0], features.shape[-1]
        if self.training:
            self.trained_batch.fill_(batch)
        elif not self.any_batch and self.trained_batch not in (0, batch):
            raise ValueError(
                f"Refiner set-released was trained with batches of {int(self.trained_batch)}, and its output depends "
                f"on the batch: evaluate it with the same size instead of {batch}, or set model.any_batch=true."
            )
        amplitude, phase = self.refine_spectrum(features, layer)
        refined = torch.complex(amplitude * phase.cos(), amplitude * phase.sin())  # polar's gradient wants them >= 0
        delta = math.sqrt(batch / 2) * torch.fft.irfft2(refined, s=(batch, channels), dim=(1, 2))  # (N, B, C)
        return features + (self.scale * delta.transpose(0, 1).reshape(features.shape)).to(features.dtype)

    def refine_spectrum(self, features: Tensor, layer: int) -> Spectrum:
        """What is transformed back, (N, B, C) each, of features (B, H, W, C); the "amplitude" may be negative."""
        patches = features.flatten(1, 2).transpose(0, 1)  # (N, B, C)
        patches = patches if patches.dtype == torch.float64 else patches.float()
        spectrum, index = torch.fft.fft2(patches, dim=(1, 2)), self.layers.index(layer)
        amplitude, phase = self.amplitude(spectrum.abs(), index), self.phase(spectrum.angle(), index)
        return Spectrum(amplitude.to(patches.dtype), phase.to(patches.dtype))  # lower under autocast
