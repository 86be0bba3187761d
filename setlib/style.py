"""The style of the source, kept as two numbers per channel, and put in place of every picture's own. Nothing learns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

TINY = 1e-6  # a deviation at or below it is that of a channel that is constant


class SourceStyle(nn.Module):
    """Brings the amplitudes of features behind some first layers to the level that they have on the source.

    Per channel: the amplitude at zero frequency (the mean over the patches) becomes the source's, and all others are
    scaled together until their energy (by Parseval the variance over the patches) is the source's; no phase turns.
    Measured first: style sits in these two numbers, the more the earlier the layer, while the amplitudes' shape and the
    phases hold content. Every picture is brought there by its own statistics alone, in training as in use. Until it is
    fitted it changes nothing. Source: AdaIN (Huang & Belongie, ICCV 2017), here towards the source's mean style.

    Parameters
    ----------
    layers : numbers, from 1, behind which it stands. channels: C.
    scrambled : the same over a random orthonormal basis of the positions in place of the waves, a placebo.
    """

    mean: Tensor
    level: Tensor
    fitted: Tensor

    def __init__(self, layers: Sequence[int], channels: int, scrambled: bool = False) -> None:
        super().__init__()
        self.layers, self.scrambled = tuple(layers), scrambled
        self.register_buffer("mean", torch.zeros(len(self.layers), channels))
        self.register_buffer("level", torch.zeros(len(self.layers), channels))  # logarithm of the deviation
        self.register_buffer("fitted", torch.zeros(len(self.layers), dtype=torch.bool))

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), behind frozen layer `layer`."""
        index = self.layers.index(layer)
        if not self.fitted[index]:
            return features
        x, signs = self._turned(features)
        mean, level = statistics(x)
        x = (x - mean) * (self.level[index] - level).exp() + self.mean[index]
        return (x * signs).to(features.dtype)

    def observe(self, features: Tensor, layer: int) -> None:
        """Takes the mean statistics of features of source pictures (B, H, W, C) as those of the source."""
        index = self.layers.index(layer)
        mean, level = statistics(self._turned(features)[0])
        self.mean[index], self.level[index] = mean.mean((0, 1, 2)), level.mean((0, 1, 2))
        self.fitted[index] = True

    def _turned(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features as float32, and the signs of the positions: all 1, or random ones, whose mean is no mean."""
        generator, (height, width) = torch.Generator().manual_seed(0), features.shape[1:3]
        signs = torch.ones(height, width, 1)
        if self.scrambled:
            signs = torch.randint(0, 2, signs.shape, generator=generator) * 2.0 - 1
        signs = signs.to(features.device)
        return features.float() * signs, signs


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the deviation over the positions, (B, 1, 1, C) each; x: (B, H, W, C)."""
    return x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True).clamp(min=TINY).log()


def same(one: SourceStyle | None, other: SourceStyle | None) -> bool:
    """Whether two styles, or none, change features alike."""
    if one is other or one is None or other is None:
        return one is other
    alike = (one.layers, one.scrambled) == (other.layers, other.scrambled)
    return alike and all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))
