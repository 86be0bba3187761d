"""A frozen backbone shows its features at every layer, lets a refiner change them, and never changes itself."""

import importlib.util

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from setlib.backbone import FrozenBackbone
from setlib.features import FrozenFeatures
from setlib.refiners import build_refiner
from setlib.tokens import Refiner
from setlib.weights.convert import resize_patches

SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"patch_size": 8, "image_size": 32, "initializer_range": 0.2}
SAM = {"mlp_dim": 32, "output_channels": 8, "global_attn_indexes": [3], "window_size": 3}
FAMILIES = {  # model, tokens in front of the patches, and options: every kind of dropout is on in training
    "dinov2": (transformers.Dinov2Model, 1, {"drop_path_rate": 0.5}),
    "registers": (transformers.Dinov2WithRegistersModel, 5, {"drop_path_rate": 0.5}),
    "dinov3": (
        transformers.DINOv3ViTModel,
        3,
        {"num_register_tokens": 2, "drop_path_rate": 0.5, "pos_embed_rescale": 2.0},
    ),
    "clip": (transformers.CLIPVisionModel, 1, {"attention_dropout": 0.5}),
    "siglip": (transformers.SiglipVisionModel, 0, {"attention_dropout": 0.5}),
    "siglip2": (transformers.Siglip2VisionModel, 0, {"num_patches": 16, "attention_dropout": 0.5}),
    "vit": (transformers.ViTModel, 1, {"hidden_dropout_prob": 0.5}),
    "mae": (transformers.ViTMAEModel, 1, {"hidden_dropout_prob": 0.5}),
    "sam": (transformers.SamVisionModel, 0, SAM),
}
if importlib.util.find_spec("timm"):  # the optional extra
    EVA02 = {"depth": 4, "embed_dim": 16, "num_heads": 2, "img_size": 32, "patch_size": 8, "dynamic_img_size": True}
    EVA02 = {"architecture": "eva02_small_patch14_224", "model_args": EVA02 | {"drop_path_rate": 0.5}}
    FAMILIES["eva02"] = (transformers.TimmWrapperModel, 1, EVA02)
ALL, MEAN, STD = (1, 2, 3, 4), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    kind, _, options = FAMILIES[family]
    model = kind(kind.config_class(**(options if family == "eva02" else SIZES | options)))
    if family == "eva02":  # which has no option for larger weights
        for parameter in model.parameters():
            parameter.data.mul_(10 if parameter.dim() > 1 else 1)
    return model


