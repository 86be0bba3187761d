"""The parts that replace transformers': gradients against finite differences."""

import torch
from torch.nn import functional as F

from setlib.pixels import ReadMasks, WeightedSamples, cell_centres, resized

SIZES = [(2, 3), (3, 2)]


def inputs():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3, 4, 12, generator=generator, dtype=torch.float64)
    grids = 2.4 * torch.rand(2, 3, 5, 2, 2, generator=generator, dtype=torch.float64) - 1.2
    weights = torch.rand(2, 3, 5, 2, generator=generator, dtype=torch.float64)
    return [x.requires_grad_() for x in (value, grids, weights)]


def test_weighted_samples():
    value, grids, weights = inputs()
    expected = 0
    for level, grid, weight, size in zip(value.split([6, 6], -1), grids, weights, SIZES, strict=True):
        sampled = F.grid_sample(level.unflatten(-1, size), grid, align_corners=False)
        expected = expected + (sampled * weight[:, None]).sum(-1)
    torch.testing.assert_close(WeightedSamples.apply(value, grids, weights, SIZES), expected)
    assert torch.autograd.gradcheck(lambda *x: WeightedSamples.apply(*x, SIZES), (value, grids, weights))


def test_masks_are_read_and_unmatched_ones_cost_no_gradient():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    finest = torch.randn(2, 4, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = torch.einsum("bqc,bchw->bqhw", embeddings[..., :4], finest) + embeddings[..., 4:, None]
    torch.testing.assert_close(ReadMasks.apply(embeddings, finest), expected)
    assert torch.autograd.gradcheck(ReadMasks.apply, (embeddings, finest))
    assert torch.autograd.gradcheck(lambda e, f: ReadMasks.apply(e, f)[:, 1:], (embeddings, finest))


def test_a_map_of_one_cell_and_an_enlargement_may_change_places():
    torch.manual_seed(0)
    project, feature = torch.nn.Conv2d(3, 2, 1), torch.randn(1, 3, 4, 5)
    for size in ((16, 20), (4, 5), (2, 3)):
        expected = project(F.interpolate(feature, size, mode="bilinear", align_corners=False))
        torch.testing.assert_close(resized(project, feature, size), expected)


def test_cell_centres():
    expected = torch.tensor([[-0.5, -2 / 3], [0.5, -2 / 3], [-0.5, 0], [0.5, 0], [-0.5, 2 / 3], [0.5, 2 / 3]])
    torch.testing.assert_close(cell_centres((3, 2), torch.device("cpu")), expected)
