"""What both heads keep: losses that add up, pixels that are ignored."""

import pytest
import torch
from torch.nn import functional as F

from setlib.data.labels import IGNORE
from setlib.heads import PerPixelHead
from setlib.mask2former import Mask2FormerHead

MAPS = torch.randn(4, 3, 4, 6, 24, generator=torch.Generator().manual_seed(1))  # (layers, B, H, W, C)
QUERIES = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=["per-pixel", "mask2former"])
def head(request):
    torch.manual_seed(0)
    if request.param == "per-pixel":
        return PerPixelHead(4, 24, 16, 5)
    sizes = {"attention_heads": 4, "pixel_layers": 2, "pixel_width": 48, "decoder_layers": 3, "decoder_width": 64}
    return Mask2FormerHead(24, 32, 5, **sizes)


def labels():
    coarse = torch.randint(0, 5, (3, 4, 6), generator=torch.Generator().manual_seed(3))
    found = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
    found[0, :10] = IGNORE
    return found


def test_the_parts_of_a_batch_add_up_to_its_loss(head):
    wanted = labels()
    whole = head.loss(head(MAPS, QUERIES), wanted, head.counts(wanted), [5, 6, 7])
    total = 0.0
    for images, seeds in (([0, 2], [5, 7]), ([1], [6])):
        output = head(MAPS[:, images], QUERIES)
        total = total + head.loss(output, wanted[images], head.counts(wanted), seeds)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(head.counts(wanted[i : i + 1]) for i in range(3)), head.counts(wanted))


def test_nothing_labelled_is_no_error(head):
    wanted = torch.full((3, 64, 96), IGNORE)
    loss = head.loss(head(MAPS, QUERIES), wanted, head.counts(wanted), [1, 2, 3])
    assert torch.isfinite(loss) and (loss == 0) == isinstance(head, PerPixelHead)  # masks: every query is no object
    wanted[0] = 3
    loss = head.loss(head(MAPS, QUERIES), wanted, head.counts(wanted), [1, 2, 3])
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


def test_ignored_pixels_do_not_count():
    head = PerPixelHead(4, 24, 16, 5)
    logits = torch.randn(1, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    half = torch.zeros(1, 8, 8, dtype=torch.int64)
    half[:, 4:] = IGNORE
    expected = F.cross_entropy(logits[:, :, :4], half[:, :4])
    torch.testing.assert_close(head.loss(logits, half, head.counts(half)), expected)