def build(family: str, patch_size: int = 0) -> FrozenBackbone:
    model = make(family)
    if patch_size:
        resize_patches(model, patch_size)
    return FrozenBackbone(model, family, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def opened(family: str) -> tuple[FrozenBackbone, list[nn.Module]]:
    """A backbone and its layers in order."""
    layers: list[nn.Module] = []
    return build(family).adapted(lambda model, found: layers.extend(found)), layers


def images(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


class Steps(Refiner):
    """Multiplies by 1 + a learnable step per layer and channel; at zero it is the identity."""

    def __init__(self, layers=ALL, step: float = 0.0) -> None:
        super().__init__(layers)
        self.step = nn.Parameter(torch.full((5, 16), step))

    def forward(self, features: torch.Tensor, layer: int) -> torch.Tensor:
        assert layer in self.layers
        return features * (1 + self.step[layer])


def random_refiner(name: str, layers=ALL, std: float = 0.3) -> Refiner:
    torch.manual_seed(0)
    refiner = build_refiner(name, layers, 16, 7, 3, num_prompts=3, adapter_width=5, lora_rank=2)
    for parameter in refiner.parameters():
        nn.init.normal_(parameter, std=std)
    return refiner


def projected(maps: dict) -> torch.Tensor:
    """A scalar that norm layers do not flatten: every map against fixed random numbers."""
    generator = torch.Generator().manual_seed(2)
    return sum((value * torch.randn(value.shape, generator=generator)).sum() for value in maps.values())


def close(maps: dict, expected: dict) -> None:
    """The same layers in the same order, equal but for rounding."""
    assert list(maps) == list(expected)
    for layer, value in expected.items():
        torch.testing.assert_close(maps[layer], value, rtol=1e-5, atol=5e-6)


every_family = pytest.mark.parametrize("family", FAMILIES)


def library_states(family: str, pixels: torch.Tensor, grid: tuple[int, int]) -> list[torch.Tensor]:
    """The hidden states of a fresh model, called as the library's own documentation says."""
    model = make(family).eval()
    if family == "mae":
        model.config.mask_ratio = 0.0
    normalised = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    inputs = {"pixel_values": normalised}
    if family in ("clip", "siglip", "vit", "mae"):
        inputs["interpolate_pos_encoding"] = True
    if family == "mae":
        inputs["noise"] = torch.arange(grid[0] * grid[1]).expand(len(pixels), -1)
    if family == "siglip2":
        arrays = [(255 * image).round().byte().permute(1, 2, 0).numpy() for image in pixels]
        processor = transformers.Siglip2ImageProcessor(
            patch_size=8, max_num_patches=grid[0] * grid[1], do_resize=False, image_mean=MEAN, image_std=STD
        )
        inputs = dict(processor(arrays, return_tensors="pt"))
    if family == "sam" and grid != (4, 4):
        positions = model.vision_encoder.pos_embed.permute(0, 3, 1, 2)
        resized = F.interpolate(positions, grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
        model.vision_encoder.pos_embed = nn.Parameter(resized)
        model.vision_encoder.patch_embed.image_size = tuple(pixels.shape[2:])
    if family == "eva02":
        return [None, *model.timm_model.forward_intermediates(normalised, norm=False, output_fmt="NLC")[1]]
    return model(**inputs, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
@every_family
def test_features_are_the_librarys_own(family, size):
    backbone, grid, num_prefix = build(family), (size[0] // 8, size[1] // 8), FAMILIES[family][1]
    pixels = (255 * images(*size)).round() / 255
    expected = library_states(family, pixels, grid)
    assert len(expected) == 5  # the tokens that the first layer reads, and what each of four answers
    if family == "eva02":  # the library keeps the patches alone
        num_prefix = 0
    if expected[4].dim() == 3:
        assert expected[4].shape[1] == num_prefix + grid[0] * grid[1]
        expected = [None, *(state[:, num_prefix:].reshape(2, *grid, 16) for state in expected[1:])]
    for refiner in (None, Steps()):
        close(backbone(pixels, refiner, layers=ALL), {layer: expected[layer] for layer in ALL})


@every_family
def test_a_refined_layer_changes_all_later_ones_and_no_earlier_one(family):
    """And patches alone: class and register tokens pass by untouched. No graph is kept before it."""
    (backbone, layers), seen, num_prefix = opened(family), [], FAMILIES[family][1]
    layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain, refined = (backbone(images(), refiner, layers=ALL) for refiner in (None, Steps([2], step=0.5)))
    assert torch.equal(plain[1], refined[1])
    torch.testing.assert_close(refined[2], plain[2] * 1.5)
    assert all((refined[layer] - plain[layer]).abs().mean() > 0.01 for layer in (3, 4))
    assert (refined[3] - plain[3] * 1.5).abs().mean() > 0.01  # layer 3 computed on it
    before, after = (tokens.flatten(1, -2) for tokens in seen)
    assert torch.equal(before[:, :num_prefix], after[:, :num_prefix])
    torch.testing.assert_close(after[:, num_prefix:], before[:, num_prefix:] * 1.5)
    assert [refined[layer].requires_grad for layer in ALL] == [False, True, True, True]


@every_family
def test_the_refiner_learns_at_every_layer_and_nothing_else_wakes_up_or_changes(family):
    backbone, refiner = build(family), Steps(step=0.1)
    before = {key: value.clone() for key, value in [*backbone.named_parameters(), *backbone.named_buffers()]}
    expected = backbone(images(), refiner)[4]
    assert backbone.train() is backbone and backbone.training
    assert not any(module.training for module in backbone.model.modules())
    assert torch.equal(backbone(images(), refiner)[4], expected)
    nn.ModuleDict({"backbone": backbone}).train()
    backbone.model.train()
    assert torch.equal(backbone(images(), refiner)[4], expected)
    optimiser = torch.optim.AdamW([*backbone.parameters(), *refiner.parameters()], lr=0.1)
    projected(backbone(images(), refiner)).backward()
    optimiser.step()
    assert all(refiner.step.grad[layer].abs().min() > 0 for layer in ALL)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.parameters())
    after = dict([*backbone.named_parameters(), *backbone.named_buffers()])
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@every_family
@pytest.mark.parametrize("stop", [1, 3])
def test_frozen_features_give_the_same_values_and_gradients(family, stop):
    backbone, layers = build(family), range(stop, 5)  # the last frozen layer may be refined: it is kept unrefined
    plain, resumed = Steps(layers, step=0.1), Steps(layers, step=0.1)
    frozen = backbone.frozen_features(images().requires_grad_(), stop, layers=ALL)
    assert frozen.stop == stop and list(frozen.maps) == list(ALL) and not frozen.hidden.requires_grad
    expected = backbone(images(), plain, layers=ALL)
    maps = backbone(images(), resumed, layers=ALL, frozen=frozen)
    close(maps, expected)
    close(backbone(images(), layers=ALL, frozen=frozen), backbone(images(), layers=ALL))
    projected(expected).backward(), projected(maps).backward()
    torch.testing.assert_close(resumed.step.grad, plain.step.grad, rtol=1e-5, atol=1e-5)


@every_family
def test_frozen_features_go_on_from_earlier_ones(family):
    backbone = build(family)
    first = backbone.frozen_features(images(), 1)
    on, whole = (backbone.frozen_features(images(), 3, ALL[2:], frozen) for frozen in (first, None))
    assert on.stop == 3 and first.stop == 1
    close({3: on.hidden} | on.maps, {3: whole.hidden} | whole.maps)


def test_only_the_layers_asked_for_run_and_they_may_answer_with_a_tuple():
    (backbone, layers), ran = opened("dinov2"), []
    expected = backbone(images(), layers=(3,))
    for number, layer in enumerate(layers, start=1):
        layer.register_forward_hook(lambda _, __, answer, number=number: ran.append(number) or (answer, "attention"))
    close(backbone(images(), layers=(3,), frozen=backbone.frozen_features(images(), stop=2)), expected)
    assert ran == [1, 2, 3]


@pytest.mark.parametrize("size", [(32, 32), (27, 43), (5, 60)])
@every_family
def test_sizes_that_do_not_divide_are_lengthened_by_their_last_pixels(family, size):
    backbone, pixels = build(family), images(*size)
    below, right = -size[0] % 8, -size[1] % 8
    expected = backbone(F.pad(pixels, (0, right, 0, below), mode="replicate"))[4]
    found = backbone(pixels)[4]
    assert found.shape == (2, (size[0] + below) // 8, (size[1] + right) // 8, 16) and torch.equal(found, expected)


@every_family
def test_gradient_checkpointing_changes_neither_values_nor_gradients(family):
    backbone, found, calls = build(family), [], []
    for checkpointing in (False, True):
        refiner, before = random_refiner("set", (2, 3, 4)), len(calls)
        refiner.register_forward_pre_hook(lambda module, given: calls.append(given[1]))
        maps = backbone(images(24, 48), refiner, layers=ALL, gradient_checkpointing=checkpointing)
        projected(maps).backward()
        assert calls[before:] == ([2, 3, 4, 4, 3, 2] if checkpointing else [2, 3, 4])  # once more, for the gradient
        found.append([*maps.values(), *(p.grad for p in refiner.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@every_family
def test_autocast_stays_close(family, kind):
    # with larger weights a phase that rounding moves from pi to -pi decides all
    backbone, refiner = build(family), random_refiner("set", (3, 4), std=0.1)
    expected = backbone(images(), refiner)[4]
    with torch.autocast("cpu", kind):
        found = backbone(images(), refiner)[4].float()
        projected({4: found}).backward()
    assert F.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.97  # kernels differ in what they add up in
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in refiner.parameters())


@every_family
def test_prompts_are_read_and_do_not_leave_their_layer(family):
    backbone, refiner = build(family), random_refiner("vpt", (2, 4))
    if family == "sam":
        with pytest.raises(ValueError, match="need tokens in a row, but this backbone keeps a grid"):
            backbone(images(), refiner)
        return
    plain, prompted = backbone(images(24, 48), layers=ALL), backbone(images(24, 48), refiner, layers=ALL)
    assert torch.equal(plain[1], prompted[1]) and all(prompted[n].shape == plain[n].shape for n in ALL)
    assert all((prompted[n] - plain[n]).abs().mean() > 1e-4 for n in (2, 3, 4))
    projected(prompted).backward()
    assert refiner.tokens.grad.abs().sum((1, 2)).min() > 0
    frozen = backbone.frozen_features(images(24, 48), refiner.frozen_until(4), layers=ALL)
    close(backbone(images(24, 48), refiner, layers=ALL, frozen=frozen), prompted)


@every_family
def test_low_rank_adaptation_learns_in_a_copy(family):
    pytest.importorskip("peft")
    backbone, refiner = build(family), random_refiner("lora", (2, 4))
    if family == "eva02":  # the small one reads past its fused map; the large one has maps of its own
        with pytest.raises(ValueError, match="lora needs maps called q_proj"):
            backbone.adapted(refiner.adapt)
        return
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    adapted, plain = backbone.adapted(refiner.adapt), backbone(images(24, 48), layers=ALL)
    close(adapted(images(24, 48), refiner, layers=ALL), plain)  # B is 0 at first
    learns = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert learns and all("lora_" in name for name in learns)
    nn.init.normal_(next(p for name, p in learns.items() if "lora_B" in name))
    changed = adapted(images(24, 48), refiner, layers=ALL)
    assert torch.equal(changed[1], plain[1]) and not torch.equal(changed[2], plain[2])
    projected(changed).backward()
    assert all(p.grad is not None for p in learns.values())
    assert adapted.fingerprint == backbone.fingerprint and before.keys() == backbone.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


@every_family
def test_full_fine_tuning_reaches_the_pixels_of_a_copy(family):
    backbone, refiner = build(family), build_refiner("full", ALL, 16, 7, 3)
    adapted = backbone.adapted(refiner.adapt)
    projected(adapted(images(24, 48), refiner, layers=ALL)).backward()
    embedding = next(module for module in adapted.model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    assert embedding.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


@every_family
def test_patches_of_another_size(family):
    if family == "siglip2":
        with pytest.raises(ValueError, match="without a convolution: leave model.patch_size at 0"):
            resize_patches(build(family).model, 12)
        return
    backbone = build(family, patch_size=12)
    assert backbone.patch_size == 12 and backbone(images(48, 60))[4].shape == (2, 4, 5, 16)
    kernel, resized = (
        next(module for module in model.modules() if isinstance(module, nn.Conv2d)).weight
        for model in (make(family), backbone.model)
    )
    torch.testing.assert_close(resized, F.interpolate(kernel, (12, 12), mode="bicubic", align_corners=False))


class Narrower(Refiner):
    def forward(self, features: torch.Tensor, layer: int) -> torch.Tensor:
        return features[..., :-1]


def two(backbone: FrozenBackbone) -> FrozenFeatures:
    return backbone.frozen_features(images(), 2)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"layers from 1 to 4 \(dinov2\), got \[0, 5\]", lambda b: b(images(), layers=(0, 4, 5))),
        (r"layers from 1 to 4 \(dinov2\), got \[7\]", lambda b: b(images(), Steps([7]))),
        (r"layers from 1 to 4 \(dinov2\), got \[0\]", lambda b: b.frozen_features(images(), 0)),
        (r"\(B, 3, h, w\), floats in \[0, 1\], got \(3, 32, 32\)", lambda b: b(images()[0])),
        (r"got \(2, 3, 32, 32\) of torch.uint8", lambda b: b(images().to(torch.uint8))),
        (r"refiner of layer 1 returned .*\(2, 4, 4, 15\), expected \(2, 4, 4, 16\)",
         lambda b: b(images(), Narrower([1]))),
        (r"end with layer 2, but the refiner refines \(1, 2, 3, 4\)", lambda b: b(images(), Steps(), frozen=two(b))),
        (r"end with layer 2, but the refiner refines \(2,\)",
         lambda b: b(images(), random_refiner("vpt", [2]), frozen=two(b))),
        (r"hold no maps of layers \[1\]", lambda b: b(images(), layers=(1, 4), frozen=two(b))),
        (r"of other images: expected tokens \(2, 13, 16\), they hold \(2, 17, 16\)",
         lambda b: b(images(24, 32), frozen=two(b))),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected_and_leave_the_model_as_it_was(message, call):
    backbone = build("dinov2")
    with pytest.raises(ValueError, match=message):
        call(backbone)
    assert torch.equal(backbone.model(images())[0], make("dinov2").requires_grad_(False).eval()(images())[0])


def test_what_is_no_plain_transformer_is_refused():
    model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    model.config.num_hidden_layers = 9
    with pytest.raises(ValueError, match="ResNetModel has no column of equal layers"):
        FrozenBackbone(model)
    with pytest.raises(ValueError, match="YolosModel has no patches in its last tokens: expected a plain ViT"):
        FrozenBackbone(transformers.YolosModel(transformers.YolosConfig(**SIZES | {"image_size": [32, 32]})))
