"""Frozen features, computed once: they change no number, whoever goes on from them and wherever."""

import pytest
import torch

from setlib.checkpoint import build_segmenter
from setlib.data import domains
from setlib.data.crops import RandomCrops
from setlib.experiment import Experiment
from setlib.features import KeptCrops, SharedFeatures
from setlib.weights.load import load_backbone

OPTIONS = {  # by name, and how many first layers they leave as they are
    "none": (["model.refiner=none"], 4),
    "set": ([], 3),
    "late": (["model.refiner=rein", "model.refined_layers=4"], 4),
    "early": (["model.refiner=rein", "model.refined_layers="], 1),
    "vpt": (["model.refiner=vpt"], 2),
    "full": (["model.refiner=full"], 0),
    "mask2former": (["model.head=mask2former", "model.head_channels=32", "model.pixel_layers=1"], 3),
}


@pytest.fixture(scope="module")
def models():
    """Models of one backbone, changed so that no refiner leaves the features as they are."""
    backbone, found = load_backbone("tiny-random"), {}
    for name, (options, _) in OPTIONS.items():
        found[name] = build_segmenter(Experiment.build("smoke", overrides=options), backbone).eval()
        generator = torch.Generator().manual_seed(0)
        for key, p in found[name].named_parameters():
            if p.requires_grad and not key.startswith("head."):
                p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return found


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.masks[-1]


IMAGES = torch.rand(3, 3, 61, 107, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("names", [[name] for name in OPTIONS] + [list(OPTIONS), ["none", "late"], ["full", "set"]])
def test_they_change_no_answer_whoever_they_were_made_for(models, names):
    """Also where one model goes on later than they end, or changes layers that they have run."""
    frozen = SharedFeatures(models[name] for name in names)(IMAGES)
    assert all(models[name].frozen_until == OPTIONS[name][1] for name in names)
    stops = [OPTIONS[name][1] for name in names if OPTIONS[name][1]]
    assert (frozen and frozen.stop) == (min(stops) if stops else None)
    with torch.no_grad():
        for name in names:
            expected = logits(models[name](IMAGES))
            torch.testing.assert_close(logits(models[name](IMAGES, frozen)), expected, rtol=1e-5, atol=1e-5)


def test_a_head_alone_runs_no_layer(models, monkeypatch):
    """Also from features that end earlier, where another model goes on."""
    expected = models["none"](IMAGES)
    kept = [SharedFeatures(models[name] for name in names)(IMAGES) for names in (["none"], ["none", "set"])]
    monkeypatch.setattr(models["none"].backbone.model, "forward", None)
    for frozen in kept:
        torch.testing.assert_close(models["none"](IMAGES, frozen), expected, rtol=1e-5, atol=1e-5)


def test_kept_crops_are_the_crops_and_answer_as_they_do(source, models):
    experiment = Experiment.build("smoke", source=source, targets=[source])
    crops = RandomCrops(domains.load(source, experiment.data, role="source"), experiment)
    kept = KeptCrops([models["set"], models["none"]], crops, progress=False)
    batch = next(kept.batches([[5, 1]]))
    ((images, labels, _),) = crops.batches([[5, 1]])
    assert torch.equal(batch.images, images) and torch.equal(batch.labels, labels)
    assert images.dtype == labels.dtype == torch.uint8
    images, labels, frozen = batch.to("cpu")
    assert images.dtype == torch.float32 and images.max() <= 1 and labels.dtype == torch.int64
    for name in ("set", "none"):
        torch.testing.assert_close(models[name](images, frozen), models[name](images), rtol=1e-5, atol=1e-5)
