"""The network: an image's result its own, frozen stays frozen, lower precision says nearly the same."""

import pytest
import torch
from torch.nn import functional as F

from setlib.checkpoint import build_segmenter
from setlib.experiment import Experiment


def build(*overrides):
    return build_segmenter(Experiment.build("smoke", overrides=overrides)).eval()


def images(count, h=64, w=128):
    return torch.rand(count, 3, h, w, generator=torch.Generator().manual_seed(0))


def stir(model, std):
    """Gives a refiner weights that change what it refines."""
    for i, parameter in enumerate(model.refiner.parameters()):
        torch.nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(i))
    return model


@pytest.fixture(scope="module")
def model():
    return stir(build(), 0.3)


def test_an_image_does_not_depend_on_its_batch(model):
    three = images(3)
    with torch.no_grad():
        together, flipped = model(three), model(three.flip(0)).flip(0)
        for i in range(3):
            alone = model(three[i : i + 1])[0]
            assert (together[i] - alone).norm() < 1e-6 * alone.norm()
            assert (flipped[i] - alone).norm() < 1e-6 * alone.norm()


def test_frozen_stays_frozen():
    model = build()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    model.train().apply(lambda module: module.train())
    assert model.train() is model and model.training and not model.backbone.model.training
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images(2)).square().mean().backward()
    optimiser.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_layers_run_again_for_the_gradient_in_training_alone():
    model, calls = build("train.checkpointing=true"), []
    model.refiner.register_forward_pre_hook(lambda *_: calls.append(1))
    for is_training, expected in ((True, 4), (False, 2)):  # two layers are refined
        calls.clear()
        model.train(is_training)(images(1)).sum().backward()
        assert len(calls) == expected


def test_what_was_padded_is_cut_off(model):
    """A map that is linear in the column is the same line over the picture, whatever was added on its right."""
    line = (torch.arange(9.0).expand(1, 1, 5, 9) + 1) / 10  # patches of 8 pixels over 40 x 72
    logits = torch.cat([line, 1 - line], dim=1).log()
    whole = model.pixel_probabilities(logits, (40, 72))
    assert torch.equal(model.pixel_probabilities(logits, (37, 65)), whole[:, :, :37, :65])
    torch.testing.assert_close(whole[0, 0, 0, 4:-4], ((torch.arange(4, 68) + 0.5) / 8 + 0.5) / 10)


def test_the_loss_counts_the_pictures_own_pixels_only(model):
    labels = torch.randint(0, 19, (1, 61, 107), generator=torch.Generator().manual_seed(1))
    logits = model(images(1, 61, 107))
    whole = F.interpolate(logits, (64, 112), mode="bilinear", align_corners=False)[..., :61, :107]
    torch.testing.assert_close(model.loss(logits, labels), F.cross_entropy(whole, labels))


def test_lower_precision_says_nearly_the_same_and_spectra_stay_whole():
    plain, low = stir(build(), 0.05), stir(build("train.precision=bfloat16"), 0.05)
    kinds = []
    for branch in low.refiner.branches().values():
        branch.register_forward_pre_hook(lambda _, given: kinds.append(given[0].dtype))
    with torch.no_grad():
        expected, found = plain(images(2)), low(images(2))
    assert kinds == [torch.float32] * 4  # amplitude and phase of two layers
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.995  # kernels differ in what they add up in
    assert 0 < (found - expected).abs().max()
