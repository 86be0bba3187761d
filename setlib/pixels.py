"""Mask2Former's pixel decoder and mask predictor, with transformers' parameters and a leaner run of them.

The functions are transformers' to rounding, in less time and memory: a 1 x 1 map comes before an enlargement, not after
it; nothing is masked where nothing is padded; deformable attention keeps only its inputs for the gradient; masks are
read from the finest map through the queries, so that the map itself needs no projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskPredictor,
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderLayer,
)

Size = tuple[int, int]  # (h, w)


class Pixels(NamedTuple):
    """What the pixel decoder answers: its finest map (B, C, h, w), and levels (B, C, h, w) at strides 32, 16 and 8."""

    finest: Tensor
    levels: list[Tensor]


class PixelDecoder(Mask2FormerPixelDecoder):
    """Deformable attention over the maps at strides 32, 16 and 8, and one step of a feature pyramid to stride 4."""

    def forward(self, features: Sequence[Tensor], sizes: Sequence[Size]) -> Pixels:
        """features: four maps (B, C, h, w), brought bilinearly to the sizes of strides 4, 8, 16 and 32."""
        finest, *others = zip(features, sizes, strict=True)
        levels = [
            norm(resized(project, *other))
            for (project, norm), other in zip(self.input_projections, others[::-1], strict=True)
        ]
        places = [self.position_embedding(level.shape, level.device, torch.float32).flatten(2) for level in levels]
        places = torch.cat([p + e[:, None] for p, e in zip(places, self.level_embed, strict=True)], -1).transpose(1, 2)
        x = torch.cat([level.flatten(2) for level in levels], -1).transpose(1, 2)  # (B, N, C) of all levels
        sizes = [size for _, size in others[::-1]]
        centres = torch.cat([cell_centres(size, x.device) for size in sizes])
        for layer in self.encoder.layers:
            x = encode(layer, x, places, centres, sizes)
        lengths = [h * w for h, w in sizes]
        levels = [
            part.transpose(1, 2).unflatten(2, size) for part, size in zip(x.split(lengths, 1), sizes, strict=True)
        ]
        project, norm = self.adapter_1
        coarser = F.interpolate(levels[-1], finest[1], mode="bilinear", align_corners=False)
        return Pixels(self.layer_1(norm(resized(project, *finest)) + coarser).contiguous(), levels)


def resized(project: nn.Module, feature: Tensor, size: Size) -> Tensor:
    """A 1 x 1 map of a feature map (B, C, h, w) at another size, bilinear; the order of the two does not matter."""
    if feature.shape[-1] <= size[1]:
        return F.interpolate(project(feature), size, mode="bilinear", align_corners=False)
    return project(F.interpolate(feature, size, mode="bilinear", align_corners=False))


def cell_centres(size: Size, device: torch.device) -> Tensor:
    """(h * w, 2): x and y of every cell's centre, from -1 to 1 over the map."""
    y, x = ((2 * torch.arange(side, device=device) + 1) / side - 1 for side in size)
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)


def encode(
    layer: Mask2FormerPixelDecoderEncoderLayer, x: Tensor, places: Tensor, centres: Tensor, sizes: Sequence[Size]
) -> Tensor:
    """One layer of the encoder; x, places: (B, N, C)."""
    attention, batch = layer.self_attn, len(x)
    shape = (batch, -1, attention.n_heads, attention.n_levels, attention.n_points)
    queries = x + places
    value = attention.value_proj(x).unflatten(-1, (attention.n_heads, -1))  # (B, N, heads, d)
    weights = attention.attention_weights(queries).unflatten(-1, (attention.n_heads, -1)).softmax(-1).view(shape)
    offsets = attention.sampling_offsets(queries).view(*shape, 2)
    scale = torch.tensor([(2 / w, 2 / h) for h, w in sizes], device=x.device)[:, None]  # (levels, 1, 2)
    grids = centres[:, None, None, None] + offsets * scale  # (B, N, heads, levels, points, 2)
    grids = grids.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (levels, B heads, N, points, 2)
    weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)  # (levels, B heads, N, points)
    value = value.permute(0, 2, 3, 1).flatten(0, 1)  # (B heads, d, N)
    sampled = WeightedSamples.apply(value.float(), grids.float(), weights.float(), sizes)  # (B heads, d, N)
    attended = attention.output_proj(sampled.view(batch, -1, sampled.shape[-1]).transpose(1, 2))
    x = layer.self_attn_layer_norm(x + attended)
    return layer.final_layer_norm(x + layer.fc2(layer.fc1(x).relu()))


