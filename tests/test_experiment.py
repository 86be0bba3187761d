"""Configuration: options put in, what cannot be in one sentence, files of this and older versions."""

import json

import pytest

from setlib.experiment import PROFILES, Experiment


def build(*overrides):
    return Experiment.build("smoke", overrides=overrides)


@pytest.mark.parametrize("profile", ["smoke", "quick"])
def test_experiment_survives_json(profile):
    options = ["model.refined_layers=1,2", "train.learning_rate=3e-4", "seed=7", "inference.flip=true"]
    experiment = Experiment.build(profile, targets=["folder@a,b"], overrides=options)
    assert experiment.model.refined_layers == (1, 2) and experiment.seed == 7 and experiment.inference.flip is True
    assert experiment.data.targets == ("folder@a,b",)
    assert Experiment.from_dict(json.loads(json.dumps(experiment.to_dict()))) == experiment


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("model.refinr=rein", r"Unknown option 'model.refinr' \(nearest: model.refiner"),
        ("profile=paper", "Unknown option 'profile'"),
        ("model.refiner", "'model.refiner' is not KEY=VALUE: write for example model.refiner=rein"),
        ("train.steps=many", "Option train.steps should be a valid integer, .*got 'many'"),
        ("train.steps=0", "Option train.steps should be greater than 0, got '0'"),
        ("train.views=-1", "train.views should be greater than or equal to 0"),
        ("train.learning_rate=nan", "train.learning_rate should be a finite number"),
        ("train.learning_rate=0", "train.learning_rate should be greater than 0"),
        ("data.scale_max=0.1", r"data.scale_max \(0.1\) is below data.scale_min \(0.75\)"),
        ("seed=18446744073709551616", "Option seed should be less than 9223372036854775808"),
        ("ablation.seeds=0,-1", "ablation.seeds.1 should be greater than or equal to 0"),
        ("ablation.variants=", "ablation.variants should have at least 1 item"),
        ("ablation.overrides=train.stpes=5", "Unknown option 'train.stpes'"),
        ("ablation.overrides=train.steps=0", "train.steps should be greater than 0"),
        ("train.ema=1", "train.ema should be less than 1"),
        ("train.warmup=12", r"train.warmup \(12\) must be below train.steps \(12\)"),
        ("train.precision=half", "train.precision should be 'auto', 'float32' or 'bfloat16', got 'half'"),
        ("data.on_error=go", "data.on_error should be 'stop' or 'skip', got 'go'"),
        ("model.num_tokens=1", "model.num_tokens should be greater than or equal to 2"),
        ("model.any_batch=maybe", "model.any_batch should be a valid boolean, .*got 'maybe'"),
        ("model.head=masks", "model.head should be 'per-pixel' or 'mask2former', got 'masks'"),
        ("model.head_channels=48 model.head=mask2former", "a multiple of 32 and of model.attention_heads .* got 48"),
        ("model.refiner=set-released train.validate_every=1", "set-released needs model.any_batch=true"),
        ("inference.stride=1.5", "inference.stride should be less than or equal to 1"),
        ("inference.scales=", "inference.scales should have at least 1 item"),
        ("inference.scales=1,1e9", "inference.scales.1 should be less than or equal to 16"),
        *((f"data.eval_edges={text}", "NAME=PIXELS") for text in ("acdc", "acdc=0", "acdc=-5", "=5")),
        *((f"train.refiner_rates={text}", "NAME=RATE") for text in ("set", "set=0", "set=fast", "=0.1", "set:0.1")),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(*options.split())
    assert "\n" not in str(caught.value) and type(caught.value) is ValueError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"profile": "quik"}, "Unknown profile 'quik': expected one of smoke, quick, gpu-10min, paper, paper-1024"),
        ({"profile": "paper"}, "Profile paper has no domains of its own: name yours with --source and --target"),
        ({"profile": "paper-1024", "source": "gtav@x"}, "Profile paper-1024 has no domains of its own"),
        ({"profile": "smoke", "seed": -1}, "^Option seed should be greater than or equal to 0, got -1.$"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(given, message):
    with pytest.raises(ValueError, match=message):
        Experiment.build(**given)


def test_an_override_of_the_ablation_may_be_a_list():
    experiment = build("ablation.overrides=train.steps=5,model.refined_layers=1,2")
    assert experiment.ablation.overrides == ("train.steps=5", "model.refined_layers=1,2")
    assert experiment.override(*experiment.ablation.overrides).model.refined_layers == (1, 2)


def test_a_variant_is_a_refiner_with_options_that_may_be_lists():
    made = build("ablation.variants=none,set model.rank=4 model.refined_layers=2,3,rein train.refiner_rates=rein=3,set")
    rein = "rein train.refiner_rates=rein=3"
    assert made.ablation.variants == ("none", "set model.rank=4 model.refined_layers=2,3", rein, "set")


def test_transfers_name_sources_and_their_targets():
    assert build().transfers == [("scenes:game", ("scenes:night", "scenes:fog"))]
    made = build("ablation.transfers=scenes:game -> scenes:fog, camvid:day-train@x -> camvid:dusk@x scenes:night")
    expected = [("scenes:game", ("scenes:fog",)), ("camvid:day-train@x", ("camvid:dusk@x", "scenes:night"))]
    assert made.transfers == expected
    for wrong in ("scenes:game", "-> scenes:fog", "scenes:game ->"):
        with pytest.raises(ValueError, match="ablation.transfers expects SOURCE -> TARGET"):
            build(f"ablation.transfers={wrong}")


def test_one_text_is_a_list_of_one():
    texts = Experiment.build("smoke", None, "scenes:night", None, "train.steps=3")
    assert texts == Experiment.build("smoke", targets=["scenes:night"], overrides=["train.steps=3"])
    assert Experiment.build("smoke", "", "", 0, "") == build() == PROFILES["smoke"]


def test_the_papers_profiles_have_the_released_settings():
    paper, large = (Experiment.build(name, "gtav@x", ["acdc@y"]) for name in ("paper", "paper-1024"))
    assert (paper.data.height, paper.data.width, large.data.height, large.data.width) == (512, 512, 1024, 1024)
    assert (paper.model.head, paper.model.head_channels, paper.model.num_tokens) == ("mask2former", 256, 100)
    assert paper.model.feature_layers == (8, 12, 16, 24) and paper.model.patch_size == 16
    train = paper.train
    assert (train.steps, train.batch_size, train.learning_rate, train.weight_decay) == (40_000, 4, 1e-4, 0.05)
    assert (train.power, train.clip_norm, train.views, train.ema, train.warmup) == (0.9, 0.0, 0, 0.0, 0)
    train = large.train
    assert (train.steps, train.batch_size, train.learning_rate, train.warmup) == (40_000, 8, 6e-5, 10_000)
    assert [round(e.inference.stride * e.data.width) for e in (paper, large)] == [341, 683]
    # Cityscapes 2048 x 1024, BDD 1280 x 720, Mapillary 4000 x 3000, ACDC 1920 x 1080: released test sizes
    edges = {"cityscapes": 2048, "bdd100k": 1280, "mapillary": 4000, "acdc": 1920, "folder": 700}
    assert [paper.data.edge(*pair) for pair in edges.items()] == [1024, 1280, 2000, 960, 1024]
    assert [large.data.edge(*pair) for pair in edges.items()] == [2048, 2560, 4000, 1920, 2048]
    for train in (paper.train, large.train):  # one rate for all, as released
        assert {train.refiner_rate(name, 1.0) for name in ("none", "rein", "set", "set-released")} == {1.0}
    assert Experiment.build("quick").train.refiner_rate("set-phase", 1.0) == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optics": {}}, "not one of this version of setlib .unknown: optics"),
        ({"data": {"colour": 1}}, "not one of this version of setlib .unknown: data.colour"),
        ({"train": 3}, "train should be an object, got 3"),
        ({"data": {"height": "64"}}, "data.height should be a valid integer, got '64'"),
        ({"inference": {"scales": 1.0}}, "inference.scales should be a valid array"),
        ({"train": {"precision": "foo"}}, "train.precision should be"),
        ({"model": None}, "model should be an object"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        Experiment.from_dict(build().to_dict() | change)
    assert "\n" not in str(caught.value)
