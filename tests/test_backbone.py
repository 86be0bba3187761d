"""A frozen backbone shows its features at every layer, lets a refiner change them, and never changes itself."""

import copy
import importlib.util

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from setlib.backbone import FrozenBackbone, resize_patches
from setlib.refiners import build_refiner
from setlib.weights.load import load_model

SIZES = dict(
    hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, patch_size=8, image_size=32,
    initializer_range=0.2,
)  # fmt: skip
SAM = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
SAM |= dict(mlp_dim=32, output_channels=8, global_attn_indexes=[3], window_size=3)
# family -> model, configuration, tokens in front of the patches; every kind of dropout is on in training
FAMILIES = {
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config(**SIZES, drop_path_rate=0.5), 1),
    "registers": (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig(**SIZES, drop_path_rate=0.5),
        5,
    ),
    "dinov3": (
        transformers.DINOv3ViTModel,
        transformers.DINOv3ViTConfig(**SIZES, num_register_tokens=2, drop_path_rate=0.5, pos_embed_rescale=2.0),
        3,
    ),
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**SIZES, attention_dropout=0.5), 1),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**SIZES, attention_dropout=0.5), 0),
    "vit": (transformers.ViTModel, transformers.ViTConfig(**SIZES, hidden_dropout_prob=0.5), 1),
    "mae": (transformers.ViTMAEModel, transformers.ViTMAEConfig(**SIZES, hidden_dropout_prob=0.5), 1),
    "siglip2": (
        transformers.Siglip2VisionModel,
        transformers.Siglip2VisionConfig(**SIZES, num_patches=16, attention_dropout=0.5),
        0,
    ),
    "sam": (transformers.SamVisionModel, transformers.SamVisionConfig(**SAM), 0),
}
if importlib.util.find_spec("timm"):  # the optional extra
    EVA02 = dict(depth=4, embed_dim=16, num_heads=2, img_size=32, patch_size=8, dynamic_img_size=True)
    EVA02 |= dict(drop_path_rate=0.5)
    config = transformers.TimmWrapperConfig(architecture="eva02_small_patch14_224", model_args=EVA02)
    FAMILIES["eva02"] = (transformers.TimmWrapperModel, config, 1)
ALL = (1, 2, 3, 4)


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    kind, config, _ = FAMILIES[family]
    model = kind(copy.deepcopy(config))
    if family == "eva02":  # which has no option for larger weights
        for parameter in model.parameters():
            parameter.data.mul_(10 if parameter.dim() > 1 else 1)
    return model


def build(family: str, patch_size: int = 0) -> FrozenBackbone:
    return FrozenBackbone(make(family), family, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), patch_size=patch_size)