class WeightedSamples(torch.autograd.Function):
    """Weighted sum of bilinear samples of a map's levels; for the gradient the samples are taken again.

    value: (G, d, N), levels side by side; grids: (levels, G, n, points, 2) in [-1, 1]; weights: (levels, G, n, points).
    Returns (G, d, n).
    """

    @staticmethod
    def levels(value: Tensor, sizes: Sequence[Size]) -> Iterator[Tensor]:
        """(G, d, h, w) of each level."""
        parts = value.split([h * w for h, w in sizes], -1)
        return (part.unflatten(-1, size) for part, size in zip(parts, sizes, strict=True))

    @staticmethod
    def parts(value: Tensor) -> Iterator[slice]:
        """Two maps at a time on a CPU, whose cache holds them; all on a GPU."""
        step = len(value) if value.is_cuda else 2
        return (slice(start, start + step) for start in range(0, len(value), step))

    @staticmethod
    def forward(ctx: Any, value: Tensor, grids: Tensor, weights: Tensor, sizes: Sequence[Size]) -> Tensor:
        ctx.save_for_backward(value, grids, weights)
        ctx.sizes = sizes
        total = value.new_zeros(*value.shape[:2], grids.shape[2])
        for part in WeightedSamples.parts(value):
            for level, grid, weight in zip(WeightedSamples.levels(value[part], sizes), grids, weights, strict=True):
                sampled = F.grid_sample(level, grid[part], align_corners=False)
                total[part] += sampled.mul_(weight[part, None]).sum(-1)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, grids, weights = ctx.saved_tensors
        gradient = gradient.contiguous()[..., None]  # (G, d, n, 1)
        of_values, of_grids, of_weights = (torch.empty_like(saved) for saved in ctx.saved_tensors)
        for part in WeightedSamples.parts(value):
            levels = WeightedSamples.levels(value[part], ctx.sizes)
            targets = WeightedSamples.levels(of_values[part], ctx.sizes)
            for i, (level, target) in enumerate(zip(levels, targets, strict=True)):
                grid, from_above = grids[i, part], gradient[part]
                of_weights[i, part] = F.grid_sample(level, grid, align_corners=False).mul_(from_above).sum(1)
                of_samples = from_above * weights[i, part, None]
                of_level, of_grids[i, part] = torch.ops.aten.grid_sampler_2d_backward(
                    of_samples,
                    level,
                    grid,
                    0,
                    0,
                    False,
                    (True, True),  # bilinear, zeros outside
                )
                target.copy_(of_level)
        return of_values, of_grids, of_weights, None


class ReadMasks(torch.autograd.Function):
    """Mask logits (B, Q, h, w) of embeddings (B, Q, C + 1), the last one a constant, and a map (B, C, h, w).

    A mask that no label was matched with has no gradient: the others alone are multiplied.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, finest: Tensor) -> Tensor:
        ctx.save_for_backward(embeddings, finest)
        masks = torch.baddbmm(embeddings[..., -1:], embeddings[..., :-1], finest.flatten(2))
        return masks.unflatten(2, finest.shape[2:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        embeddings, finest = ctx.saved_tensors
        gradient = gradient.flatten(2)  # (B, Q, h w)
        of_embeddings, of_finest = torch.zeros_like(embeddings), torch.empty_like(finest)
        for i, image in enumerate(finest.flatten(2)):
            matched = gradient[i].any(-1)
            own = gradient[i, matched]  # (n, h w)
            of_embeddings[i, matched] = torch.cat([own @ image.T, own.sum(-1, keepdim=True)], 1)
            torch.mm(embeddings[i, matched, :-1].T, own, out=of_finest[i].flatten(1))
        return of_embeddings, of_finest


class MaskPredictor(Mask2FormerMaskPredictor):
    """What the queries read their masks with, later and all at once, and where the next layer may attend."""

    def forward(self, outputs: Tensor, pixels: tuple[dict, nn.Conv2d], size: Size) -> tuple[Tensor, Tensor]:
        """outputs: (Q, B, C). pixels: the finest map (B, C, h w) at every level's size, and its projection.

        Returns embeddings (B, Q, C + 1), the last one a constant, and the closed places (B heads, Q, h w).
        """
        maps, projection = pixels
        embeddings = self.mask_embedder(outputs.transpose(0, 1)).float()  # (B, Q, C)
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings @ torch.cat([projection.weight.flatten(1), projection.bias[:, None]], 1)
        with torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False):
            masks = torch.baddbmm(embeddings[..., -1:], embeddings[..., :-1], maps[size])
            closed = (masks.sigmoid() < 0.5)[:, None].expand(-1, self.num_heads, -1, -1).flatten(0, 1)
        return embeddings, closed


class CrossAttention(nn.MultiheadAttention):
    """Attention of the queries to a level, without the table of shares that nobody reads."""

    def forward(self, *args: Tensor, **options: Any) -> tuple[Tensor, None]:
        """(n, B, C) as `nn.MultiheadAttention`; None in place of the shares."""
        return super().forward(*args, **options, need_weights=False)
