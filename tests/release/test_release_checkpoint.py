"""Checkpoints of the releases come in as runs and go out again, whole; nothing in them is executed."""

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
from setlib.release.checkpoint import head_to_release, tokens_to_release
from setlib.run import Run
from setlib.weights.convert import under

GOLDEN = Path(__file__).parent / "golden"
TINY = ("--backbone", "tiny-random")


def write_release(path, refiner="set-released", classes=19, change=None, layers=4, **content):
    """A small checkpoint as mmengine writes it, with objects of classes that are not installed here."""
    torch.manual_seed(0)
    made = build_refiner(refiner, range(1, layers + 1), 24, 7, 4, query_channels=32)
    sizes = dict(attention_heads=4, pixel_layers=2, pixel_width=48, decoder_layers=3, decoder_width=64)
    head = head_to_release(Mask2FormerHead(24, 32, classes, **sizes).state_dict())
    tokens = tokens_to_release(made.state_dict(), refiner)
    state = {f"backbone.reins.{name}": value for name, value in tokens.items()}
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


def write_baseline(path, queries=("query_embed", "query_feat")):
    """The golden head as that of a frozen backbone: learned queries, no tokens, the nineteen classes."""
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "mask2former_head.npz").items()}
    state = {name: value for name, value in under(golden, "param/").items() if "querys2feat" not in name}
    state |= {f"decode_head.{name}.weight": torch.randn(7, 32) for name in queries}
    state |= {"decode_head.cls_embed.weight": torch.randn(20, 32), "decode_head.cls_embed.bias": torch.randn(20)}
    torch.save({"meta": {}, "state_dict": state}, path)
    return state


def write(kind, path):
    return write_baseline(path) if kind == "none" else write_release(path, kind)


