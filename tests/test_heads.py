"""Heads: losses that add up, ignored pixels, and a Mask2Former that is transformers' in all it computes."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.mask2former import modeling_mask2former as theirs

from setlib.data.labels import IGNORE
from setlib.heads import PerPixelHead
from setlib.mask2former import CLASS_WEIGHT, DICE_WEIGHT, MASK_WEIGHT, NO_OBJECT, Mask2FormerHead, Masks

LOSS_WEIGHTS = (CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT)
SMALL = {"attention_heads": 4, "pixel_layers": 2, "pixel_width": 48, "decoder_layers": 3, "decoder_width": 64}


def mask_head(num_queries=0, seed=0):
    torch.manual_seed(seed)
    head = Mask2FormerHead(24, 32, 5, num_queries, **SMALL)
    for p in head.parameters():  # so that every part of it matters
        p.data += 0.1 * torch.randn_like(p)
    return head


def features(batch=2, grid=(4, 6), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *grid, 24, generator=generator) for _ in range(4)]


def queries():
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(2))


def labels(batch=2, size=(64, 96)):
    coarse = torch.randint(0, 5, (batch, 4, 6), generator=torch.Generator().manual_seed(3))
    found = coarse.repeat_interleave(size[0] // 4, 1).repeat_interleave(size[1] // 6, 2)
    found[0, :10] = IGNORE
    return found


def heads():
    torch.manual_seed(0)
    return {"per-pixel": PerPixelHead(4, 24, 16, 5), "mask2former": mask_head()}


@pytest.mark.parametrize("name", ["per-pixel", "mask2former"])
def test_the_parts_of_a_batch_add_up_to_its_loss(name):
    head, found, wanted = heads()[name], features(3), labels(3)
    whole = head.loss(head(found, queries()), wanted, head.counts(wanted), [5, 6, 7])
    total = 0.0
    for images, seeds in (([0, 2], [5, 7]), ([1], [6])):
        output = head([f[images] for f in found], queries())
        total = total + head.loss(output, wanted[images], head.counts(wanted), seeds)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(head.counts(wanted[i : i + 1]) for i in range(3)), head.counts(wanted))


@pytest.mark.parametrize("name", ["per-pixel", "mask2former"])
def test_nothing_labelled_is_no_error(name):
    head, wanted = heads()[name], torch.full((2, 64, 96), IGNORE)
    loss = head.loss(head(features(), queries()), wanted, head.counts(wanted), [1, 2])
    assert torch.isfinite(loss) and (loss == 0) == (name == "per-pixel")  # masks: every query is no object
    wanted[0] = 3
    loss = head.loss(head(features(), queries()), wanted, head.counts(wanted), [1, 2])
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


def test_the_papers_numbers():
    """Mask2Former's: loss and cost weights, points; initial values as the released code draws them."""
    torch.manual_seed(0)
    head = Mask2FormerHead(64, 256, 19)
    criterion, matcher = head.criterion, head.criterion.matcher
    assert LOSS_WEIGHTS == (2.0, 5.0, 5.0)
    assert (matcher.cost_class, matcher.cost_mask, matcher.cost_dice) == (2.0, 5.0, 5.0)
    assert (criterion.eos_coef, NO_OBJECT, criterion.empty_weight[-1].item()) == (0.1, 0.1, pytest.approx(0.1))
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


def test_ignored_pixels_do_not_count():
    head = heads()["per-pixel"]
    logits = torch.randn(1, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    half = torch.zeros(1, 8, 8, dtype=torch.int64)
    half[:, 4:] = IGNORE
    expected = F.cross_entropy(logits[:, :, :4], half[:, :4])
    torch.testing.assert_close(head.loss(logits, half, head.counts(half)), expected)


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (2, 3)])
def test_an_image_does_not_depend_on_its_batch(grid):
    head = mask_head()
    together = head(features(3, grid), queries())
    for i in range(3):
        alone = head([f[i : i + 1] for f in features(3, grid)], queries())
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
    module.queries_embedder = torch.nn.Embedding.from_pretrained(queries())
    module.queries_features = torch.nn.Embedding.from_pretrained(head.query_features(queries()).detach())
    return pixels, module


