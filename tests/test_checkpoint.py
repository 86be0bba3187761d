"""A segmenter built by its seed alone, saved and loaded whole, shared with a card, and refused in one sentence."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from setlib import checkpoint
from setlib.checkpoint import build_segmenter, load_segmenter, save_segmenter, share, use, write_model
from setlib.experiment import Experiment

MASKS = ("model.head=mask2former", "model.head_channels=32", "model.pixel_layers=1", "model.decoder_layers=2")


def build(*overrides):
    return build_segmenter(Experiment.build("smoke", overrides=overrides)).cpu().eval()


def images(h=64, w=128):
    return torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    """The folder of a saved model."""
    save_segmenter(build(), tmp_path / "model")
    return tmp_path / "model"


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


def test_layers_must_exist_and_empty_means_all_or_evenly_spaced():
    for key in ("refined", "feature"):
        with pytest.raises(
            ValueError, match=rf"model.{key}_layers names \(4, 5\), but tiny-random has the layers 1 to 4"
        ):
            build(f"model.{key}_layers=4,5")
    with pytest.raises(ValueError, match="feature_layers must name 4 layers for mask2former, got 2"):
        build(*MASKS, "model.feature_layers=2,4")
    model = build("model.refined_layers=", "model.feature_layers=")
    assert model.refiner.layers == model.feature_layers == (1, 2, 3, 4)
    assert checkpoint.even_layers(24) == (6, 12, 18, 24) and checkpoint.even_layers(3) == (1, 1, 2, 3)


@pytest.mark.parametrize(("units", "expected"), [((False, False), "float32"), ((True, False), "bfloat16")])
def test_auto_is_bfloat16_where_the_processor_multiplies_in_it(units, expected, monkeypatch):
    for name, has in zip(("_is_avx512_bf16_supported", "_is_amx_tile_supported"), units, strict=True):
        monkeypatch.setattr(torch.cpu, name, lambda has=has: has)
    assert build("train.precision=auto").precision == expected
    assert build("train.precision=float32").precision == "float32"  # said is said


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


def test_save_and_load_give_equal_answers(saved):
    again = load_segmenter(saved)
    assert not again.training and torch.equal(again(images()), build()(images()))
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert load_segmenter(saved.parent, again.backbone).backbone is again.backbone  # of a run's folder, shared


def test_loading_says_what_is_wrong(saved, tmp_path):
    with pytest.raises(ValueError, match="holds no saved model .config.json and model.safetensors.: train one first"):
        load_segmenter(tmp_path / "nothing")
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"backbone_fingerprint": "0" * 16}))
    with pytest.raises(ValueError, match="was trained on a backbone with hash 0000.*use the same weights"):
        load_segmenter(saved)
    config["experiment"]["model"]["num_tokens"] += 1
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"refiner.amplitude.tokens.a is \(2, 8, 4\), expected \(2, 9, 4\), refiner.phase"
    ):
        load_segmenter(saved)
    model = build()
    write_model(saved, model.trainable_state(), model.experiment, fingerprint="")  # a release does not say its backbone
    assert load_segmenter(saved).experiment == model.experiment


class Bomb:
    """What runs code where it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_model_is_one_sentence_and_nothing_is_unpickled(saved, name):
    content = (saved / name).read_bytes()
    for damaged in (content[: len(content) // 2], pickle.dumps(Bomb())):
        (saved / name).write_bytes(damaged)
        for read in (load_segmenter, lambda folder: share(folder, folder.parent / "shared")):
            with pytest.raises(ValueError, match="cannot be read .*: delete it and train again"):
                read(saved)


def test_how_a_model_is_used_may_change():
    model = build()
    use(model, model.experiment.override("model.any_batch=true", "inference.whole=true"))
    assert model.refiner.any_batch and model.experiment.inference.whole


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
    files = {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()}
    assert files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert files["model.safetensors"] == (scored / "model" / "model.safetensors").read_bytes()
    assert not any(b"secret" in content for content in files.values())
    card, model = files["README.md"].decode(), load_segmenter(scored)
    assert card.startswith("---\n") and "library_name: setlib" in card and "trained on folder~noise1" in card
    assert "| acdc:night | cityscapes-19 | 24 | flip | 41.5 |" in card and model.backbone.fingerprint in card
    assert torch.equal(load_segmenter(tmp_path / "shared")(images()), model(images()))
    share(tmp_path / "shared", tmp_path / "again")  # what was shared keeps its table
    assert (tmp_path / "again" / "README.md").read_text() == card

    Image.new("RGB", (40, 20)).save(tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(code.replace("THIS_REPOSITORY", "shared"), names := {})
    assert names["labels"].shape == (20, 40)


def test_a_strangers_metrics_are_left_alone(saved, tmp_path):
    (saved.parent / "metrics.json").write_text("[]")
    share(saved, tmp_path / "shared")
    assert "Not scored yet" in (tmp_path / "shared" / "README.md").read_text()


def test_it_goes_to_the_hub_and_comes_back(scored, tmp_path, monkeypatch):
    hub, snapshot = Mock(), Mock(return_value=tmp_path / "shared")
    monkeypatch.setattr(checkpoint, "HfApi", hub)
    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    share(scored, tmp_path / "shared", "someone/set", token="mine", private=True)
    hub.assert_called_once_with(token="mine")
    hub().create_repo.assert_called_once_with("someone/set", exist_ok=True, private=True)
    hub().upload_folder.assert_called_once_with(repo_id="someone/set", folder_path=tmp_path / "shared")
    model = load_segmenter("someone/set", revision="main")
    assert snapshot.call_args.args == ("someone/set",) and snapshot.call_args.kwargs["revision"] == "main"
    assert torch.equal(model(images()), load_segmenter(scored)(images()))


def test_what_the_hub_does_not_give_is_one_sentence():
    with pytest.raises(
        ValueError, match="^someone/nothing is no folder of a saved model, and the hub does not give it"
    ):
        load_segmenter("someone/nothing")
    with pytest.raises(ValueError, match="holds no saved model"):
        load_segmenter("no id at all/x/y")
