"""The deformable attention that takes the place of transformers' own is equal to it, values and gradients."""

import copy

import pytest
import torch
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

from setlib._mask2former import DeformableAttention


@pytest.mark.parametrize("sizes", [[(16, 24), (8, 12), (4, 6), (2, 3)], [(9, 7), (5, 4), (3, 2), (2, 1)]])
def test_it_is_that_of_the_library(sizes):
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=4, encoder_layers=2
    )
    library = Mask2FormerPixelDecoder(config, [12] * 4)
    for p in library.parameters():
        p.data += 0.1 * torch.randn_like(p)
    own = copy.deepcopy(library)
    for layer in own.encoder.layers:
        layer.self_attn = DeformableAttention(layer.self_attn)
    answers = []
    for decoder in (library, own):
        maps = [torch.randn(2, 12, *size, generator=torch.Generator().manual_seed(1)) for size in sizes]
        maps = [one.requires_grad_() for one in maps]
        found = decoder(maps)
        parts = [found.mask_features, *found.multi_scale_features]
        sum(part.square().sum() for part in parts).backward()
        gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
        answers.append((parts, [one.grad for one in maps], gradients))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-3, atol=1e-3)
    assert answers[0][2].keys() == answers[1][2].keys()
