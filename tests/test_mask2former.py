"""The mask head: transformers' function, loss and gradients, each image for itself."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.mask2former import modeling_mask2former as theirs

from setlib.data.labels import IGNORE
from setlib.mask2former import Mask2FormerHead, Masks

SMALL = {"attention_heads": 4, "pixel_layers": 2, "pixel_width": 48, "decoder_layers": 3, "decoder_width": 64}
QUERIES = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))


def mask_head(num_queries=0):
    torch.manual_seed(0)
    head = Mask2FormerHead(24, 32, 5, num_queries, **SMALL)
    for p in head.parameters():  # so that every part of it matters
        p.data += 0.1 * torch.randn_like(p)
    return head


def features(batch=2, grid=(4, 6)):
    return torch.randn(4, batch, *grid, 24, generator=torch.Generator().manual_seed(1))


def labels():
    coarse = torch.randint(0, 5, (2, 4, 6), generator=torch.Generator().manual_seed(3))
    found = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
    found[0, :10] = IGNORE
    return found


def test_the_papers_numbers():
    """Mask2Former's: loss and cost weights, points; initial values as the released code draws them."""
    torch.manual_seed(0)
    head = Mask2FormerHead(64, 256, 19)
    criterion, matcher = head.criterion, head.criterion.matcher
    assert (matcher.cost_class, matcher.cost_mask, matcher.cost_dice, criterion.eos_coef) == (2.0, 5.0, 5.0, 0.1)
    points = (criterion.num_points, criterion.oversample_ratio, criterion.importance_sample_ratio)
    assert points == (12544, 3.0, 0.75) and matcher.num_points == 12544
    assert (len(head.pixel_decoder.encoder.layers), len(head.decoder.layers)) == (6, 9)
    layer, first = head.decoder.layers[3], head.pixel_decoder.encoder.layers[2]
    in_proj = (2 / (256 + 768)) ** 0.5  # Xavier's, of one matrix for query, key and value
    for weight, expected in (
        (layer.self_attn.q_proj.weight, in_proj),
        (layer.self_attn.v_proj.weight, in_proj),
        (layer.cross_attn.in_proj_weight, in_proj),
        (layer.fc1.weight, (2 / (256 + 2048)) ** 0.5),
        (first.fc1.weight, (2 / (256 + 1024)) ** 0.5),
        (head.pixel_decoder.level_embed, 1.0),
        (head.pixel_decoder.layer_1[0].weight, (1 / (9 * 256)) ** 0.5),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.1)
    assert first.self_attn.sampling_offsets.weight.abs().max() == 0
    assert first.self_attn.sampling_offsets.bias.abs().max() == 4  # the four points lie at 1 to 4 cells


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (2, 3)])
def test_an_image_does_not_depend_on_its_batch(grid):
    head, maps = mask_head(), features(3, grid)
    together = head(maps, QUERIES)
    for i in range(3):
        alone = head(maps[:, i : i + 1], QUERIES)
        for many, one in zip((*together.classes, *together.masks), (*alone.classes, *alone.masks), strict=True):
            torch.testing.assert_close(many[i : i + 1], one, rtol=1e-4, atol=1e-5)
    assert together.masks[-1].shape == (3, 7, 4 * grid[0], 4 * grid[1]) and len(together.masks) == 4


def released(head):
    """transformers' own pixel decoder and transformer module with the head's weights and the tests' queries."""
    config = head.pixel_decoder.config
    pixels, module = theirs.Mask2FormerPixelDecoder(config, [24] * 4), theirs.Mask2FormerTransformerModule(32, config)
    pixels.load_state_dict(head.pixel_decoder.state_dict())
    module.decoder.load_state_dict(head.decoder.state_dict())
    module.level_embed.load_state_dict(head.level_embed.state_dict())
    module.queries_embedder = torch.nn.Embedding.from_pretrained(QUERIES)
    module.queries_features = torch.nn.Embedding.from_pretrained(head.query_features(QUERIES).detach())
    return pixels, module