def images(height: int = 32, width: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


class Refiner(nn.Module):
    """Multiplies by 1 + a learnable step per layer and channel; at zero it is the identity."""

    def __init__(self, layers=ALL, step: float = 0.0) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.step = nn.Parameter(torch.full((5, 16), step))

    def forward(self, features: torch.Tensor, layer: int) -> torch.Tensor:
        assert layer in self.layers
        return features * (1 + self.step[layer])


def projected(maps: dict) -> torch.Tensor:
    """A scalar that norm layers do not flatten: every map against fixed random numbers."""
    generator = torch.Generator().manual_seed(2)
    return sum((value * torch.randn(value.shape, generator=generator)).sum() for value in maps.values())


every_family = pytest.mark.parametrize("family", FAMILIES)


def library_states(family: str, pixels: torch.Tensor, grid: tuple[int, int]) -> list[torch.Tensor]:
    """The hidden states of a fresh model, called as the library's own documentation says."""
    model = make(family).eval()
    if family == "mae":
        model.config.mask_ratio = 0.0
    normalised = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    inputs = {"pixel_values": normalised}
    if family in ("clip", "siglip", "vit", "mae"):
        inputs["interpolate_pos_encoding"] = True
    if family == "mae":
        inputs["noise"] = torch.arange(grid[0] * grid[1]).expand(len(pixels), -1)
    if family == "siglip2":
        arrays = [(255 * image).round().byte().permute(1, 2, 0).numpy() for image in pixels]
        processor = transformers.Siglip2ImageProcessor(
            patch_size=8, max_num_patches=grid[0] * grid[1], do_resize=False, image_mean=[0.4, 0.5, 0.6],
            image_std=[0.2, 0.25, 0.3],
        )  # fmt: skip
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
    backbone, grid = build(family), (size[0] // 8, size[1] // 8)
    pixels = (255 * images(*size)).round() / 255
    states = library_states(family, pixels, grid)
    plain, refined = backbone(pixels, layers=ALL), backbone(pixels, Refiner(), layers=ALL)
    assert list(plain) == list(ALL) and len(states) == 5
    for layer in ALL:
        expected = states[layer]
        if family == "eva02":  # the library keeps the patches alone
            expected = F.pad(expected, (0, 0, 1, 0))
        if expected.dim() == 3:
            assert expected.shape[1] - grid[0] * grid[1] == FAMILIES[family][2]
            expected = expected[:, FAMILIES[family][2] :].reshape(2, *grid, 16)
        torch.testing.assert_close(plain[layer], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(refined[layer], expected, rtol=1e-6, atol=1e-6)


@every_family
def test_a_refined_layer_changes_all_later_ones_and_no_earlier_one(family):
    backbone = build(family)
    plain, refined = backbone(images(), layers=ALL), backbone(images(), Refiner([2], step=0.5), layers=ALL)
    assert torch.equal(plain[1], refined[1])
    torch.testing.assert_close(refined[2], plain[2] * 1.5)
    for layer in (3, 4):
        assert (refined[layer] - plain[layer]).abs().mean() > 0.01
    assert (refined[3] - plain[3] * 1.5).abs().mean() > 0.01  # layer 3 computed on it


@every_family
def test_gradient_reaches_the_refiner_at_every_layer_and_nothing_else(family):
    backbone, refiner = build(family), Refiner(step=0.1)
    projected(backbone(images(), refiner)).backward()
    for layer in ALL:
        assert refiner.step.grad[layer].abs().min() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.parameters())


def test_no_graph_is_kept_before_the_first_refined_layer():
    maps = build("dinov2")(images(), Refiner([3]), layers=ALL)
    assert [maps[layer].requires_grad for layer in ALL] == [False, False, True, True]
    assert not build("dinov2").prefix(images().requires_grad_(), 2).hidden.requires_grad


@every_family
def test_class_and_register_tokens_pass_by_untouched(family):
    backbone, seen = build(family), {}

    def watch(module, inputs, output):
        seen.setdefault(id(module), []).append(output)

    num_prefix = FAMILIES[family][2]
    handle = backbone._layers[1].register_forward_hook(watch)
    backbone(images()), backbone(images(), Refiner([2], step=0.5))
    handle.remove()
    plain, refined = seen[id(backbone._layers[1])]
    if plain.dim() == 4:
        plain, refined = plain.flatten(1, 2), refined.flatten(1, 2)
    assert torch.equal(plain[:, :num_prefix], refined[:, :num_prefix])
    torch.testing.assert_close(refined[:, num_prefix:], plain[:, num_prefix:] * 1.5)


@every_family
def test_nothing_wakes_up_or_changes_in_training(family):
    backbone, refiner = build(family), Refiner(step=0.1)
    before = {key: value.clone() for key, value in [*backbone.named_parameters(), *backbone.named_buffers()]}
    expected = backbone(images(), refiner)[4]
    assert backbone.train() is backbone and backbone.training
    assert not any(module.training for module in backbone.model.modules())
    torch.testing.assert_close(backbone(images(), refiner)[4], expected, rtol=0, atol=0)
    nn.ModuleDict({"backbone": backbone}).train()
    backbone.model.train()
    torch.testing.assert_close(backbone(images(), refiner)[4], expected, rtol=0, atol=0)
    optimiser = torch.optim.AdamW([*backbone.parameters(), *refiner.parameters()], lr=0.1)
    projected(backbone(images(), refiner)).backward()
    optimiser.step()
    assert refiner.step[1:].ne(0.1).all()
    after = dict([*backbone.named_parameters(), *backbone.named_buffers()])
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@every_family
@pytest.mark.parametrize("stop", [1, 3])
def test_a_prefix_gives_the_same_values_and_gradients(family, stop):
    backbone, layers = build(family), range(stop, 5)  # the last frozen layer may be refined: it is kept unrefined
    plain, resumed = Refiner(layers, step=0.1), Refiner(layers, step=0.1)
    expected = backbone(images(), plain, layers=ALL)
    prefix = backbone.prefix(images(), stop, layers=ALL)
    assert (
        prefix.stop == stop
        and list(prefix.maps) == [layer for layer in ALL if layer != stop]
        and not prefix.hidden.requires_grad
    )
    maps = backbone(images(), resumed, layers=ALL, prefix=prefix)
    for layer in ALL:
        torch.testing.assert_close(maps[layer], expected[layer], rtol=1e-6, atol=1e-6)
    projected(expected).backward(), projected(maps).backward()
    torch.testing.assert_close(resumed.step.grad, plain.step.grad, rtol=1e-5, atol=1e-5)


def test_only_the_layers_asked_for_run():
    backbone, ran = build("dinov2"), []
    handles = [
        layer.norm1.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(backbone._layers, start=1)
    ]
    prefix = backbone.prefix(images(), stop=2)
    backbone(images(), layers=(3,), prefix=prefix)
    assert ran == [1, 2, 3]
    for handle in handles:
        handle.remove()


def test_one_image_does_not_depend_on_its_batch():
    backbone = build("dinov2")
    both, alone = backbone(images(), Refiner(step=0.2))[4], backbone(images()[:1], Refiner(step=0.2))[4]
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-5)


def test_layers_that_answer_with_a_tuple():
    expected, backbone = build("vit"), build("vit")
    for layer in backbone._layers:
        layer.forward = lambda *args, inner=layer.forward, **kwargs: (inner(*args, **kwargs), "attention")
    encoder = backbone.model

    def forward(pixel_values, interpolate_pos_encoding=False):
        hidden = encoder.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        for layer in encoder.layers:
            hidden = layer(hidden)[0]

    encoder.forward = forward
    refiner = Refiner([3, 4], step=0.1)
    for prefix in (None, backbone.prefix(images(), 2, layers=ALL)):
        maps = backbone(images(), refiner, layers=ALL, prefix=prefix)
        for layer, value in expected(images(), refiner, layers=ALL).items():
            torch.testing.assert_close(maps[layer], value, rtol=1e-6, atol=1e-6)
    assert "inner" in backbone._layers[0].forward.__kwdefaults__  # the replaced forward is back in place


def test_hooks_are_gone_even_after_an_error():
    backbone = build("dinov2")

    def fails(features, layer):
        raise RuntimeError("refiner failed")

    fails.layers = (2,)
    prefix = backbone.prefix(images(), 1)
    with pytest.raises(RuntimeError, match="refiner failed"):
        backbone(images(), fails, layers=(3,), prefix=prefix)
    assert all("forward" not in layer.__dict__ for layer in backbone._layers)


def test_a_copy_works_on_its_own_layers():
    backbone = build("dinov2")
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        twin.model.encoder.layer[0].layer_scale1.lambda1.zero_()
    assert not torch.equal(twin(images())[4], backbone(images())[4])
    assert twin._layers[0] is twin.model.encoder.layer[0]


@pytest.mark.parametrize("size", [(32, 32), (27, 43), (5, 60)])
@every_family
def test_sizes_that_do_not_divide_are_lengthened_by_their_last_pixels(family, size):
    backbone, pixels = build(family), images(*size)
    below, right = -size[0] % 8, -size[1] % 8
    expected = backbone(F.pad(pixels, (0, right, 0, below), mode="replicate"))[4]
    found = backbone(pixels)[4]
    assert found.shape == (2, (size[0] + below) // 8, (size[1] + right) // 8, 16) and torch.equal(found, expected)


def baseline(name: str, layers=ALL):
    torch.manual_seed(0)
    refiner = build_refiner(name, layers, 16, 7, 3, num_prompts=3, adapter_width=5, lora_rank=2)
    for parameter in refiner.parameters():
        nn.init.normal_(parameter, std=0.3)
    return refiner


@every_family
def test_checkpointing_changes_neither_values_nor_gradients(family):
    backbone, found, calls = build(family), [], []
    for checkpointing in (False, True):
        refiner, before = baseline("set", (2, 3, 4)), len(calls)
        refiner.register_forward_pre_hook(lambda module, given: calls.append(given[1]))
        maps = backbone(images(24, 48), refiner, layers=ALL, checkpointing=checkpointing)
        projected(maps).backward()
        assert calls[before:] == ([2, 3, 4, 4, 3, 2] if checkpointing else [2, 3, 4])  # once more, for the gradient
        found.append([*maps.values(), *(p.grad for p in refiner.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@every_family
def test_autocast_stays_close(family, kind):
    backbone, refiner = build(family), baseline("set", (3, 4))
    for parameter in refiner.parameters():
        parameter.data.mul_(1 / 3)  # with large ones a phase that rounding moves from pi to -pi decides all
    expected = backbone(images(), refiner)[4]
    with torch.autocast("cpu", kind):
        found = backbone(images(), refiner)[4].float()
        projected({4: found}).backward()
    assert F.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.97  # kernels differ in what they add up in
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in refiner.parameters())


@every_family
def test_prompts_are_read_and_do_not_leave_their_layer(family):
    backbone, refiner = build(family), baseline("vpt", (2, 4))
    if family == "sam":
        with pytest.raises(ValueError, match="need tokens in a row, but this backbone keeps a grid"):
            backbone(images(), refiner)
        return
    plain, prompted = backbone(images(24, 48), layers=ALL), backbone(images(24, 48), refiner, layers=ALL)
    assert torch.equal(plain[1], prompted[1]) and all(prompted[n].shape == plain[n].shape for n in ALL)
    assert all((prompted[n] - plain[n]).abs().mean() > 1e-4 for n in (2, 3, 4))
    projected(prompted).backward()
    assert refiner.tokens.grad.abs().sum((1, 2)).min() > 0
    prefix = backbone.prefix(images(24, 48), refiner.frozen_until(4), layers=ALL)
    torch.testing.assert_close(backbone(images(24, 48), refiner, prefix=prefix)[4], prompted[4], rtol=1e-6, atol=1e-6)


@every_family
def test_low_rank_adaptation_learns_in_a_copy(family):
    pytest.importorskip("peft")
    backbone, refiner = build(family), baseline("lora", (2, 4))
    if family == "eva02":  # the small one reads past its fused map; the large one has maps of its own
        with pytest.raises(ValueError, match="lora needs maps called q_proj"):
            backbone.adapted(refiner.adapt)
        return
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    adapted = backbone.adapted(refiner.adapt)
    plain = backbone(images(24, 48), layers=ALL)
    for layer, value in adapted(images(24, 48), refiner, layers=ALL).items():
        torch.testing.assert_close(value, plain[layer], rtol=1e-6, atol=1e-6)  # B is 0 at first
    learns = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert learns and all("lora_" in name for name in learns)
    nn.init.normal_(next(p for name, p in learns.items() if "lora_B" in name))
    changed = adapted(images(24, 48), refiner, layers=ALL)
    assert torch.equal(changed[1], plain[1]) and not torch.equal(changed[2], plain[2])
    projected(changed).backward()
    assert all(p.grad is not None for p in learns.values())
    assert adapted.fingerprint == backbone.fingerprint
    assert before.keys() == backbone.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


@every_family
def test_full_fine_tuning_reaches_the_first_layer_of_a_copy(family):
    backbone, refiner = build(family), build_refiner("full", ALL, 16, 7, 3)
    adapted = backbone.adapted(refiner.adapt)
    projected(adapted(images(24, 48), refiner, layers=ALL)).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted._layers[0].parameters())
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


def test_a_resized_kernel_sees_in_a_larger_picture_what_it_saw():
    one, other = build("dinov2"), build("dinov2", patch_size=12)
    smooth = F.interpolate(images(4, 6), (32, 48), mode="bicubic")
    larger = F.interpolate(smooth, (48, 72), mode="bicubic")
    small, large = (
        backbone.model.embeddings.patch_embeddings.projection._conv_forward(
            pixels, backbone.model.embeddings.patch_embeddings.projection.weight, None
        )
        for backbone, pixels in ((one, smooth), (other, larger))
    )
    assert F.cosine_similarity(small.flatten(), large.flatten(), 0) > 0.95
    gain = (large * small).sum() / small.square().sum()
    assert 0.9 * (12 / 8) ** 2 < gain < 1.1 * (12 / 8) ** 2  # as in the released conversion, not divided by the area


def test_load_names_and_normalises():
    backbone = FrozenBackbone.load("tiny-random", seed=3)
    assert (backbone.name, backbone.num_layers, backbone.channels, backbone.patch_size) == ("tiny-random", 4, 32, 8)
    assert backbone.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert backbone.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert backbone.state_dict().keys() == {f"model.{key}" for key in load_model("tiny-random").state_dict()}


def broken(features, layer):
    return features[..., :-1]


broken.layers = (1,)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"layers from 1 to 4 \(dinov2\), got \[0, 5\]", lambda b: b(images(), layers=(0, 4, 5))),
        (r"layers from 1 to 4 \(dinov2\), got \[7\]", lambda b: b(images(), Refiner([7]))),
        (r"layers from 1 to 4 \(dinov2\), got \[0\]", lambda b: b.prefix(images(), 0)),
        (r"\(B, 3, h, w\), floats in \[0, 1\], got \(3, 32, 32\)", lambda b: b(images()[0])),
        (r"got \(2, 3, 32, 32\) of torch.uint8", lambda b: b(images().to(torch.uint8))),
        (r"refiner of layer 1 answered .*\(2, 4, 4, 15\), expected \(2, 4, 4, 16\)", lambda b: b(images(), broken)),
        (r"ends with layer 2 but the refiner refines \[1\]",
         lambda b: b(images(), Refiner(), prefix=b.prefix(images(), 2))),
        (r"ends with layer 2 but the refiner refines \[2\]",
         lambda b: b(images(), baseline("vpt", [2]), prefix=b.prefix(images(), 2))),
        (r"holds no maps of layers \[1\]", lambda b: b(images(), layers=(1, 4), prefix=b.prefix(images(), 2))),
        (r"prefix is of other images: .*\(2, 13, 16\), it holds \(2, 17, 16\)",
         lambda b: b(images(24, 32), prefix=b.prefix(images(), 2))),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(message, call):
    with pytest.raises(ValueError, match=message):
        call(build("dinov2"))


def test_a_model_without_a_column_of_layers_is_refused():
    model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    model.config.num_hidden_layers = 9
    with pytest.raises(ValueError, match="ResNetModel has no column of equal layers"):
        FrozenBackbone(model)