@pytest.mark.parametrize("kind", ["set-released", "rein", "none"])
def test_a_release_comes_in_and_goes_out_again(tmp_path, kind, capsys):
    state = write(kind, tmp_path / "release.pth")
    assert cli.main(["import", str(tmp_path / "release.pth"), *TINY, "--out", str(tmp_path / "run")]) == 0
    assert f"{kind} on tiny-random" in capsys.readouterr().out
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "again.pth")]) == 0
    again = torch.load(tmp_path / "again.pth", weights_only=True)["state_dict"]
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    assert cli.main(["import", str(tmp_path / "again.pth"), *TINY, "--out", str(tmp_path / "run2")]) == 0
    for name in ("experiment.json", "model/model.safetensors", "model/config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "run2" / name).read_bytes()


@pytest.mark.parametrize("kind", ["set-released", "none"])
def test_an_imported_model_is_the_release(tmp_path, kind):
    """On a backbone of the release's width: its tokens and its head say what they said."""
    state = write(kind, tmp_path / "release.pth")
    run = release.import_checkpoint(tmp_path / "release.pth", tmp_path / "run", "tiny-random")
    assert run.experiment.model.refiner == kind and run.experiment.model.num_tokens == 7
    (run.path / "model" / "config.json").unlink()  # as if it had been killed before its last file
    run = release.import_checkpoint(tmp_path / "release.pth", tmp_path / "run", "tiny-random")
    config = ViTConfig(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, patch_size=16)
    torch.manual_seed(1)
    backbone = FrozenBackbone(ViTModel(config), "tiny")
    model = load_segmenter(run.path, backbone)
    refiner = release.load_tokens(kind, under(state, "backbone.reins.")) if kind != "none" else None
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = list(backbone(images, refiner, model.feature_layers).values())
        expected = release.load_head(under(state, "decode_head."))(maps, refiner.queries() if refiner else None)
        torch.testing.assert_close(model(images).masks[-1], expected.masks[-1])
        torch.testing.assert_close(model(images).classes[-1], expected.classes[-1])
    assert predict(model, np.zeros((64, 96, 3), np.uint8)).shape == (64, 96)


def test_every_name_of_a_large_checkpoint_comes_in_and_goes_out():
    """The 308 names and shapes of a ViT-L SET checkpoint."""
    shapes = json.loads((GOLDEN / "release_keys.json").read_text())
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tokens, head = (under(state, prefix) for prefix in ("backbone.reins.", "decode_head."))
    assert len(tokens) + len(head) == 308
    refiner, made = release.load_tokens("set-released", tokens), release.load_head(head)
    sizes = {"attention_heads": 8, "pixel_layers": 6, "pixel_width": 1024, "decoder_layers": 9, "decoder_width": 2048}
    assert release.head_sizes(head) == sizes
    assert sum(p.numel() for p in refiner.parameters()) == 7_546_881
    assert sum(p.numel() for p in made.parameters()) == 20_579_796
    for again, given in (
        (tokens_to_release(refiner.state_dict(), "set-released"), tokens),
        (head_to_release(made.state_dict()), head),
    ):
        assert {name: value.shape for name, value in again.items()} == {name: v.shape for name, v in given.items()}


def test_the_large_models_head_reads_the_released_layers(tmp_path):
    write_release(tmp_path / "release.pth", layers=24)
    run = release.import_checkpoint(tmp_path / "release.pth", tmp_path / "run", "tiny-random")
    assert run.experiment.model.feature_layers == (8, 12, 16, 24) and run.experiment.model.patch_size == 16
    assert run.experiment.inference.windows == 1


def drop(*names):
    def change(state):
        for name in names:
            del state[name]

    return change


def put(**values):
    return lambda state: state.update({name.replace("__", "."): value for name, value in values.items()})


def replace(name, make):
    return lambda state: state.update({name: make(state[name])})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("backbone.reins.merge.bias"), ["merge.bias is missing"]),
        (drop("decode_head.cls_embed.weight"), ["a Mask2Former head: cls_embed.weight is missing"]),
        (
            drop(
                "decode_head.cls_embed.bias",
                "decode_head.pixel_decoder.encoder.layers.1.norms.0.bias",
                "decode_head.transformer_decoder.layers.0.self_attn.attn.in_proj_bias",
            ),
            [
                "cls_embed.bias is missing",
                "encoder.layers.1.norms.0.bias is missing",
                "layers.0.self_attn.attn.in_proj_bias is missing",
            ],
        ),
        (
            put(backbone__cls_token=torch.zeros(1), other=torch.zeros(1)),
            ["more than tokens and a head: backbone.cls_token, other left over"],
        ),
        (
            put(decode_head__extra=torch.zeros(1), decode_head__pixel_decoder__lateral_convs__1__gn=torch.zeros(1)),
            ["extra is (1,), expected none", "pixel_decoder.lateral_convs.1.gn is (1,), expected none"],
        ),
        (put(backbone__reins__more=torch.zeros(1)), ["more is (1,), expected none"]),
        (replace("backbone.reins.scale", lambda value: value[None]), ["scale is (1,), expected ()"]),
        (replace("decode_head.mask_embed.2.weight", lambda value: value[:3]), ["(3, 32), expected (32, 32)"]),
        (lambda state: state.clear(), ["holds no tokens"]),
        (
            replace("backbone.reins.learnable_tokens_a", lambda value: value * float("nan")),
            ["no finite numbers: backbone.reins.learnable_tokens_a"],
        ),
        (replace("backbone.reins.learnable_tokens_a", torch.flatten), ["have the sizes of no set-released"]),
        (replace("decode_head.level_embed.weight", torch.flatten), ["have the sizes of no Mask2Former head"]),
        (put(decode_head__cls_embed__weight=torch.tensor(1.0)), ["have the sizes of no Mask2Former head"]),
        (
            drop(*(f"backbone.reins.{part}.{kind}" for part in ("transform", "merge") for kind in ("weight", "bias"))),
            ["does not read its tokens: expected a release with linked queries"],
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, change, words, capsys):
    write_release(tmp_path / "release.pth", change=change)
    assert cli.main(["import", str(tmp_path / "release.pth"), *TINY, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("queries", "words"),
    [
        ((), "nor learned queries (query_embed, query_feat)"),
        (("query_feat",), "nor learned queries"),
        (("query_embed", "query_feat", "querys2feat"), "querys2feat.weight is (7, 32), expected none"),
    ],
)
def test_a_head_alone_without_its_queries_is_one_sentence(queries, words, tmp_path, capsys):
    write_baseline(tmp_path / "head.pth", queries)
    assert cli.main(["import", str(tmp_path / "head.pth"), *TINY, "--out", f"{tmp_path}/run"]) == 2
    assert words in (error := capsys.readouterr().err) and error.count("\n") == 1, error


def test_what_cannot_be_imported_is_one_sentence(tmp_path, capsys):
    (tmp_path / "text.pth").write_text("no checkpoint")
    write_release(tmp_path / "five.pth", classes=5)
    write_release(tmp_path / "release.pth")
    write_baseline(tmp_path / "head.pth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for name, out, words in (
        ("text.pth", "run", "cannot be read (it is damaged"),
        ("nowhere.pth", "run", "cannot be read ("),
        ("five.pth", "run", "knows 5 classes: expected the 19"),
        ("release.pth", "run", "No DINOv2 has 4 layers of 24 channels"),
        ("head.pth", "run", "No DINOv2 has any layers of 24 channels"),
        ("release.pth", "full", "is not an empty folder"),
    ):
        assert cli.main(["import", str(tmp_path / name), "--out", str(tmp_path / out)]) == 2
        assert words in capsys.readouterr().err
    assert cli.main(["import", f"{tmp_path}/release.pth", "--out", f"{tmp_path}/run", "--backbone", "tiny-radnom"]) == 2
    assert "nearest: tiny-random" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("call", [os.mkdir, tempfile.mkdtemp])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, call):
    class Evil:
        def __reduce__(self):
            return (call, (str(tmp_path / "made"),) if call is os.mkdir else ("", "made", str(tmp_path)))

    write_release(tmp_path / "evil.pth", optimizer=Evil())
    if call is os.mkdir:
        with pytest.raises(ValueError, match="cannot be read .it is damaged or holds more than tensors"):
            release.import_checkpoint(tmp_path / "evil.pth", tmp_path / "run", "tiny-random")
    else:
        release.import_checkpoint(tmp_path / "evil.pth", tmp_path / "run", "tiny-random")
    assert not list(tmp_path.glob("*made"))


