"""The segmenter: pictures of any size, one image at a time, frozen, saved and loaded whole."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from setlib.model import Segmenter, read_picture, write_model
from setlib.windows import label_map
from torch.nn import functional as F

from setlib.experiment import Experiment
from setlib.run import Run


def build(*overrides):
    return Segmenter(Experiment.build("smoke", overrides=overrides)).eval()


@pytest.fixture(scope="module")
def model():
    return build()


def picture(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


@pytest.mark.parametrize("size", [(64, 128), (1, 1), (3, 700), (700, 3), (97, 131), (300, 200)])
def test_any_size_is_predicted_at_its_own_size(model, size):
    labels = model.predict(picture(*size))
    assert labels.shape == size and labels.dtype == np.uint8 and labels.max() < 19


def test_strips_equal_plain_interpolation(monkeypatch):
    scores = torch.randn(5, 9, 13, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("setlib.windows.STRIP_PIXELS", 200)
    for size in [(9, 13), (50, 41), (4, 5), (1, 1), (100, 3)]:
        expected = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)
        assert np.array_equal(label_map(scores, size), expected.numpy())


def test_windows_cover_the_picture_and_agree_with_themselves(model):
    (windows,) = model.windows(picture(128, 128))  # the window is 64 x 128: two and a half of them
    assert windows.images.shape == (3, 3, 64, 128) and windows.corners == [(0, 0), (43, 0), (64, 0)]
    constant = model.probabilities(model.windows(np.full((128, 128, 3), 90, np.uint8)))
    assert constant.shape == (19, 128, 128)
    torch.testing.assert_close(constant.sum(0), torch.ones(128, 128))


def test_an_image_does_not_depend_on_its_batch(model):
    for parameter in model.refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.rand(3, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, flipped = model(images), model(images.flip(0)).flip(0)
        for i in range(3):
            alone = model(images[i : i + 1])[0]
            assert (together[i] - alone).norm() < 1e-6 * alone.norm()
            assert (flipped[i] - alone).norm() < 1e-6 * alone.norm()


def test_frozen_stays_frozen():
    model = build()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    model.train().apply(lambda module: module.train())
    assert model.train() is model and model.training and not model.backbone.model.training
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.rand(2, 3, 64, 128)).square().mean().backward()
    optimiser.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_prefix_gives_the_same_logits_and_gradients(model):
    images = torch.rand(2, 3, 64, 128)
    prefix = model.prefix(images)
    assert prefix.stop == model.frozen_until == 3 and max(prefix.maps) < 4  # what will be refined did not run
    torch.testing.assert_close(model(images, prefix), model(images), rtol=1e-5, atol=1e-5)


def test_the_seed_decides_the_weights_and_leaves_the_global_one_alone():
    state = torch.random.get_rng_state()
    one, same, other = build(), build(), build("seed=1")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.head.classify.weight, same.head.classify.weight)
    assert not torch.equal(one.head.classify.weight, other.head.classify.weight)


def test_refiners_share_the_heads_first_weights():
    assert torch.equal(build().head.classify.weight, build("model.refiner=none").head.classify.weight)


def test_save_and_load_give_equal_predictions(model, tmp_path):
    model.save(tmp_path)
    again = Segmenter.load(tmp_path)
    assert not again.training
    assert np.array_equal(again.predict(picture(64, 128)), model.predict(picture(64, 128)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_loading_says_what_is_wrong(model, tmp_path):
    with pytest.raises(ValueError, match="holds no saved model"):
        Segmenter.load(tmp_path)
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"backbone_fingerprint": "0" * 16}))
    with pytest.raises(ValueError, match="was trained on a backbone with hash 0000"):
        Segmenter.load(tmp_path)
    config["experiment"]["model"]["num_tokens"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not fit this model"):
        Segmenter.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_model_is_one_sentence(model, tmp_path, name):
    model.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read .*: delete it and train again"):
        Segmenter.load(tmp_path)


def test_layers_must_exist():
    with pytest.raises(ValueError, match="has the layers 1 to 4"):
        build("model.refined_layers=4,5")


def test_empty_layer_options_mean_all_and_evenly_spaced():
    model = build("model.refined_layers=", "model.feature_layers=")
    assert (
        model.refiner.layers == (1, 2, 3, 4) == model.feature_layers and model.frozen_until == 1
    )  # layer 1 itself is frozen, what follows it is not


def modes():
    colours = Image.fromarray(picture(10, 16))
    grey = Image.fromarray((np.arange(160).reshape(10, 16) * 400).astype(np.uint16))
    return {
        "rgb": colours,
        "grey": colours.convert("L"),
        "palette": colours.convert("P"),
        "cmyk": colours.convert("CMYK"),
        "alpha": colours.convert("RGBA"),
        "bits": colours.convert("1"),
        "sixteen": grey,
        "float": Image.fromarray(np.linspace(0, 1, 160, dtype=np.float32).reshape(10, 16)),
    }


@pytest.mark.parametrize("mode", list(modes()))
def test_pictures_of_every_mode_are_read(mode):
    pixels = read_picture(modes()[mode])
    assert pixels.shape == (10, 16, 3) and pixels.dtype == np.uint8 and pixels.std() > 5


def test_rotation_of_the_camera_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(10, 16)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (16, 10, 3)


def test_what_is_no_picture_is_one_sentence(tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_picture(tmp_path / "note.txt")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_picture(tmp_path / "missing.png")
    Image.fromarray(picture(50, 50)).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_picture(tmp_path / "cut.png")


def test_what_was_padded_is_cut_off(model):
    """A map that is linear in the column is the same line over the picture, whatever was added on its right."""
    line = (torch.arange(9.0).expand(1, 1, 5, 9) + 1) / 10  # patches of 8 pixels over 40 x 72
    logits = torch.cat([line, 1 - line], dim=1).log()
    whole = model.pixel_probabilities(logits, (40, 72))
    assert torch.equal(model.pixel_probabilities(logits, (37, 65)), whole[:, :, :37, :65])
    torch.testing.assert_close(whole[0, 0, 0, 4:-4], ((torch.arange(4, 68) + 0.5) / 8 + 0.5) / 10)


@pytest.mark.parametrize("size", [(61, 107), (1, 1), (64, 128)])
def test_logits_of_any_size(model, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, 19, -(-size[0] // 8), -(-size[1] // 8)) and logits.dtype == torch.float32
        torch.testing.assert_close(model(images, model.prefix(images)), logits, rtol=1e-5, atol=1e-5)


def test_lower_precision_says_nearly_the_same():
    images = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    plain, low = build(), build("train.precision=bfloat16")
    for one in (plain, low):
        for i, parameter in enumerate(one.refiner.parameters()):
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(i))
    with torch.no_grad():
        expected, found = plain(images), low(images)
        torch.testing.assert_close(low(images, low.prefix(images)), found, rtol=0.02, atol=0.02)
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.995  # kernels differ in what they add up in


def test_spectra_stay_in_float32_under_autocast(monkeypatch):
    from setlib import spectral

    seen, split = [], spectral.split_spectrum

    def watch(x, *args):
        found = split(x, *args)
        seen.append({part.dtype for part in found})
        return found

    monkeypatch.setattr(spectral, "split_spectrum", watch)
    build("train.precision=bfloat16")(torch.rand(1, 3, 64, 128)).sum().backward()
    assert seen == [{torch.float32}] * 2


@pytest.mark.parametrize(("units", "expected"), [((False, False), "float32"), ((True, False), "bfloat16")])
def test_auto_is_bfloat16_where_the_processor_multiplies_in_it(units, expected, monkeypatch):
    monkeypatch.setattr("setlib.model.DEVICE", torch.device("cpu"))
    for name, has in zip(("_is_avx512_bf16_supported", "_is_amx_tile_supported"), units, strict=True):
        monkeypatch.setattr(torch.cpu, name, lambda has=has: has)
    assert build("train.precision=auto").precision == expected
    assert build("train.precision=float32").precision == "float32"  # said is said


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="train.precision must be auto, float32 or bfloat16, got 'half'"):
        build("train.precision=half")


TINY_MASKS = ("model.head=mask2former", "model.head_channels=32", "model.pixel_layers=1", "model.decoder_layers=2")


@pytest.mark.parametrize("refiner", ["set", "rein", "fada", "set-phase", "none", "vpt"])
def test_mask_heads_are_linked_to_tokens_and_saved_whole(tmp_path, refiner):
    model = build(*TINY_MASKS, f"model.refiner={refiner}")
    assert (model.head.query_embed is None) == (model.refiner.queries() is not None) == (refiner not in ("none", "vpt"))
    images = torch.rand(2, 3, 60, 100, generator=torch.Generator().manual_seed(0))
    output = model(images)
    assert output.masks[-1].shape == (2, 8, 4 * 8, 4 * 13)  # queries, as many as tokens, on a grid of 8 x 13 patches
    assert model.pixel_probabilities(output, (60, 100)).shape == (2, 19, 60, 100)
    model.save(tmp_path)
    again = Segmenter.load(tmp_path)(images)
    assert torch.equal(again.masks[-1], output.masks[-1]) and torch.equal(again.classes[0], output.classes[0])


def test_a_mask_head_reads_four_layers():
    with pytest.raises(ValueError, match="feature_layers must name 4 layers for mask2former, got 2"):
        build(*TINY_MASKS, "model.feature_layers=2,4")


def test_labels_of_padded_pictures_are_padded(model):
    """The loss of a picture that does not divide into patches counts its own pixels only."""
    images = torch.rand(1, 3, 61, 107, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 19, (1, 61, 107), generator=torch.Generator().manual_seed(1))
    logits = model(images)
    whole = F.interpolate(logits, (64, 112), mode="bilinear", align_corners=False)[..., :61, :107]
    torch.testing.assert_close(model.loss(logits, labels), F.cross_entropy(whole, labels))


class Hub:
    """What of the hub's client is used to push."""

    def __init__(self, token=None):
        self.files = {}

    def create_repo(self, repo_id, **_):
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, folder_path, **_):
        Hub.pushed = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return "https://hub/commit"


