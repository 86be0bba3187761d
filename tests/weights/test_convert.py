"""Weight files in Meta's and timm's layouts become the same function; anything else is refused in one sentence."""

import re

import pytest
import torch
import transformers
from safetensors.torch import save_file

from setlib.backbone import FrozenBackbone
from setlib.weights.convert import from_file
from setlib.weights.load import load_model

SIZES = dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, patch_size=8, image_size=32)
MODELS = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)),
    "swiglu": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, use_swiglu_ffn=True)),
    "registers": lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SIZES)),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(**SIZES, intermediate_size=384, layer_norm_eps=1e-6), add_pooling_layer=False
    ),
}
# What Meta's DINOv2 and timm call the parts, found in the model's own tree rather than in the converter's tables.
PLAIN = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}


def scrambled(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape) if p.dim() > 1 else 0.5 + 0.1 * torch.randn(p.shape))
    return model


def original(model) -> dict[str, torch.Tensor]:
    """A model's weights as Meta's DINOv2 (and timm's ViT) writes them."""
    weights = {}
    for name, module in PLAIN.items():
        for key, value in model.state_dict().items():
            if key == name or key.startswith(f"{name}."):
                weights[module + key.removeprefix(name)] = value
    layers = model.encoder.layer if hasattr(model, "encoder") else model.layers
    for i, layer in enumerate(layers):
        found = dict(layer.named_modules())
        attention = found["attention"]
        for kind in ("weight", "bias"):
            parts = [getattr(getattr(attention, f"{x}_proj"), kind) for x in "qkv"]
            weights[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            weights[f"blocks.{i}.attn.proj.{kind}"] = getattr(attention.o_proj, kind)
            norms = [m for m in layer.children() if isinstance(m, torch.nn.LayerNorm)]
            for n, norm in enumerate(norms, 1):
                weights[f"blocks.{i}.norm{n}.{kind}"] = getattr(norm, kind)
            maps = [m for m in layer.mlp.children() if isinstance(m, torch.nn.Linear)]
            if len(maps) == 3:
                gate, up, down = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
                weights[f"blocks.{i}.mlp.w12.{kind}"] = torch.cat([getattr(gate, kind), getattr(up, kind)])
                weights[f"blocks.{i}.mlp.w3.{kind}"] = getattr(down, kind)
            else:
                for n, linear in enumerate(maps, 1):
                    weights[f"blocks.{i}.mlp.fc{n}.{kind}"] = getattr(linear, kind)
        for n in (1, 2):
            if scale := found.get(f"layer_scale{n}"):
                weights[f"blocks.{i}.ls{n}.gamma"] = scale.lambda1
    return {name: value.detach().clone().contiguous() for name, value in weights.items()}


def timm_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as timm writes it: packed SwiGLU under other names, the class token's position in the token."""
    renamed = {name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): v for name, v in weights.items()}
    renamed.pop("mask_token", None)
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:].contiguous()
    unused = ("head.weight", "decoder_embed.weight", "decoder_blocks.0.norm1.weight", "decoder_pos_embed")  # MAE's too
    return renamed | {name: torch.zeros(3) for name in unused}


def features(model, size=(24, 40)):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return list(FrozenBackbone(model)(images, layers=(1, 2)).values())


@pytest.mark.parametrize("form", ["meta", "timm", "wrapped", "safetensors", "half"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_converted_model_is_the_same_function(kind, form, tmp_path):
    model, path = scrambled(kind), tmp_path / "weights.pth"
    weights = original(model)
    if form == "timm":
        weights = timm_names(weights)
    if form == "wrapped":
        weights = {f"module.backbone.{name}": value for name, value in weights.items()} | {
            "module.other": torch.ones(1)
        }
        weights = {"teacher": weights, "epoch": 3}
    if form == "half":  # weights that half precision holds exactly, so that nothing may change
        model.half().float()
        weights = {name: value.half() for name, value in original(model).items()}
    if form == "safetensors":
        save_file(weights, path := tmp_path / "weights.safetensors")
    else:
        torch.save(weights, path)
    made = load_model(str(path))
    assert type(made) is type(model) and not any(p.requires_grad for p in made.parameters())
    for found, expected in zip(features(made), features(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_a_converted_patch_size_is_read_off_the_weights(tmp_path):
    torch.save(
        original(scrambled("dinov2")) | {"patch_embed.proj.weight": torch.zeros(192, 3, 16, 16)}, tmp_path / "w.pth"
    )
    model = from_file(tmp_path / "w.pth")
    assert FrozenBackbone(model).patch_size == 16 and model.config.image_size == 64


class Harm:
    def __reduce__(self):
        return (print, ("unpickled",))


WRONG = {
    "nothing": (lambda w: b"nothing", "cannot be read .*expected safetensors or .pth of tensors"),
    "pickle": (lambda w: {"a": Harm()}, "has no patch_embed.proj.weight"),
    "other": (lambda w: {"a": torch.ones(1)}, "has no patch_embed.proj.weight, as DINOv2 in Meta's layout"),
    "list": (lambda w: [torch.ones(1)], "has no patch_embed.proj.weight"),
    "missing": (lambda w: {k: v for k, v in w.items() if k != "blocks.1.attn.proj.bias"}, r"o_proj.bias missing"),
    "left over": (lambda w: w | {"blocks.0.extra.weight": torch.ones(1)}, "extra.weight left over for Dinov2Model"),
    "grid": (lambda w: w | {"pos_embed": torch.zeros(1, 7, 192)}, "has 7 positions, which are not"),
    "token": (lambda w: {k: v for k, v in w.items() if k != "cls_token"}, "cls_token missing"),
    "shape": (lambda w: w | {"blocks.0.norm1.weight": torch.ones(5)}, "the sizes of its tensors do not fit"),
    "half a block": (lambda w: {k: v for k, v in w.items() if "0.mlp.fc2.weight" not in k}, "do not fit together"),
    "flat": (lambda w: w | {"pos_embed": torch.ones(())}, "do not fit together"),
    "width": (lambda w: w | {"patch_embed.proj.weight": torch.ones(100, 3, 8, 8)}, "it is 100 wide, no multiple of 64"),
    "keys": (lambda w: {0: torch.ones(1)}, "has no patch_embed.proj.weight"),
    "dot": (lambda w: b".", "cannot be read"),
    "sam": (lambda w: w | {"blocks.0.attn.rel_pos_h": torch.ones(1)}, "looks like SAM in its original layout"),
    "no mlp": (lambda w: {k: v for k, v in w.items() if ".mlp." not in k}, "its tensors do not fit together"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_anything_else_is_one_sentence(wrong, tmp_path, capsys):
    change, message = WRONG[wrong]
    content, path = change(original(scrambled("dinov2"))), tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not re.search("unpickled|weights_only", capsys.readouterr().out + str(caught.value))