@pytest.mark.parametrize(
    "name", ["head.classify.bias", "refiner.phase.tokens.a", "head.decoder.layers.0.self_attn.k_proj.bias"]
)
def test_a_model_that_is_not_whole_is_not_exported(tmp_path, name):
    write_release(tmp_path / "release.pth")
    run = release.import_checkpoint(tmp_path / "release.pth", tmp_path / "run", "tiny-random")
    file = run.path / "model" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != name}, file)
    with pytest.raises(ValueError, match="is missing"):
        release.export_checkpoint(run, tmp_path / "x.pth")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        release.export_checkpoint(run, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_only_what_a_release_can_hold_is_exported(tmp_path):
    write_release(tmp_path / "release.pth")
    run = release.import_checkpoint(tmp_path / "release.pth", tmp_path / "run", "tiny-random")
    for option in ("model.refined_layers=3,4", "model.feature_layers=1,2,3,3"):
        other = Run(run.path, run.experiment.override(option))
        with pytest.raises(ValueError, match="A release refines every layer and reads"):
            release.export_checkpoint(other, tmp_path / "x.pth")
    other = Run.open(tmp_path / "smoke", Experiment.build("smoke"))
    with pytest.raises(ValueError, match="releases hold rein or set-released with mask2former"):
        release.export_checkpoint(other, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds no saved model .*: train one first"):
        release.export_checkpoint(Run(tmp_path, run.experiment), tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
