"""Private: Mask2Former's deformable attention, leaner and equal to transformers' by test, and its initial values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoder,
    Mask2FormerMaskPredictor,
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerPreTrainedModel,
)

Size = tuple[int, int]  # (h, w)
CACHED = 2  # maps of one attention head that a CPU samples at a time: its cache holds them


class DeformableAttention(nn.Module):
    """Takes the place of an attention module of transformers' pixel decoder and works with its parameters.

    A CPU samples a few maps at a time, and samples are taken again for the gradient instead of being kept. With
    transformers' own module a training step of the paper's model (DINOv2-S, SET, 2 crops of 512 x 512, one CPU thread)
    takes 1.10 times the time and 1.37 times the memory, a prediction 1.27 and 1.36 times.
    """

    def __init__(self, attention: Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention) -> None:
        super().__init__()
        self.n_heads, self.n_levels, self.n_points = attention.n_heads, attention.n_levels, attention.n_points
        self.sampling_offsets, self.attention_weights = attention.sampling_offsets, attention.attention_weights
        self.value_proj, self.output_proj = attention.value_proj, attention.output_proj

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes_list: Sequence[Size] = (),
        level_start_index: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, None]:
        """As transformers', (B, N, C) with N cells of all levels, for maps without padding; shares are not returned."""
        batch, num_cells, _ = hidden_states.shape
        shape = (batch, num_cells, self.n_heads, self.n_levels, self.n_points)
        queries = hidden_states + position_embeddings
        weights = self.attention_weights(queries).unflatten(-1, (self.n_heads, -1)).softmax(-1).view(shape)
        cells = torch.tensor([(w, h) for h, w in spatial_shapes_list], device=queries.device)[:, None]  # (levels, 1, 2)
        offsets = self.sampling_offsets(queries).view(*shape, 2) / cells
        grids = 2 * (reference_points[:, :, None, :, None] + offsets) - 1  # (B, N, heads, levels, points, 2)
        grids = grids.permute(3, 0, 2, 1, 4, 5).flatten(1, 2).float()  # (levels, B heads, N, points, 2)
        weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2).float()  # (levels, B heads, N, points)
        value = self.value_proj(encoder_hidden_states).unflatten(-1, (self.n_heads, -1))
        value = value.permute(0, 2, 3, 1).flatten(0, 1).float()  # (B heads, d, N)
        step = len(value) if value.is_cuda else CACHED
        parts = zip(value.split(step), grids.split(step, 1), weights.split(step, 1), strict=True)
        sampled = [
            checkpoint(weighted_samples, *part, spatial_shapes_list, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        attended = torch.cat(sampled).view(batch, -1, num_cells).transpose(1, 2)  # (B, N, C)
        return self.output_proj(attended), None


def weighted_samples(value: Tensor, grids: Tensor, weights: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Weighted sums of bilinear samples over points and levels, (G, d, n).

    value: (G, d, N), levels side by side; grids: (levels, G, n, points, 2) in [-1, 1]; weights: (levels, G, n, points).
    """
    total = value.new_zeros(())
    levels = value.split([h * w for h, w in sizes], -1)
    for level, size, grid, weight in zip(levels, sizes, grids, weights, strict=True):
        sampled = F.grid_sample(level.unflatten(-1, size), grid, align_corners=False)  # (G, d, n, points)
        total = total + (sampled * weight[:, None]).sum(-1)
    return total


class InitialParts(Mask2FormerPreTrainedModel):
    """The parts of transformers' Mask2Former that the head takes, with the initial values of the released heads."""

    def __init__(self, config: Mask2FormerConfig, channels: int, num_maps: int) -> None:
        super().__init__(config)
        self.pixel_decoder = Mask2FormerPixelDecoder(config, [channels] * num_maps)
        self.decoder = Mask2FormerMaskedAttentionDecoder(config)
        # Thrown away: with their draws a seed keeps its initial values
        Mask2FormerMaskPredictor(config.hidden_dim, config.num_attention_heads, config.hidden_dim)
        for _ in self.decoder.layers:
            nn.MultiheadAttention(config.hidden_dim, config.num_attention_heads)
        self.post_init()
        for p in (*self.pixel_decoder.encoder.parameters(), *self.decoder.layers.parameters()):
            if p.dim() > 1:
                nn.init.xavier_normal_(p)
        for layer in self.decoder.layers:  # one (3 C, C) matrix in the release
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                nn.init.xavier_normal_(part.weight, gain=0.5**0.5)
        for layer in self.pixel_decoder.encoder.layers:
            self._init_weights(layer.self_attn)
        for projection, _ in self.pixel_decoder.input_projections:
            nn.init.xavier_uniform_(projection.weight)
        for conv in (
            self.pixel_decoder.mask_projection,
            self.pixel_decoder.adapter_1[0],
            self.pixel_decoder.layer_1[0],
        ):
            nn.init.kaiming_uniform_(conv.weight, a=1)
