"""Parity with numbers that the public releases of Rein and SET computed (float32, CPU): the same functions."""

import json
import os
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from setlib import __main__ as cli
from setlib.backbone import FrozenBackbone
from setlib.checkpoint import load_segmenter
from setlib.experiment import Experiment
from setlib.inference import predict
from setlib.mask2former import Mask2FormerHead
from setlib.refiners import build_refiner
from setlib.release import checkpoint as release
from setlib.release import names, parity
from setlib.run import Run
from setlib.weights.convert import under

GOLDEN = Path(__file__).parent / "golden" / "token_modules.npz"
HEAD = Path(__file__).parent / "golden" / "mask2former_head.npz"


def spoil(folder, key, change):
    values = dict(np.load(GOLDEN))
    values[key] = change(values[key])
    np.savez(folder / "spoilt.npz", **values)
    return folder / "spoilt.npz"


def test_outputs_queries_and_gradients_are_the_releases():
    rows = parity.verify(GOLDEN)
    assert max(row["difference"] for row in rows) < parity.TOLERANCE
    items = {row["item"] for row in rows}
    for module, gradients in (("rein", 7), ("released_set", 12)):
        assert {f"{module}/output/B{b}/layer{layer}" for b in (1, 2, 4) for layer in range(3)} <= items
        assert f"{module}/queries" in items and f"{module}/grad_input/B2/layer1" in items
        assert sum(item.startswith(f"{module}/grad/") for item in items) == gradients


@pytest.mark.parametrize("key", ["rein/output/B4/layer2", "released_set/grad/learnable_tokens2", "rein/queries"])
def test_a_difference_is_found(tmp_path, key, capsys):
    path = spoil(tmp_path, key, lambda value: value + 1e-3)
    assert [row["item"] for row in parity.verify(path) if row["difference"] > parity.TOLERANCE] == [key]
    assert cli.main(["verify", str(GOLDEN)]) == 0
    assert cli.main(["verify", str(path)]) == 1
    assert key in capsys.readouterr().err


