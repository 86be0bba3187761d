"""Averages of models: one is itself, two are their mean; a share of a refiner runs from the frozen features to it."""

import pytest
import torch

from setlib.analysis.averages import soup, wise
from setlib.checkpoint import build_segmenter
from setlib.data.domains import load
from setlib.evaluation import evaluate


def test_a_soup_of_one_is_itself_and_of_two_their_mean(trained, source):
    other, inside = (build_segmenter(trained.experiment.override(text)) for text in ("seed=1", "model.refiner=vpt"))
    one, both = soup([trained.model]), soup([trained.model, other])
    for name, value in trained.model.trainable_state().items():
        assert torch.equal(one.trainable_state()[name], value)
        torch.testing.assert_close(both.trainable_state()[name], (value + other.trainable_state()[name]) / 2)
    models = {"own": trained.model, "one": one, "wise": wise(one, 1.0)}
    scores = evaluate(models, load(source, trained.experiment.data), progress=False)
    assert len({score.counts.tobytes() for score in scores.values()}) == 1
    with pytest.raises(ValueError, match="differ in their seed alone, these are of 2 kinds"):
        soup([trained.model, inside])
    with pytest.raises(ValueError, match="Refiner vpt works inside its layers"):
        wise(inside, 0.5)


@pytest.mark.parametrize("refiner", ["none", "rein", "set", "set-style"])
def test_a_share_of_a_refiner_runs_from_the_frozen_features_to_the_model(trained, refiner):
    model = build_segmenter(trained.experiment.override(f"model.refiner={refiner}", "model.refined_layers=4"))
    images = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    for i, parameter in enumerate(model.refiner.parameters()):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    refiners = None, model.refiner, *(wise(model, share).refiner for share in (0.0, 0.5, 1.0))
    with torch.no_grad():
        frozen, whole, *found = (model.backbone(images, refiner)[4] for refiner in refiners)
    assert torch.equal(found[0], frozen) and torch.equal(found[2], whole)
    torch.testing.assert_close(found[1], (frozen + whole) / 2)
