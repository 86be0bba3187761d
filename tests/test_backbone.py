"""A frozen backbone shows its features at every layer, lets a refiner change them, and never changes itself."""

import copy

import pytest
import torch
import transformers
from torch import nn

from setlib.backbone import FrozenBackbone
from setlib.weights import load_model

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
    "sam": (transformers.SamVisionModel, transformers.SamVisionConfig(**SAM), 0),
}
ALL = (1, 2, 3, 4)


def build(family: str) -> FrozenBackbone:
    torch.manual_seed(0)
    model, config, _ = FAMILIES[family]
    return FrozenBackbone(model(copy.deepcopy(config)), family, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


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


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
@every_family
def test_features_are_the_librarys_own(family, size):
    size = (32, 32) if family == "sam" else size  # SAM takes images of its own size only
    backbone, pixels = build(family), images(*size)
    grid = (size[0] // 8, size[1] // 8)
    plain, refined = backbone(pixels, layers=ALL), backbone(pixels, Refiner(), layers=ALL)
    normalised = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    states = backbone.model(normalised, output_hidden_states=True, **backbone._options(2, grid)).hidden_states
    assert list(plain) == list(ALL) and len(states) == 5
    for layer in ALL:
        expected = states[layer]
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
    backbone, layers = build(family), range(stop + 1, 5)
    plain, resumed = Refiner(layers, step=0.1), Refiner(layers, step=0.1)
    expected = backbone(images(), plain, layers=ALL)
    prefix = backbone.prefix(images(), stop, layers=ALL)
    assert prefix.stop == stop and list(prefix.maps) == list(ALL[:stop]) and not prefix.hidden.requires_grad
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
    assert all(not layer._forward_hooks and "forward" not in layer.__dict__ for layer in backbone._layers)


def test_a_copy_works_on_its_own_layers():
    backbone = build("dinov2")
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        twin.model.encoder.layer[0].layer_scale1.lambda1.zero_()
    assert not torch.equal(twin(images())[4], backbone(images())[4])
    assert twin._layers[0] is twin.model.encoder.layer[0]


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
        (r"\(30, 41\) .* patches of 8: pad them .* to \(32, 48\)", lambda b: b(images(30, 41))),
        (r"\(B, 3, h, w\), floats in \[0, 1\], got \(3, 32, 32\)", lambda b: b(images()[0])),
        (r"got \(2, 3, 32, 32\) of torch.uint8", lambda b: b(images().to(torch.uint8))),
        (r"refiner of layer 1 answered .*\(2, 4, 4, 15\), expected \(2, 4, 4, 16\)", lambda b: b(images(), broken)),
        (r"ends with layer 2 but the refiner refines \[1, 2\]",
         lambda b: b(images(), Refiner(), prefix=b.prefix(images(), 2))),
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