def test_what_is_no_golden_file_is_one_sentence(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name, words in (("text.npz", "cannot be read as an npz"), ("other.npz", "holds no golden numbers")):
        assert cli.main(["verify", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err


def test_parameters_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"not the parameters of rein: merge.bias of shape .* should be of"):
        parity.verify(spoil(tmp_path, "rein/param/merge.bias", lambda value: value[:-1]))


def write_release(path, set_tokens=True, classes=19, change=None, layers=3, **content):
    """A small checkpoint as mmengine writes it, with objects of classes that are not installed here."""
    torch.manual_seed(0)
    refiner = build_refiner("set-released" if set_tokens else "rein", range(1, layers + 1), 24, 7, 4, query_channels=32)
    head = Mask2FormerHead(24, 32, classes, attention_heads=4, pixel_layers=2, pixel_width=48, decoder_layers=3,
                           decoder_width=64)  # fmt: skip
    tokens = names.tokens_to_release(refiner.state_dict(), "set-released" if set_tokens else "rein")
    state = {f"backbone.reins.{name}": value for name, value in tokens.items()}
    head = names.head_to_release(head.state_dict())
    state |= {f"decode_head.{name}": value for name, value in head.items()}
    if change:
        change(state)
    module = types.ModuleType("mmengine_stub")
    module.Buffer = type("Buffer", (), {"__module__": "mmengine_stub", "__qualname__": "Buffer"})
    sys.modules["mmengine_stub"] = module
    try:
        buffer = module.Buffer()
        buffer.values, buffer.mean = np.zeros(3), np.float64(2)
        torch.save({"meta": {"seed": np.float64(1)}, "state_dict": state, "message_hub": buffer} | content, path)
    finally:
        del sys.modules["mmengine_stub"]
    return state


def test_the_head_is_the_releases():
    rows = parity.verify(HEAD)
    assert max(row["difference"] for row in rows) < parity.TOLERANCE
    items = {row["item"] for row in rows}
    assert {f"{kind}_logits/50x93/stage{stage}" for kind in ("class", "mask") for stage in range(4)} <= items
    assert cli.main(["verify", str(HEAD)]) == 0


@pytest.mark.parametrize("key", ["mask_logits/50x93/stage2", "class_logits/50x93/stage0"])
def test_a_difference_in_the_head_is_found(tmp_path, key):
    values = dict(np.load(HEAD))
    values[key] = values[key] + 1e-3 * np.abs(values[key]).clip(1)
    np.savez(tmp_path / "spoilt.npz", **values)
    rows = parity.verify(tmp_path / "spoilt.npz")
    assert [row["item"] for row in rows if row["difference"] > parity.TOLERANCE] == [key]
    changed = "param/decode_head.pixel_decoder.encoder.layers.1.ffn.layers.1.weight"
    np.savez(tmp_path / "spoilt.npz", **dict(np.load(HEAD)) | {changed: 1.1 * np.load(HEAD)[changed]})
    assert max(row["difference"] for row in parity.verify(tmp_path / "spoilt.npz")) > 1e-3


@pytest.mark.parametrize("set_tokens", [True, False])
def test_a_release_comes_in_and_goes_out_again(tmp_path, set_tokens):
    state = write_release(tmp_path / "release.pth", set_tokens, layers=4)
    words = ["--backbone", "tiny-random", "--out"]
    assert cli.main(["import", str(tmp_path / "release.pth"), *words, str(tmp_path / "run")]) == 0
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "again.pth")]) == 0
    again = torch.load(tmp_path / "again.pth", weights_only=True)["state_dict"]
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    assert cli.main(["import", str(tmp_path / "again.pth"), *words, str(tmp_path / "run2")]) == 0
    for name in ("experiment.json", "model/model.safetensors", "model/config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "run2" / name).read_bytes()


def test_an_imported_model_is_the_release(tmp_path):
    """On a backbone of the release's width: its tokens and its head say what they said."""
    state = write_release(tmp_path / "release.pth", layers=4)
    run = release.import_checkpoint(tmp_path / "release.pth", tmp_path / "run", "tiny-random")
    config = ViTConfig(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, patch_size=16)
    torch.manual_seed(1)
    backbone = FrozenBackbone(ViTModel(config), "tiny")
    model = load_segmenter(run.path, backbone)
    tokens = {n.removeprefix("backbone.reins."): v for n, v in state.items() if n.startswith("backbone.reins.")}
    head = {n.removeprefix("decode_head."): v for n, v in state.items() if n.startswith("decode_head.")}
    refiner = release.load_tokens("set-released", tokens)
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = backbone(images, refiner, model.feature_layers)
        expected = release.load_head(head)(list(maps.values()), refiner.queries())
        torch.testing.assert_close(model(images).masks[-1], expected.masks[-1])
        torch.testing.assert_close(model(images).classes[-1], expected.classes[-1])
    assert predict(model, np.zeros((64, 96, 3), np.uint8)).shape == (64, 96)


def write_baseline(path, queries=("query_embed", "query_feat")):
    """The golden head as that of a frozen backbone: learned queries, no tokens, the nineteen classes."""
    values = {name: torch.from_numpy(value) for name, value in np.load(HEAD).items() if name.startswith("param/")}
    state = {name.removeprefix("param/"): value for name, value in values.items() if "querys2feat" not in name}
    state |= {f"decode_head.{name}.weight": torch.randn(7, 32) for name in queries}
    state |= {"decode_head.cls_embed.weight": torch.randn(20, 32), "decode_head.cls_embed.bias": torch.randn(20)}
    torch.save({"meta": {}, "state_dict": state}, path)
    return state


def test_a_head_alone_comes_in_as_none_and_goes_out_again(tmp_path, capsys):
    state = write_baseline(tmp_path / "head.pth")
    assert (
        cli.main(["import", str(tmp_path / "head.pth"), "--backbone", "tiny-random", "--out", f"{tmp_path}/run"]) == 0
    )
    assert "none on tiny-random" in capsys.readouterr().out
    run = Run.load(tmp_path / "run")
    assert (run.experiment.model.refiner, run.experiment.model.num_tokens) == ("none", 7)
    config = ViTConfig(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, patch_size=16)
    model = load_segmenter(run.path, FrozenBackbone(ViTModel(config), "tiny"))
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = list(model.backbone(images, model.refiner, model.feature_layers).values())
        expected = release.load_head({n.removeprefix("decode_head."): v for n, v in state.items()})(maps)
        torch.testing.assert_close(model(images).masks[-1], expected.masks[-1])
        torch.testing.assert_close(model(images).classes[-1], expected.classes[-1])
    assert cli.main(["export", str(run.path), "--out", f"{tmp_path}/again.pth"]) == 0
    again = torch.load(tmp_path / "again.pth", weights_only=True)["state_dict"]
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "queries, words",
    [
        ((), "nor learned queries (query_embed, query_feat)"),
        (("query_feat",), "nor learned queries"),
        (("query_embed", "query_feat", "querys2feat"), "left over"),
    ],
)
def test_a_head_alone_without_its_queries_is_one_sentence(queries, words, tmp_path, capsys):
    write_baseline(tmp_path / "head.pth", queries)
    assert (
        cli.main(["import", str(tmp_path / "head.pth"), "--backbone", "tiny-random", "--out", f"{tmp_path}/run"]) == 2
    )
    assert words in (error := capsys.readouterr().err) and error.count("\n") == 1, error
    write_baseline(tmp_path / "head.pth")
    assert cli.main(["import", str(tmp_path / "head.pth"), "--out", f"{tmp_path}/run"]) == 2
    assert "No DINOv2 has any layers of 24 channels" in capsys.readouterr().err


