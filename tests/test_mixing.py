"""Amplitudes mixed in training: phases kept, the same numbers at every call, nothing where it is off or in use."""

import numpy as np
import pytest
import torch

from setlib import mixing, training
from setlib.checkpoint import build_segmenter
from setlib.data.crops import RandomCrops
from setlib.data.domains import load
from setlib.experiment import Experiment
from setlib.features import KeptCrops
from setlib.inference import predict
from setlib.run import Run
from setlib.spectral import PIXELS, band_mask, split_spectrum
from setlib.tokens import Refiner


def crops(source, *overrides):
    settings = Experiment.build("smoke", source, [source], overrides=["train.steps=3", *overrides])
    return RandomCrops(load(source, settings.data, role="source"), settings)


def losses(path, settings, made=None):
    return [one["loss"] for one in training.train(Run.open(path, settings), crops=made, progress=False)[1]]


def test_features_keep_their_phase_and_get_the_neighbours_amplitude():
    x = torch.randn(4, 8, 12, 5, generator=torch.Generator().manual_seed(0))
    found = mixing.MixedAmplitudes(Refiner(), 3, [1.0, 0.0, 0.25, 0.0], high=0.3)(x, 3)
    (own, phase), (mixed, turned) = split_spectrum(x), split_spectrum(found)
    low = band_mask((8, 12), high=0.3)[..., None].expand_as(own[0])
    torch.testing.assert_close(mixed[0], torch.lerp(own[0], own[1], low))
    torch.testing.assert_close(mixed[2], torch.lerp(own[2], own[3], 0.25 * low))
    assert torch.equal(found[1], x[1]) and torch.equal(found[3], x[3])
    torch.testing.assert_close((phase - turned).cos(), torch.ones_like(phase))


@pytest.mark.parametrize("views", [8, 0])
def test_crops_are_mixed_with_their_neighbour_by_their_number_alone(source, views):
    shares = (0, 0.5, 1)
    plain, some, mixed = (crops(source, f"train.mix={s}", f"train.views={views}", "data.photometric=0") for s in shares)
    for i in range(8):
        assert torch.equal(mixed[i].image, mixed[i].image) and torch.equal(mixed[i].label, plain[i].label)
        one, other, found = (split_spectrum(c.image[None] / 255, PIXELS) for c in (plain[i], plain[i ^ 1], mixed[i]))
        weight = found.amplitude * (band_mask((64, 128), 1e-9))  # the phase of the mean says nothing
        same, another = (((found.phase - p.phase).cos() * weight).sum() / weight.sum() for p in (one, other))
        assert same > 0.9 > another and not torch.equal(plain[i].image, mixed[i].image)
    assert 0 < sum(torch.equal(some[i].image, plain[i].image) for i in range(8)) < 8


def test_nothing_changes_in_use_and_without_a_share(trained, monkeypatch, tmp_path):
    model = build_segmenter(trained.experiment.override("train.mix=1", "train.mix_layer=2")).eval()
    model.load_state_dict(trained.model.state_dict())
    image = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    assert np.array_equal(predict(model, image), predict(trained.model, image))
    settings = trained.experiment.override("train.mix_layer=1", "train.mix_high=0.5")
    assert losses(tmp_path, settings) == [entry["loss"] for entry in trained.history]
    monkeypatch.setattr(np.random, "default_rng", None)
    assert mixing.mix_weights(build_segmenter(settings), 0) == [0, 0]


@pytest.mark.parametrize("refiner", ["none", "set", "vpt", "full"])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_kept_features_end_where_mixing_begins(source, tmp_path, refiner, layer):
    made = crops(source, f"model.refiner={refiner}", "train.mix=1", f"train.mix_layer={layer}")
    kept = KeptCrops([build_segmenter(made.experiment)], made, progress=False)
    found = losses(tmp_path / "kept", made.experiment, kept)
    assert not np.allclose(found, losses(tmp_path / "plain", made.experiment.override("train.mix=0")), rtol=1e-4)
    kept.crops = [crop._replace(frozen=None) for crop in kept.crops]
    np.testing.assert_allclose(losses(tmp_path / "whole", made.experiment, kept), found, rtol=1e-4)


def test_predictions_of_mixed_crops_are_drawn_to_those_of_the_crops_as_they_are(source, tmp_path):
    made = crops(source, "model.refiner=set", "train.mix=1", "train.mix_layer=2", "train.batch_size=4")
    model, batch = build_segmenter(made.experiment).train(), next(made.batches([[0, 1, 2, 3]]))
    images = batch.to("cpu")[0]
    assert abs(mixing.disagreement(model, model(images), images, None)) < 1e-6
    mixed = model(images, None, mixing.mixing(model, [0.9] * 4))
    apart = mixing.disagreement(model, mixed, images, None)
    size = model.backbone.grid((64, 128))
    wanted, found = (model.head.probabilities(y, size) for y in (model(images).detach(), mixed))
    torch.testing.assert_close(apart, (wanted * (wanted / found).log()).sum(1).mean((1, 2)).sum(), rtol=1e-3, atol=1e-6)
    assert apart > 0 and apart.requires_grad
    settings = made.experiment
    plain, whole, parts = (
        losses(tmp_path / f"{number}", settings.override(*options))
        for number, options in enumerate([(), ("train.agree=5",), ("train.agree=5", "train.accumulate=2")])
    )
    assert whole[0] > plain[0]
    np.testing.assert_allclose(whole, parts, atol=1e-4)
    with pytest.raises(ValueError, match="compares mixed crops: it needs train.mix and train.mix_layer"):
        settings.override("train.agree=1", "train.mix_layer=0")


def test_a_layer_that_nothing_reads_and_a_pair_that_is_parted_are_refused(source, tmp_path):
    settings = crops(source, "train.mix=1", "train.mix_layer=4", "train.batch_size=4").experiment
    with pytest.raises(ValueError, match=r"mix_layer \(4\) .* name a layer from 1 to 3, or 0 for the pixels"):
        build_segmenter(settings.override("model.feature_layers=1,3"))
    one, two = (losses(tmp_path / f"{n}", settings.override(f"train.accumulate={n}")) for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-4)
    with pytest.raises(ValueError, match="multiple of 8: 1 processes x train.accumulate .4. x 2 that are mixed"):
        losses(tmp_path / "4", settings.override("train.accumulate=4"))