def test_it_computes_what_transformers_computes_and_so_do_its_gradients():
    head, sizes = mask_head(), [(16, 24), (8, 12), (4, 6), (2, 3)]
    pixels, module = released(head)
    resized = [
        F.interpolate(maps.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
        for maps, size in zip(features(), sizes, strict=True)
    ]
    answer = pixels(resized, output_attentions=False, output_hidden_states=False, return_dict=True)
    expected = module(list(answer.multi_scale_features), answer.mask_features)
    found = head(features(), QUERIES)
    for stage in range(4):
        masks = expected.masks_queries_logits[stage]
        torch.testing.assert_close(found.masks[stage], masks, rtol=1e-4, atol=1e-5)
        classes = head.classify(expected.intermediate_hidden_states[stage].transpose(0, 1))
        torch.testing.assert_close(found.classes[stage], classes, rtol=1e-4, atol=1e-5)
    weight = torch.randn(found.masks[-1].shape, generator=torch.Generator().manual_seed(4))
    (found.masks[-1] * weight).sum().backward()
    (expected.masks_queries_logits[-1] * weight).sum().backward()
    for ours, other in ((head.pixel_decoder, pixels), (head.decoder, module.decoder)):
        for (name, p), (_, q) in zip(ours.named_parameters(), other.named_parameters(), strict=True):
            atol = 1e-4 * max(1.0, q.grad.abs().max().item())
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def test_the_loss_is_transformers_from_each_images_seed():
    head, wanted = mask_head(), labels()
    criterion = theirs.Mask2FormerLoss(head.pixel_decoder.config, {})
    output = head(features(), QUERIES)
    for i in range(2):
        classes = wanted[i].unique()[wanted[i].unique() != IGNORE]
        masks = [(wanted[i] == classes[:, None, None]).float()]
        alone = Masks([c[i : i + 1] for c in output.classes], [m[i : i + 1] for m in output.masks])
        torch.manual_seed(9)
        expected = 0.0
        for logits, stage in zip(*alone, strict=True):
            terms = criterion(stage, logits, masks, [classes])
            expected += 2 * terms["loss_cross_entropy"] + 5 * terms["loss_mask"] + 5 * terms["loss_dice"]
        one = wanted[i : i + 1]
        torch.testing.assert_close(head.loss(alone, one, head.counts(one), [9]), expected, rtol=1e-5, atol=1e-5)


def test_the_points_of_an_image_come_from_its_seed_alone(monkeypatch):
    head, wanted = mask_head(), labels()
    output, counts, before = head(features(), QUERIES), head.counts(wanted), torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeds the GPUs"))
    one, same, other = (head.loss(output, wanted, counts, seeds) for seeds in ([1, 2], [1, 2], [3, 4]))
    assert one == same and one != other
    assert torch.equal(torch.get_rng_state(), before)


def test_queries_come_from_tokens_or_are_learned():
    linked = mask_head()
    assert mask_head(num_queries=9)(features()).classes[-1].shape == (2, 9, 6)
    assert not torch.equal(linked(features(), QUERIES).masks[-1], linked(features(), 2 * QUERIES).masks[-1])


def test_probabilities_are_masks_times_classes():
    head = mask_head()
    classes = torch.full((1, 2, 6), -20.0)
    classes[0, 0, 3] = classes[0, 1, 5] = 20.0  # query 0 names class 3, query 1 no object
    masks = torch.full((1, 2, 4, 4), 20.0)
    masks[0, 0, :, 2:] = -20.0
    found = head.probabilities(Masks([classes], [masks]), (10, 16))
    assert found.shape == (1, 5, 10, 16)
    torch.testing.assert_close(found[0, 3, :, :6], torch.ones(10, 6), atol=1e-3, rtol=0)
    assert found[0, 3, :, 11:].max() < 1e-3 and found[0, [0, 1, 2, 4]].max() < 1e-6


def test_without_a_gradient_the_last_stage_alone_answers():
    head = mask_head()
    every = head(features(), QUERIES)
    with torch.no_grad():
        last = head(features(), QUERIES)
    for one, stages in zip(last, every, strict=True):
        assert len(one) == 1
        torch.testing.assert_close(one[0], stages[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_says_nearly_the_same_and_masks_are_whole(dtype):
    head, wanted = mask_head(), labels()
    expected = head(features(), QUERIES)
    with torch.autocast("cpu", dtype):
        found = head(features(), QUERIES)
    for one, other in zip((*found.masks, *found.classes), (*expected.masks, *expected.classes), strict=True):
        assert one.dtype == torch.float32
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99
    head.loss(found, wanted, head.counts(wanted), [1, 2]).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in head.parameters())