def drop(state):
    del state["backbone.reins.merge.bias"]


def drop_from_the_head(state):
    del state["decode_head.cls_embed.bias"], state["decode_head.pixel_decoder.encoder.layers.1.norms.0.bias"]
    del state["decode_head.transformer_decoder.layers.0.self_attn.attn.in_proj_bias"]


def add(state):
    state["backbone.cls_token"] = state["other.weight"] = torch.zeros(1)


def add_to_the_head(state):
    state["decode_head.extra.weight"] = torch.zeros(1)
    state["decode_head.pixel_decoder.lateral_convs.1.gn.weight"] = torch.zeros(1)


def add_twice(state):
    state["backbone.reins.more"] = state["backbone.reins.most"] = torch.zeros(1)


def widen(state):
    state["backbone.reins.scale"] = state["backbone.reins.scale"][None]


def shrink(state):
    state["decode_head.mask_embed.2.weight"] = torch.zeros(3, 32)


@pytest.mark.parametrize(
    "change, words",
    [
        (drop, ["merge.bias is missing"]),
        (lambda state: state.pop("decode_head.cls_embed.weight"), ["head: cls_embed.weight is missing"]),
        (
            drop_from_the_head,
            [
                "cls_embed.bias is missing",
                "encoder.layers.1.norms.0.bias is missing",
                "layers.0.self_attn.attn.in_proj_bias is missing",
            ],
        ),
        (add, ["more than tokens and a head: backbone.cls_token, other.weight left over"]),
        (
            add_to_the_head,
            ["extra.weight is left over", "pixel_decoder.lateral_convs.1.gn.weight is left over"],
        ),
        (add_twice, ["more is left over", "most is left over"]),
        (widen, ["scale of shape (1,)"]),
        (shrink, ["parameters of a Mask2Former head", "mask_embed.2.weight of shape (3, 32) should be of (32, 32)"]),
        (lambda state: state.clear(), ["holds no tokens"]),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, change, words, capsys):
    write_release(tmp_path / "release.pth", change=change)
    assert cli.main(["import", str(tmp_path / "release.pth"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_imported_or_exported_is_one_sentence(tmp_path, capsys):
    (tmp_path / "text.pth").write_text("no checkpoint")
    write_release(tmp_path / "five.pth", classes=5)
    write_release(tmp_path / "release.pth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for name, out, words in (
        ("text.pth", "run", "cannot be read (it is damaged"),
        ("nowhere.pth", "run", "cannot be read"),
        ("five.pth", "run", "knows 5 classes: expected the 19"),
        ("release.pth", "run", "No DINOv2 has 3 layers of 24 channels"),
        ("release.pth", "full", "is not an empty folder"),
    ):
        assert cli.main(["import", str(tmp_path / name), "--out", str(tmp_path / out)]) == 2
        assert words in capsys.readouterr().err
    run = Run.open(tmp_path / "smoke", Experiment.build("smoke"))
    assert cli.main(["export", str(run.path), "--out", str(tmp_path / "x.pth")]) == 2
    assert "releases hold rein or set-released with mask2former" in capsys.readouterr().err


@pytest.mark.parametrize("call", [os.mkdir, tempfile.mkdtemp])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, call):
    class Evil:
        def __reduce__(self):
            return (call, (str(tmp_path / "made"),) if call is os.mkdir else ("", "made", str(tmp_path)))

    write_release(tmp_path / "evil.pth", layers=4, optimizer=Evil())
    if call is os.mkdir:
        with pytest.raises(ValueError, match="cannot be read .it is damaged or holds more than tensors"):
            release.import_checkpoint(tmp_path / "evil.pth", tmp_path / "run", "tiny-random")
    else:
        release.import_checkpoint(tmp_path / "evil.pth", tmp_path / "run", "tiny-random")
    assert not list(tmp_path.glob("*made"))


def test_every_name_of_a_large_checkpoint_comes_in_and_goes_out():
    """The 308 names and shapes of a ViT-L SET checkpoint."""
    shapes = json.loads((HEAD.parent / "release_keys.json").read_text())
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tokens, head = (under(state, prefix) for prefix in ("backbone.reins.", "decode_head."))
    assert len(tokens) + len(head) == 308
    refiner = release.load_tokens("set-released", tokens)
    made = release.load_head(head)
    assert release.head_sizes(head) == {
        "attention_heads": 8, "pixel_layers": 6, "pixel_width": 1024, "decoder_layers": 9, "decoder_width": 2048,
    }  # fmt: skip
    assert sum(p.numel() for p in refiner.parameters()) == 7_546_881
    assert sum(p.numel() for p in made.parameters()) == 20_579_796
    again = names.head_to_release(made.state_dict())
    assert {name: list(value.shape) for name, value in again.items()} == {
        name.removeprefix("decode_head."): shape for name, shape in shapes.items() if name.startswith("decode_head.")
    }


def test_the_large_models_head_reads_the_released_layers(tmp_path):
    write_release(tmp_path / "release.pth", layers=24)
    run = release.import_checkpoint(tmp_path / "release.pth", tmp_path / "run", "tiny-random")
    assert run.experiment.model.feature_layers == (8, 12, 16, 24) and run.experiment.model.patch_size == 16
    assert run.experiment.inference.windows == 1


@pytest.mark.parametrize(
    "name", ["head.classify.bias", "refiner.phase.tokens.a", "head.decoder.layers.0.self_attn.k_proj.bias"]
)
def test_a_model_that_is_not_whole_is_not_exported(tmp_path, name):
    write_release(tmp_path / "release.pth", layers=4)
    run = release.import_checkpoint(tmp_path / "release.pth", tmp_path / "run", "tiny-random")
    file = run.path / "model" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != name}, file)
    with pytest.raises(ValueError):
        release.export_checkpoint(run, tmp_path / "x.pth")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        release.export_checkpoint(run, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def spoil_with_nan(state):
    state["backbone.reins.learnable_tokens_a"] *= float("nan")


def flatten(name):
    def change(state):
        state[name] = state[name].flatten()

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (spoil_with_nan, "no finite numbers: backbone.reins.learnable_tokens_a"),
        (flatten("backbone.reins.learnable_tokens_a"), "have the sizes of no set-released"),
        (flatten("decode_head.level_embed.weight"), "Mask2Former head"),
        (lambda state: state.update({"decode_head.cls_embed.weight": torch.tensor(1.0)}), "Mask2Former head"),
    ],
)
def test_values_and_shapes_that_cannot_be_are_one_sentence(tmp_path, change, words, capsys):
    write_release(tmp_path / "release.pth", layers=4, change=change)
    words_of = ["import", str(tmp_path / "release.pth"), "--out", str(tmp_path / "run"), "--backbone", "tiny-random"]
    assert cli.main(words_of) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert cli.main([*words_of[:-1], "tiny-radnom"]) == 2


@pytest.mark.parametrize("lost", ["input/50x93/3", "queries"])
def test_a_file_of_golden_numbers_that_lacks_something_is_one_sentence(tmp_path, lost):
    values = dict(np.load(HEAD))
    del values[lost]
    np.savez(tmp_path / "file.npz", **values)
    with pytest.raises(ValueError, match="is not laid out as golden numbers are"):
        parity.verify(tmp_path / "file.npz")


def test_only_what_a_release_can_hold_is_exported(tmp_path, capsys):
    write_release(tmp_path / "release.pth", layers=4)
    run = release.import_checkpoint(tmp_path / "release.pth", tmp_path / "run", "tiny-random")
    for option in ("model.refined_layers=3,4", "model.feature_layers=1,2,3,3"):
        other = Run(run.path, run.experiment.override(option))
        with pytest.raises(ValueError, match="A release refines every layer and reads"):
            release.export_checkpoint(other, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
