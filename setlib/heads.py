"""The per-pixel head, and what a head is: feature maps of several layers, and queries, -> classes.

A head is called as `head(features, queries)`, features a list of (B, H, W, C), one per layer, and returns an
output of its own. `head.probabilities(output, size)` turns it into class probabilities at pixels, (B, K, h, w).
`head.loss(output, labels, counts, seeds)` is a sum over its images, divided by `counts`, what `head.counts(labels)`
gave, added up over all images of a step: the losses of the parts of a batch add up to that of the batch.
Mask2Former is the other head, in `mask2former.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setlib.data.labels import IGNORE


class PerPixelHead(nn.Module):
    """A LayerNorm and a 1 x 1 map for each layer, then one 3 x 3 convolution over all of them, then the classes."""

    def __init__(self, num_layers: int, channels: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        maps = (nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, hidden)) for _ in range(num_layers))
        self.maps = nn.ModuleList(maps)
        self.mix = nn.Conv2d(num_layers * hidden, hidden, 3, padding=1, padding_mode="replicate")
        self.classify = nn.Conv2d(hidden, num_classes, 1)

    def forward(self, features: Sequence[Tensor], queries: Tensor | None = None) -> Tensor:
        """Feature maps, each (B, H, W, C), to logits (B, K, H, W); queries are not used."""
        mapped = torch.cat([layer(f) for layer, f in zip(self.maps, features, strict=True)], dim=-1)
        return self.classify(self.mix(mapped.permute(0, 3, 1, 2)).relu()).float()

    def probabilities(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, K, h, w), bilinear."""
        return F.interpolate(output.softmax(1), size, mode="bilinear", align_corners=False)

    def counts(self, labels: Tensor) -> Tensor:
        """(1,): the labelled pixels of labels (B, h, w)."""
        return (labels != IGNORE).sum().view(1).double()

    def loss(self, output: Tensor, labels: Tensor, counts: Tensor, seeds: Sequence[int] = ()) -> Tensor:
        """Cross-entropy per labelled pixel, 255 ignored; 0 if nothing is labelled. labels: (B, h, w) int64."""
        output = output.contiguous(memory_format=torch.channels_last)  # classes side by side: half the time on a CPU
        logits = F.interpolate(output, labels.shape[1:], mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        total = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        return total / counts[0].clamp(min=1).to(total.dtype)