def test_it_computes_what_transformers_computes_and_so_do_its_gradients():
    head, maps = mask_head(), [f.permute(0, 3, 1, 2) for f in features()]
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]
    resized = [
        F.interpolate(m, size, mode="bilinear", align_corners=False) for m, size in zip(maps, sizes, strict=True)
    ]
    pixels, module = released(head)
    answer = pixels(resized, output_attentions=False, output_hidden_states=False, return_dict=True)
    expected = module(list(answer.multi_scale_features), answer.mask_features)
    found = head(features(), queries())
    for stage in range(4):
        masks = expected.masks_queries_logits[stage]
        torch.testing.assert_close(found.masks[stage], masks, rtol=1e-4, atol=1e-5)
        classes = head.classify(expected.intermediate_hidden_states[stage].transpose(0, 1))
        torch.testing.assert_close(found.classes[stage], classes, rtol=1e-4, atol=1e-5)
    weight = torch.randn(found.masks[-1].shape, generator=torch.Generator().manual_seed(4))
    weight[:, 2:5] = 0  # queries that no label was matched with
    (found.masks[-1] * weight).sum().backward()
    (expected.masks_queries_logits[-1] * weight).sum().backward()
    for ours, p in zip(head.pixel_decoder.parameters(), pixels.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, p.grad, rtol=1e-3, atol=1e-4 * max(1.0, p.grad.abs().max().item()))
    for ours, p in zip(head.decoder.parameters(), module.decoder.parameters(), strict=True):
        if p.grad is not None and ours.grad is not None:
            torch.testing.assert_close(ours.grad, p.grad, rtol=1e-3, atol=1e-4 * max(1.0, p.grad.abs().max().item()))


def test_the_loss_is_transformers(monkeypatch):
    """At points that are the same for all masks: which mask gets which random points is of no account."""
    points = torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(5))
    sample = "sample_points_using_uncertainty"
    monkeypatch.setattr(theirs.Mask2FormerLoss, sample, lambda self, masks, *_: points.expand(len(masks), -1, -1))
    head, wanted = mask_head(), labels()
    names = ("loss_cross_entropy", "loss_mask", "loss_dice")
    criterion = theirs.Mask2FormerLoss(head.pixel_decoder.config, dict(zip(names, LOSS_WEIGHTS, strict=True)))
    output = head(features(), queries())
    for i in range(2):
        classes = wanted[i].unique()[wanted[i].unique() != IGNORE]
        stages = [
            {"masks_queries_logits": masks[i : i + 1], "class_queries_logits": logits[i : i + 1]}
            for logits, masks in zip(*output, strict=True)
        ]
        torch.manual_seed(9)
        masks = [(wanted[i] == classes[:, None, None]).float()]
        terms = criterion(**stages[-1], mask_labels=masks, class_labels=[classes], auxiliary_predictions=stages[:-1])
        expected = sum(weight * terms[key] for name, weight in zip(names, LOSS_WEIGHTS, strict=True) for key in terms
                       if key.startswith(name))  # fmt: skip
        alone, one = (
            Masks([c[i : i + 1] for c in output.classes], [m[i : i + 1] for m in output.masks]),
            wanted[i : i + 1],
        )
        torch.testing.assert_close(head.loss(alone, one, head.counts(one), [9]), expected, rtol=1e-5, atol=1e-5)


def test_the_points_of_an_image_come_from_its_seed_alone():
    head, output, wanted = mask_head(), mask_head()(features(), queries()), labels()
    counts, before = head.counts(wanted), torch.get_rng_state()
    one, same, other = (head.loss(output, wanted, counts, seeds) for seeds in ([1, 2], [1, 2], [3, 4]))
    assert one == same and one != other
    assert torch.equal(torch.get_rng_state(), before)


def test_queries_come_from_tokens_or_are_learned():
    linked, learned = mask_head(), mask_head(num_queries=9)
    assert linked.query_embed is None and learned(features()).classes[-1].shape == (2, 9, 6)
    assert not torch.equal(linked(features(), queries()).masks[-1], linked(features(), 2 * queries()).masks[-1])


def test_probabilities_are_masks_times_classes():
    head = mask_head()
    classes = torch.full((1, 2, 6), -20.0)
    classes[0, 0, 3] = classes[0, 1, 5] = 20.0  # query 0 names class 3, query 1 no object
    masks = torch.stack([torch.full((4, 4), 20.0), torch.full((4, 4), 20.0)])[None]
    masks[0, 0, :, 2:] = -20.0
    found = head.probabilities(Masks([classes], [masks]), (10, 16))
    assert found.shape == (1, 5, 10, 16)
    torch.testing.assert_close(found[0, 3, :, :6], torch.ones(10, 6), atol=1e-3, rtol=0)
    assert found[0, 3, :, 11:].max() < 1e-3 and found[0, [0, 1, 2, 4]].max() < 1e-6


def test_without_a_gradient_the_last_stage_alone_answers():
    head = mask_head().eval()
    with torch.no_grad():
        last = head(features(), queries())
    every = head(features(), queries())
    assert len(last.masks) == len(last.classes) == 1
    torch.testing.assert_close(last.masks[0], every.masks[-1])
    torch.testing.assert_close(last.classes[0], every.classes[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_says_nearly_the_same_and_masks_are_whole(dtype):
    head, wanted = mask_head(), labels()
    expected = head(features(), queries())
    with torch.autocast("cpu", dtype):
        found = head(features(), queries())
    for one, other in zip((*found.masks, *found.classes), (*expected.masks, *expected.classes), strict=True):
        assert one.dtype == torch.float32
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99
    head.loss(found, wanted, head.counts(wanted), [1, 2]).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in head.parameters())