def test_it_is_shared_as_the_ecosystem_shares(tmp_path, monkeypatch):
    run = Run.open(
        tmp_path / "run", Experiment.build("smoke", "folder@secret~noise1", overrides=["model.refiner=rein"])
    )
    model, run = Segmenter(run.experiment).eval(), run.path
    model.save(run / "model")
    Segmenter.load(run).save_pretrained(tmp_path / "shared")
    assert "Not scored yet" in (tmp_path / "shared" / "README.md").read_text()
    score = {
        "domain": "acdc:night@secret",
        "miou": 41.5,
        "images": 24,
        "class_set": "cityscapes-19",
        "inference": "flip",
    }
    (run / "metrics.json").write_text(json.dumps({"results": [score]}))
    loaded = Segmenter.load(run)
    loaded.save_pretrained(tmp_path / "shared")
    assert sorted(p.name for p in (tmp_path / "shared").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (tmp_path / "shared/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "shared").iterdir())
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "| acdc:night | cityscapes-19 | 24 | flip | 41.5 |" in card
    assert card.startswith("---\n") and "library_name: setlib" in card
    assert model.backbone.fingerprint in card and "trained on folder~noise1" in card
    images = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    again = Segmenter.from_pretrained(tmp_path / "shared")
    assert torch.equal(again(images), model(images)) and not again.training
    assert [result["miou"] for result in again.results] == [41.5]
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    assert loaded.push_to_hub("someone/rein") == "https://hub/commit"
    assert Hub.pushed["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert b"41.5" in Hub.pushed["README.md"]
    monkeypatch.setattr("setlib.model.snapshot_download", lambda name, **_: str(tmp_path / "shared"))
    assert torch.equal(Segmenter.from_pretrained("someone/rein", revision="main")(images), model(images))


def test_what_the_hub_does_not_give_is_one_sentence():
    for name in ("someone/nothing", "no id at all/x/y"):
        with pytest.raises(ValueError, match="is no folder, and the hub does not give it"):
            Segmenter.from_pretrained(name)


def test_an_unknown_backbone_hash_is_accepted(tmp_path):
    """An imported release does not say what its backbone's weights were."""
    model = build()
    write_model(tmp_path, model.trainable_state(), model.experiment, fingerprint="")
    assert Segmenter.load(tmp_path).experiment == model.experiment


def test_a_strangers_metrics_are_left_alone(tmp_path):
    build().save(tmp_path / "mine")
    (tmp_path / "metrics.json").write_text("[]")
    assert Segmenter.load(tmp_path / "mine").results == []
