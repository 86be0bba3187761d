"""The network: frozen backbone + refiner + head. Images in, the head's output out; only refiner and head learn.

How whole pictures are predicted is in `inference.py`; building one from an experiment, saving and loading in
`checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setlib.backbone import FrozenBackbone
from setlib.data.labels import IGNORE
from setlib.experiment import Experiment
from setlib.features import FrozenFeatures
from setlib.mask2former import Masks
from setlib.style import same
from setlib.tokens import Refiner


class Segmenter(nn.Module):
    """A segmentation network with the 19 Cityscapes train classes.

    With a precision below float32 the matrix products run in it; spectra, norms and the loss do not.
    Source: SET, Sec. 3; the per-pixel head is a departure (the paper: Mask2Former).

    Parameters
    ----------
    experiment : the configuration it is built from, which travels with it.
    backbone : frozen; refiners that change weights (full, lora) get a copy of it.
    refiner, head : what learns. feature_layers: numbers of the layers whose features the head reads.
    precision : "float32" or "bfloat16".
    """

    def __init__(
        self,
        experiment: Experiment,
        backbone: FrozenBackbone,
        refiner: Refiner,
        head: nn.Module,
        feature_layers: Sequence[int],
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.experiment, self.precision = experiment, precision
        self.backbone, self.refiner = backbone.adapted(refiner.adapt), refiner
        self.head: Any = head
        self.feature_layers = tuple(feature_layers)

    def forward(
        self, images: Tensor, frozen: FrozenFeatures | None = None, refiner: Refiner | None = None
    ) -> Tensor | Masks:
        """The head's output: logits (B, 19, H, W) over the patch grid, or the `Masks` of a mask head.

        Parameters
        ----------
        images : (B, 3, h, w) in [0, 1], of any size.
        frozen : features of the same images, to skip layers that nothing trainable touches; left aside where they
            go further or have another style.
        refiner : in place of the model's own, to read or change the features on their way; queries stay the model's.
        """
        if frozen and (frozen.stop > self.frozen_until or not same(frozen.style, self.refiner.style)):
            frozen = None
        checkpointing = self.training and self.experiment.train.checkpointing
        with self.autocast():
            maps = self.backbone(images, refiner or self.refiner, self.feature_layers, frozen, checkpointing)
            return self.head([maps[layer] for layer in self.feature_layers], self.refiner.queries())

    def loss(
        self, output: Tensor | Masks, labels: Tensor, counts: Tensor | None = None, seeds: Sequence[int] = ()
    ) -> Tensor:
        """The head's loss of its output, a scalar; labels: (B, h, w) int64 train ids, 255 ignored.

        counts: `head.counts` of all labels of the step, where these are a part of them. seeds: of what a mask head
        draws, one per image.
        """
        counts = self.head.counts(labels) if counts is None else counts
        h, w = self.padded_size(labels.shape[1:])
        labels = F.pad(labels, (0, w - labels.shape[2], 0, h - labels.shape[1]), value=IGNORE)
        return self.head.loss(output, labels, counts, seeds or range(len(labels)))

    def pixel_probabilities(self, output: Tensor | Masks, size: tuple[int, int]) -> Tensor:
        """Class probabilities at the pixels of images of `size`, (B, 19, h, w).

        Where these did not divide into patches, what they were padded with is cut off.
        """
        return self.head.probabilities(output, self.padded_size(size))[..., : size[0], : size[1]]

    def padded_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Image size (h, w) in pixels, rounded up to whole patches."""
        rows, columns = self.backbone.grid(size)
        return rows * self.backbone.patch_size, columns * self.backbone.patch_size

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.mean.device

    def autocast(self) -> torch.autocast:
        """The context in which matrix products run in the model's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    @property
    def frozen_until(self) -> int:
        """Number of first layers whose own output nothing that learns or is mixed can change: computed once."""
        train, last = self.experiment.train, max(self.feature_layers)
        mixed = train.mix_layer if self.training and train.mix and train.mix_layer else last
        return min(self.refiner.frozen_until(self.backbone.num_layers), mixed, last)

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that learns, by name: refiner.*, head.* and what learns of backbone.*; buffers too."""
        parts = {"refiner": self.refiner.state_dict(), "head": self.head.state_dict()}
        parts["backbone"] = {name: p.detach() for name, p in self.backbone.named_parameters() if p.requires_grad}
        return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}

    def num_trainable(self) -> dict[str, int]:
        """Trainable parameters by part."""
        parts = {"backbone": self.backbone, "refiner": self.refiner, "head": self.head}
        return {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in parts.items()}
