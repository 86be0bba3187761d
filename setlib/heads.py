"""Segmentation heads: feature maps of several layers, and queries, -> classes; each with its loss and probabilities.

A head is called as `head(features, queries)`, features a list of (B, H, W, C), one per layer, and answers with an
output of its own. `head.probabilities(output, size)` turns it into class probabilities at pixels; `head.loss(output,
labels, counts, seeds)` is a sum over its images, divided by `counts`, what `head.counts(labels)` gave, added up over
all images of a step: the losses of the parts of a batch add up to that of the batch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerHungarianMatcher,
    Mask2FormerLoss,
    Mask2FormerMaskedAttentionDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerPreTrainedModel,
    Mask2FormerSinePositionEmbedding,
    dice_loss,
    sample_point,
    sigmoid_cross_entropy_loss,
)

from setlib.data.labels import IGNORE
from setlib.pixels import CrossAttention, MaskPredictor, PixelDecoder, ReadMasks, Size

STRIDES = (4, 2, 1, 0.5)  # of the four maps of a mask head, in maps per patch: strides 4, 8, 16, 32 at patches of 16
LOSS_WEIGHTS, NO_OBJECT = (2.0, 5.0, 5.0), 0.1  # of classes, masks and dice; of queries without an object


class PerPixelHead(nn.Module):
    """A LayerNorm and a 1 x 1 map for each layer, then one 3 x 3 convolution over all of them, then the classes.

    Input: a list of (B, H, W, C), one per layer. Output: (B, K, H, W) logits. Loss: cross-entropy at the labels' size.
    """

    def __init__(self, num_layers: int, channels: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, hidden)) for _ in range(num_layers)
        )
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


class Masks(NamedTuple):
    """What a mask head says, for every stage of its decoder (before the first layer, and after each) or for the last.

    classes: (B, Q, K + 1) logits, the last one "no object". masks: (B, Q, 4 H, 4 W) logits.
    """

    classes: list[Tensor]
    masks: list[Tensor]


class Mask2FormerHead(nn.Module):
    """Mask2Former on four maps made from plain patch features: queries that each name a class and paint its mask.

    Its parts are transformers', see `pixels.py`. Positions of the queries are the refiner's tokens, their contents a
    linear map of these; a refiner without tokens gets learned queries. The maps are the features resized to 4, 2, 1 and
    1/2 cells per patch: strides 4, 8, 16, 32 at patches of 16 pixels.
    Loss: Hungarian matching, class 2, mask 5, dice 5, no object 0.1, in every stage, on 12,544 points. Each image's
    points are drawn from a seed of its own.
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
        self.channels = channels
        parts = _Parts(
            Mask2FormerConfig(
                feature_size=hidden,
                mask_feature_size=hidden,
                hidden_dim=hidden,
                num_labels=num_classes,
                num_attention_heads=attention_heads,
                encoder_layers=pixel_layers,
                encoder_feedforward_dim=pixel_width,
                decoder_layers=decoder_layers + 1,
                dim_feedforward=decoder_width,
            ),
            channels,
        )
        self.pixel_decoder, self.decoder, self.criterion = parts.pixel_decoder, parts.decoder, parts.criterion
        self.positions = parts.positions
        self.level_embed = nn.Embedding(3, hidden)
        self.classify = nn.Linear(hidden, num_classes + 1)
        self.query_embed = nn.Embedding(num_queries, hidden) if num_queries else None
        self.query_features = nn.Embedding(num_queries, hidden) if num_queries else nn.Linear(hidden, hidden)

    def forward(self, features: Sequence[Tensor], queries: Tensor | None = None) -> Masks:
        """Feature maps, each (B, H, W, C), and queries (Q, hidden), to masks."""
        grid = features[0].shape[1:3]
        sizes = [tuple(-int(-side * scale // 1) for side in grid) for scale in STRIDES]
        maps = [feature.permute(0, 3, 1, 2).float() for feature in features]
        return self.decode(maps, queries, sizes, every=torch.is_grad_enabled())

    def decode(
        self,
        maps: Sequence[Tensor],
        queries: Tensor | None = None,
        sizes: Sequence[Size] = (),
        every: bool = True,
    ) -> Masks:
        """Maps (B, C, h, w), brought to the sizes of strides 4, 8, 16 and 32 (theirs), and queries (Q, hidden).

        every: whether all stages answer, as the loss wants it, or the last alone.
        """
        if self.query_embed is not None:
            positions, contents = self.query_embed.weight, self.query_features.weight
        else:
            positions, contents = queries, self.query_features(queries)
        pixels = self.pixel_decoder(maps, sizes or [tuple(found.shape[-2:]) for found in maps])
        finest, smaller = pixels.finest.float(), {}
        for level in pixels.levels:
            size = tuple(level.shape[-2:])
            smaller[size] = F.interpolate(finest.detach(), size, mode="bilinear", align_corners=False).flatten(2)
        places = [self.positions(level.shape, level.device, torch.float32).flatten(2) for level in pixels.levels]
        values = [f.flatten(2) + e[:, None] for f, e in zip(pixels.levels, self.level_embed.weight, strict=True)]
        decoded = self.decoder(
            inputs_embeds=contents[:, None].expand(-1, len(maps[0]), -1),  # (Q, B, hidden)
            query_position_embeddings=positions[:, None].expand(-1, len(maps[0]), -1),
            multi_stage_positional_embeddings=[place.permute(2, 0, 1) for place in places],  # (h w, B, hidden)
            encoder_hidden_states=[value.permute(2, 0, 1) for value in values],
            pixel_embeddings=(smaller, self.pixel_decoder.mask_projection),
            feature_size_list=[tuple(level.shape[-2:]) for level in pixels.levels],
            return_dict=True,
        )
        first = 0 if every else -1
        classes = [self.classify(hidden.transpose(0, 1)).float() for hidden in decoded.intermediate_hidden_states]
        embeddings = torch.stack(decoded.masks_queries_logits[first:], 1)  # (B, stages, Q, hidden + 1)
        with torch.autocast(finest.device.type, enabled=False):
            masks = ReadMasks.apply(embeddings.flatten(1, 2), finest).unflatten(1, embeddings.shape[1:3])
        return Masks(classes[first:], list(masks.unbind(1)))

    def probabilities(self, output: Masks, size: tuple[int, int]) -> Tensor:
        """(B, K, h, w): for each class the sum over the queries of its probability times their mask; not above Q."""
        masks = F.interpolate(output.masks[-1], size, mode="bilinear", align_corners=False).sigmoid()
        return torch.einsum("bqk,bqhw->bkhw", output.classes[-1].softmax(-1)[..., :-1], masks)

    def counts(self, labels: Tensor) -> Tensor:
        """(2,): the masks of labels (B, h, w), one per image and class, and the images."""
        num_masks = sum(len(_classes(label)) for label in labels)
        return torch.tensor([num_masks, len(labels)], dtype=torch.float64, device=labels.device)

    def loss(self, output: Masks, labels: Tensor, counts: Tensor, seeds: Sequence[int]) -> Tensor:
        """All terms of all stages, weighted; labels: (B, h, w) int64, 255 in no mask; seeds: of each image's points."""
        num_masks, num_images = counts.float()
        num_queries = output.classes[0].shape[1]
        weights = num_masks + NO_OBJECT * (num_images * num_queries - num_masks)
        self.criterion.totals = num_masks.clamp(min=1), weights.clamp(min=NO_OBJECT)
        total = torch.zeros((), device=labels.device)
        alone = [(classes.split(1), masks.split(1)) for classes, masks in zip(*output, strict=True)]  # by image
        for i, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
            found = _classes(label)
            wanted = (label == found[:, None, None]).float()  # (n, h, w)
            stages = [
                {"class_queries_logits": classes[i], "masks_queries_logits": masks[i]} for classes, masks in alone
            ]
            with torch.random.fork_rng(devices=[label.device] if label.is_cuda else []):
                torch.manual_seed(seed)
                terms = self.criterion(
                    **stages[-1], mask_labels=[wanted], class_labels=[found], auxiliary_predictions=stages[:-1]
                )
            for name, term in terms.items():
                total = total + self.criterion.weight_dict[re.sub(r"_\d+$", "", name)] * term
        return total


def _classes(label: Tensor) -> Tensor:
    """The classes of a label (h, w), 255 left out."""
    found = label.unique()
    return found[found != IGNORE]


class _Matcher(Mask2FormerHungarianMatcher):
    """transformers' matching, of one image, with the points sampled for all its masks at once."""

    @torch.no_grad()
    def forward(self, masks: Tensor, classes: Tensor, mask_labels: list[Tensor], class_labels: list[Tensor]) -> list:
        """masks: (1, Q, h, w) and classes (1, Q, K + 1) logits; returns [(queries, labels)]."""
        points = 2 * torch.rand(1, self.num_points, 1, 2, device=masks.device) - 1
        x, t = (F.grid_sample(m, points, align_corners=False)[0, ..., 0] for m in (masks, mask_labels[0][None]))
        cost_mask = (F.softplus(x).sum(-1, keepdim=True) - x @ t.T) / self.num_points  # cross-entropy of (Q, n) pairs
        p = x.sigmoid()
        cost_dice = 1 - (2 * p @ t.T + 1) / (p.sum(-1, keepdim=True) + t.sum(-1) + 1)
        cost_class = -classes[0].softmax(-1)[:, class_labels[0]]
        cost = self.cost_mask * cost_mask + self.cost_class * cost_class + self.cost_dice * cost_dice
        largest = torch.finfo(cost.dtype).max
        chosen = linear_sum_assignment(cost.nan_to_num(largest, largest, largest).cpu())
        return [tuple(torch.as_tensor(indices, dtype=torch.int64) for indices in chosen)]


class _Criterion(Mask2FormerLoss):
    """The loss of one image, divided by the masks and the class weights of the whole step (`totals`)."""

    totals: tuple[Tensor, Tensor]

    def __init__(self, config: Mask2FormerConfig, weight_dict: dict[str, float]) -> None:
        super().__init__(config, weight_dict)
        self.matcher = _Matcher(config.class_weight, config.mask_weight, config.dice_weight, config.train_num_points)

    def get_num_masks(self, class_labels: Sequence[Tensor], device: torch.device) -> Tensor:
        return self.totals[0]

    def loss_masks(
        self, masks: Tensor, mask_labels: list[Tensor], indices: Sequence, num_masks: Tensor
    ) -> dict[str, Tensor]:
        (queries, labels), targets = indices[0], mask_labels[0]
        order = labels.argsort()
        masks, targets = masks[0, queries[order], None], targets[:, None]  # (n, 1, h, w), by label
        targets = targets if len(order) == len(targets) else targets[labels[order]]  # more labels than queries
        sampling = self.num_points, self.oversample_ratio, self.importance_sample_ratio
        with torch.no_grad():
            points = self.sample_points_using_uncertainty(masks, self.calculate_uncertainty, *sampling)
            wanted = sample_point(targets, points, align_corners=False)[:, 0]
        found = sample_point(masks, points, align_corners=False)[:, 0]
        return {
            "loss_mask": sigmoid_cross_entropy_loss(found, wanted, num_masks),
            "loss_dice": dice_loss(found, wanted, num_masks),
        }

    def loss_labels(self, logits: Tensor, class_labels: Sequence[Tensor], indices: Sequence) -> dict[str, Tensor]:
        matched = len(indices[0][0])
        own = matched + self.eos_coef * (logits.shape[1] - matched)
        mean = super().loss_labels(logits, class_labels, indices)["loss_cross_entropy"]
        return {"loss_cross_entropy": mean * own / self.totals[1]}


class _Parts(Mask2FormerPreTrainedModel):
    """The parts of transformers' Mask2Former that the head takes, with the initial values of the released heads."""

    def __init__(self, config: Mask2FormerConfig, channels: int) -> None:
        super().__init__(config)
        self.pixel_decoder = PixelDecoder(config, [channels] * len(STRIDES))
        self.decoder = Mask2FormerMaskedAttentionDecoder(config)
        self.decoder.mask_predictor = MaskPredictor(config.hidden_dim, config.num_attention_heads, config.hidden_dim)
        for layer in self.decoder.layers:
            layer.cross_attn = CrossAttention(config.hidden_dim, config.num_attention_heads)
        self.positions = Mask2FormerSinePositionEmbedding(config.hidden_dim // 2, normalize=True)
        weights = zip(("loss_cross_entropy", "loss_mask", "loss_dice"), LOSS_WEIGHTS, strict=True)
        self.criterion = _Criterion(config, dict(weights))
        self.criterion.register_buffer("empty_weight", self.criterion.empty_weight, persistent=False)
        self.post_init()
        for p in (*self.pixel_decoder.encoder.parameters(), *self.decoder.layers.parameters()):
            if p.dim() > 1:
                nn.init.xavier_normal_(p)
        for layer in self.decoder.layers:  # one (3 C, C) matrix in the release
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                nn.init.xavier_normal_(part.weight, gain=0.5**0.5)
        for module in self.pixel_decoder.encoder.modules():
            if isinstance(module, Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
                self._init_weights(module)
        for name, module in self.pixel_decoder.named_modules():
            if isinstance(module, nn.Conv2d):
                init = (
                    nn.init.xavier_uniform_ if "input_projections" in name else partial(nn.init.kaiming_uniform_, a=1)
                )
                init(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
