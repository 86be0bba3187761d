"""Mask2Former: queries that each name a class and paint its mask, on transformers' own parts.

Features of the backbone -> four maps at strides 4, 8, 16 and 32 -> pixel decoder -> masked-attention decoder, which
limits where each query may look next -> classes and masks after every layer -> loss, by Hungarian matching.
What a head is called with and returns is said in `heads.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from setlib._mask2former import DeformableAttention, InitialParts
from setlib.data.labels import IGNORE

CELLS = (4, 2, 1, 0.5)  # of the four maps, per patch and side: strides 4, 8, 16, 32 at patches of 16 pixels
CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0  # of the loss, and of the costs that queries are matched by
HEAD_SIZES = ("attention_heads", "pixel_layers", "pixel_width", "decoder_layers", "decoder_width")  # as in `Model`
NO_OBJECT = 0.1  # weight of a query without an object in the loss of classes


class Masks(NamedTuple):
    """A mask head's output, for every stage of its decoder (before the first layer, and after each) or for the last.

    classes: (B, M, K + 1) logits, the last one "no object". masks: (B, M, 4 H, 4 W) logits.
    """

    classes: list[Tensor]
    masks: list[Tensor]


class Mask2FormerHead(nn.Module):
    """Mask2Former on four maps made from plain patch features.

    Positions of the queries are the refiner's tokens, their contents a linear map of these; a refiner without tokens
    gets learned queries.
    Source: Mask2Former (CVPR 2022); maps and linked queries as in Rein, Sec. 3.3, initial values as in its released
    code.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        num_classes: int,
        num_queries: int = 0,
        *,
        attention_heads: int = 8,
        pixel_layers: int = 6,
        pixel_width: int = 1024,
        decoder_layers: int = 9,
        decoder_width: int = 2048,
    ) -> None:
        """num_queries: of learned queries; 0 = they are handed over. The widths are those of the feed-forward parts."""
        super().__init__()
        self.channels, self.attention_heads = channels, attention_heads
        config = Mask2FormerConfig(  # type: ignore[call-arg]
            feature_size=hidden,
            mask_feature_size=hidden,
            hidden_dim=hidden,
            num_labels=num_classes,
            num_attention_heads=attention_heads,
            encoder_layers=pixel_layers,
            encoder_feedforward_dim=pixel_width,
            decoder_layers=decoder_layers + 1,  # transformers counts the prediction before the first
            dim_feedforward=decoder_width,
            class_weight=CLASS_WEIGHT,
            mask_weight=MASK_WEIGHT,
            dice_weight=DICE_WEIGHT,
            no_object_weight=NO_OBJECT,
        )
        parts = InitialParts(config, channels, len(CELLS))
        self.pixel_decoder, self.decoder = parts.pixel_decoder, parts.decoder
        for layer in self.pixel_decoder.encoder.layers:
            layer.self_attn = DeformableAttention(layer.self_attn)  # type: ignore[arg-type]
        self.criterion = _SummedLoss(config, {})
        self.criterion.register_buffer("empty_weight", self.criterion.empty_weight, persistent=False)  # not saved
        self.level_embed = nn.Embedding(len(CELLS) - 1, hidden)  # the decoder reads all maps but the finest
        self.classify = nn.Linear(hidden, num_classes + 1)
        self.query_embed = nn.Embedding(num_queries, hidden) if num_queries else None
        self.query_features = nn.Embedding(num_queries, hidden) if num_queries else nn.Linear(hidden, hidden)

    def forward(self, features: Sequence[Tensor], queries: Tensor | None = None) -> Masks:
        """Feature maps, each (B, H, W, C), and queries (M, hidden), to masks; no gradients: of the last stage alone."""
        maps = []
        for feature, cells in zip(features, CELLS, strict=True):
            size = [math.ceil(side * cells) for side in feature.shape[1:3]]
            feature = feature.permute(0, 3, 1, 2).float()
            maps.append(F.interpolate(feature, size, mode="bilinear", align_corners=False))
        return self.decode(maps, queries, every=torch.is_grad_enabled())

    def decode(self, maps: Sequence[Tensor], queries: Tensor | None = None, every: bool = True) -> Masks:
        """Maps (B, C, h, w) at strides 4, 8, 16 and 32 and queries (M, hidden), to masks.

        every: whether all stages are returned, as the loss wants it, or the last alone.
        """
        positions: Any
        if self.query_embed is None:
            positions, contents = queries, self.query_features(queries)
        else:
            positions, contents = self.query_embed.weight, self.query_features.weight
        batch = len(maps[0])
        positions = positions[:, None].expand(-1, batch, -1)  # (M, B, hidden)
        hidden = contents[:, None].expand(-1, batch, -1)
        pixels = self.pixel_decoder(maps)
        levels, places, previews = [], [], []  # at strides 32, 16, 8: what is looked at, where it lies, where masks lie
        for level, embedding in zip(pixels.multi_scale_features, self.level_embed.weight, strict=True):
            place = self.pixel_decoder.position_embedding(level.shape, level.device, torch.float32)
            preview = pixels.mask_features.detach()
            levels.append((level.flatten(2) + embedding[:, None]).permute(2, 0, 1))  # (h w, B, hidden)
            places.append(place.flatten(2).permute(2, 0, 1))
            previews.append(F.interpolate(preview, level.shape[2:], mode="bilinear", align_corners=False))
        stages = [self._read(hidden)]
        for i, layer in enumerate(self.decoder.layers):
            level = i % len(levels)
            (hidden,) = layer(
                hidden,
                level_index=level,
                position_embeddings=places,
                query_position_embeddings=positions,
                encoder_hidden_states=levels,
                encoder_attention_mask=self._closed(stages[-1][1], previews[level]),
            )
            stages.append(self._read(hidden))
        stages = stages if every else stages[-1:]
        return Masks(
            [classes.float() for classes, _ in stages],
            [paint(embeddings, pixels.mask_features) for _, embeddings in stages],
        )

    def _read(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, M, K + 1) and mask embeddings (B, M, hidden) of queries (M, B, hidden)."""
        hidden = self.decoder.layernorm(hidden).transpose(0, 1)
        return self.classify(hidden), self.decoder.mask_predictor.mask_embedder(hidden)

    @torch.no_grad()
    def _closed(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Where queries may not look: outside their masks, (B heads, M, h w); a query with no mask looks everywhere."""
        closed = paint(embeddings, features).flatten(2).sigmoid() < 0.5
        closed &= ~closed.all(-1, keepdim=True)
        return closed.repeat_interleave(self.attention_heads, 0)

    def probabilities(self, output: Masks, size: tuple[int, int]) -> Tensor:
        """Scores (B, K, h, w), not above M: of each class, its probability times the mask, summed over the queries."""
        masks = F.interpolate(output.masks[-1], size, mode="bilinear", align_corners=False).sigmoid()
        return torch.einsum("bqk,bqhw->bkhw", output.classes[-1].softmax(-1)[..., :-1], masks)

    def counts(self, labels: Tensor) -> Tensor:
        """(2,): the masks of labels (B, h, w), one per image and class, and the images."""
        num_masks = sum(len(_classes(label)) for label in labels)
        return torch.tensor([num_masks, len(labels)], dtype=torch.float64, device=labels.device)

    def loss(self, output: Masks, labels: Tensor, counts: Tensor, seeds: Sequence[int]) -> Tensor:
        """Classes, masks and dice of all stages, weighted, each query matched with at most one class of its image.

        labels: (B, h, w) int64, 255 in no mask; seeds: of each image's 12,544 points, at which masks are compared.
        """
        num_masks, num_images = counts.float()
        num_queries = output.classes[0].shape[1]
        class_total = (num_masks + NO_OBJECT * (num_images * num_queries - num_masks)).clamp(min=NO_OBJECT)
        mask_total = num_masks.clamp(min=1)
        gpus = [labels.device.index] if labels.is_cuda else []
        generator = torch.cuda.default_generators[gpus[0]] if gpus else torch.default_generator
        total = torch.zeros((), device=labels.device)
        for i, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
            present = _classes(label)
            wanted = (label == present[:, None, None]).float()  # (n, h, w)
            matched = min(len(present), num_queries)
            class_share = (matched + NO_OBJECT * (num_queries - matched)) / class_total
            with torch.random.fork_rng(gpus):  # random numbers go on afterwards as if none had been drawn
                generator.manual_seed(seed)
                for classes, masks in zip(output.classes, output.masks, strict=True):
                    terms = self.criterion(masks[i, None], classes[i, None], [wanted], [present])
                    total = total + CLASS_WEIGHT * class_share * terms["loss_cross_entropy"]
                    total = total + (MASK_WEIGHT * terms["loss_mask"] + DICE_WEIGHT * terms["loss_dice"]) / mask_total
        return total


def paint(embeddings: Tensor, features: Tensor) -> Tensor:
    """Mask logits (B, M, h, w), float32, of embeddings (B, M, C) and features of pixels (B, C, h, w)."""
    with torch.autocast(features.device.type, enabled=False):
        return torch.einsum("bqc,bchw->bqhw", embeddings.float(), features.float())


def _classes(label: Tensor) -> Tensor:
    """The classes of a label (h, w), 255 left out."""
    found = label.unique()
    return found[found != IGNORE]


class _SummedLoss(Mask2FormerLoss):
    """transformers' loss, whose terms of masks are sums: what they are divided by is counted over the whole step."""

    def get_num_masks(self, class_labels: Any, device: torch.device) -> Any:
        """What transformers divides by."""
        return 1
