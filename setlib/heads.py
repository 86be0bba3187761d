"""Segmentation heads: feature maps of several layers -> class logits on the patch grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PerPixelHead(nn.Module):
    """A LayerNorm and a 1 x 1 map for each layer, then one 3 x 3 convolution over all of them, then the classes.

    Input: a list of (B, H, W, C), one per layer. Output: (B, K, H, W) logits.
    """

    def __init__(self, num_layers: int, channels: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, hidden)) for _ in range(num_layers)
        )
        self.mix = nn.Conv2d(num_layers * hidden, hidden, 3, padding=1, padding_mode="replicate")
        self.classify = nn.Conv2d(hidden, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps, each (B, H, W, C), to logits (B, K, H, W)."""
        mapped = torch.cat([layer(f) for layer, f in zip(self.maps, features, strict=True)], dim=-1)
        return self.classify(self.mix(mapped.permute(0, 3, 1, 2)).relu())
