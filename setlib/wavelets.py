"""FADA, the sister of SET that splits features by a Haar wavelet transform: a baseline, and its transform."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from setlib.tokens import LowRankTokens, Refiner, TokenBranch


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
