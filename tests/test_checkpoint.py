"""A segmenter built by its seed alone, saved and loaded whole, shared with a card, and refused in one sentence."""

import json
import pickle
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from setlib import checkpoint
from setlib.checkpoint import build_segmenter, fast_precision, load_segmenter, save_segmenter, share, use, write_model
from setlib.experiment import Experiment
from setlib.inference import predict

MASKS = ("model.head=mask2former", "model.head_channels=32", "model.pixel_layers=1", "model.decoder_layers=2")


def build(*overrides):
    return build_segmenter(Experiment.build("smoke", overrides=overrides)).eval()


def images(*size):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    """The folder of a saved model."""
    save_segmenter(build(), tmp_path / "model")
    return tmp_path / "model"


# Building


@pytest.mark.parametrize(
    "options", [(), ("model.refiner=lora",), (*MASKS, "model.refiner=rein"), ("model.refiner=vpt",)]
)
def test_the_seed_decides_the_weights_and_the_global_state_is_left_alone(options, monkeypatch):
    if "model.refiner=lora" in options:
        pytest.importorskip("peft")
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)  # a GPU's state too: torch.manual_seed would call it
    state = torch.random.get_rng_state()
    one, same, other = (build(*options, f"seed={seed}").trainable_state() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    for part in {name.partition(".")[0] for name in one}:
        assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items() if name.startswith(part)), part


def test_refiners_share_the_heads_first_weights():
    assert torch.equal(build().head.classify.weight, build("model.refiner=none").head.classify.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.refined_layers=4,5"], r"Option model.refined_layers names \(4, 5\), .* has the layers 1 to 4"),
        (["model.feature_layers=9"], r"Option model.feature_layers names \(9,\), .* has the layers 1 to 4"),
        ([*MASKS, "model.feature_layers=2,4"], "feature_layers must name 4 layers for mask2former, got 2"),
    ],
)
def test_layers_must_exist_and_a_mask_head_reads_four(options, message):
    with pytest.raises(ValueError, match=message):
        build(*options)


def test_empty_layer_options_mean_all_and_evenly_spaced():
    model = build("model.refined_layers=", "model.feature_layers=")
    assert model.refiner.layers == model.feature_layers == (1, 2, 3, 4)
    assert model.frozen_until == 1  # layer 1 itself is frozen, what follows it is not
    assert checkpoint.even_layers(24) == (6, 12, 18, 24) and checkpoint.even_layers(3) == (1, 1, 2, 3)


@pytest.mark.parametrize(("units", "expected"), [((False, False), "float32"), ((True, False), "bfloat16")])
def test_auto_is_bfloat16_where_the_processor_multiplies_in_it(units, expected, monkeypatch):
    for name, has in zip(("_is_avx512_bf16_supported", "_is_amx_tile_supported"), units, strict=True):
        monkeypatch.setattr(torch.cpu, name, lambda has=has: has)
    cpu = torch.device("cpu")
    assert fast_precision(cpu) == expected
    for said, precision in (("auto", expected), ("float32", "float32")):
        experiment = Experiment.build("smoke", overrides=[f"train.precision={said}"])
        assert build_segmenter(experiment, device=cpu).precision == precision


# Saving and loading


def test_save_and_load_give_equal_predictions(saved):
    picture = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    again = load_segmenter(saved)
    assert not again.training and np.array_equal(predict(again, picture), predict(build(), picture))
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert load_segmenter(saved.parent, again.backbone).backbone is again.backbone  # a run's folder; shared


@pytest.mark.parametrize("refiner", ["set", "rein", "fada", "set-phase", "none", "vpt"])
def test_mask_heads_are_linked_to_tokens_and_saved_whole(tmp_path, refiner):
    model = build(*MASKS, f"model.refiner={refiner}")
    assert (model.head.query_embed is None) == (model.refiner.queries() is not None) == (refiner not in ("none", "vpt"))
    output = model(images(60, 100))
    assert output.masks[-1].shape == (2, 8, 4 * 8, 4 * 13)  # queries, as many as tokens, on a grid of 8 x 13 patches
    assert model.pixel_probabilities(output, (60, 100)).shape == (2, 19, 60, 100)
    save_segmenter(model, tmp_path)
    again = load_segmenter(tmp_path)(images(60, 100))
    assert torch.equal(again.masks[-1], output.masks[-1]) and torch.equal(again.classes[0], output.classes[0])


def test_loading_says_what_is_wrong(saved, tmp_path):
    with pytest.raises(ValueError, match="holds no saved model .config.json and model.safetensors.: train one first"):
        load_segmenter(tmp_path / "nothing")
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"backbone_fingerprint": "0" * 16}))
    with pytest.raises(ValueError, match="was trained on a backbone with hash 0000.*use the same weights"):
        load_segmenter(saved)
    config["experiment"]["model"]["num_tokens"] += 1
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"do not fit this model: refiner.* differs or is missing \(.* differences\)"):
        load_segmenter(saved)


class Bomb:
    """What runs code where it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [lambda whole: whole[: len(whole) // 2], lambda _: pickle.dumps(Bomb())])
@pytest.mark.parametrize("read", [load_segmenter, lambda folder: share(folder, folder.parent / "shared")])
def test_a_damaged_model_is_one_sentence_and_nothing_is_unpickled(saved, name, content, read):
    (saved / name).write_bytes(content((saved / name).read_bytes()))
    with pytest.raises(ValueError, match="cannot be read .*: delete it and train again"):
        read(saved)


def test_an_unknown_backbone_hash_is_accepted(tmp_path):
    """An imported release does not say what its backbone's weights were."""
    model = build()
    write_model(tmp_path, model.trainable_state(), model.experiment, fingerprint="")
    assert load_segmenter(tmp_path).experiment == model.experiment


def test_how_a_model_is_used_may_change():
    model = build("model.refiner=set-released").train()
    model(images(64, 128)).sum().backward()
    with torch.no_grad(), pytest.raises(ValueError, match="any_batch"):
        model.eval()(images(64, 128)[:1])
    use(model, model.experiment.override("model.any_batch=true", "inference.whole=true"))
    assert model(images(64, 128)[:1]).shape == (1, 19, 8, 16) and model.experiment.inference.whole


# Sharing


@pytest.fixture
def scored(trained, tmp_path):
    """A run folder whose domains lie in folders of this machine, scored on one of them."""
    shutil.copytree(trained.path, tmp_path / "run")
    data = replace(trained.experiment.data, source="folder@/secret~noise1", targets=("acdc:night@/secret",))
    model = load_segmenter(tmp_path / "run")
    model.experiment = replace(trained.experiment, data=data)
    save_segmenter(model, tmp_path / "run" / "model")
    score = {"domain": "acdc:night@/secret", "miou": 41.5, "images": 24, "class_set": "cityscapes-19"}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"results": [score | {"inference": "flip"}]}))
    return tmp_path / "run"


def test_it_is_shared_with_a_card_and_without_the_folders_of_this_machine(scored, tmp_path, monkeypatch):
    share(scored, tmp_path / "shared")
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (tmp_path / "shared/model.safetensors").read_bytes() == (scored / "model/model.safetensors").read_bytes()
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "shared").iterdir())
    card = (tmp_path / "shared" / "README.md").read_text()
    model = load_segmenter(scored)
    assert card.startswith("---\n") and "library_name: setlib" in card and "trained on folder~noise1" in card
    assert "| acdc:night | cityscapes-19 | 24 | flip | 41.5 |" in card and model.backbone.fingerprint in card
    assert f"{model.num_trainable()['head']:,} (head)" in card
    again = load_segmenter(tmp_path / "shared")
    assert torch.equal(again(images(64, 128)), model(images(64, 128)))
    share(tmp_path / "shared", tmp_path / "on")  # what was shared keeps its table
    assert (tmp_path / "on" / "README.md").read_text() == card


def test_the_cards_own_code_runs(scored, tmp_path, monkeypatch):
    share(scored, tmp_path / "shared")
    Image.new("RGB", (40, 20)).save(tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "shared" / "README.md").read_text(), re.DOTALL)[1]
    exec(code.replace("THIS_REPOSITORY", "shared"), names := {})
    assert names["labels"].shape == (20, 40)


@pytest.mark.parametrize("content", [None, "[]", '{"results": 3}', "{"])
def test_a_model_without_a_table_of_its_own_is_shared_without_one(saved, tmp_path, content):
    """Also where metrics.json is a stranger's."""
    if content:
        (saved.parent / "metrics.json").write_text(content)
    share(saved, tmp_path / "shared")
    assert "Not scored yet" in (tmp_path / "shared" / "README.md").read_text()


def test_it_goes_to_the_hub_and_comes_back(scored, tmp_path, monkeypatch):
    calls = []

    class Hub:
        """What of the hub's client is used."""

        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, {path.name: path.read_bytes() for path in folder_path.iterdir()}))

    monkeypatch.setattr(checkpoint, "HfApi", Hub)
    share(scored, tmp_path / "shared", "someone/set", token="mine", private=True)
    assert calls[:2] == [("token", "mine"), ("someone/set", {"exist_ok": True, "private": True})]
    name, files = calls[2]
    assert name == "someone/set" and b"41.5" in files["README.md"]
    assert files["model.safetensors"] == (scored / "model" / "model.safetensors").read_bytes()

    asked = []
    monkeypatch.setattr(
        checkpoint, "snapshot_download", lambda name, **options: asked.append((name, options)) or tmp_path / "shared"
    )
    model = load_segmenter("someone/set", revision="main")
    assert asked[0][0] == "someone/set" and asked[0][1]["revision"] == "main"
    assert torch.equal(model(images(64, 128)), load_segmenter(scored)(images(64, 128)))


def test_what_the_hub_does_not_give_is_one_sentence():
    with pytest.raises(
        ValueError, match="^someone/nothing is no folder of a saved model, and the hub does not give it"
    ):
        load_segmenter("someone/nothing")
    with pytest.raises(ValueError, match="holds no saved model"):
        load_segmenter("no id at all/x/y")
