"""Refiners: identity at the start, one image at a time, valid spectra, gradients everywhere."""

import pytest
import torch

from setlib import spectral
from setlib.tokens import REFINERS, TokenBranch, build_refiner

LAYERS, CHANNELS = (2, 5), 12
SPECTRAL = [name for name in REFINERS if name.startswith("set")]


def build(name, scramble=False):
    torch.manual_seed(0)
    refiner = build_refiner(name, LAYERS, CHANNELS, num_tokens=7, rank=3)
    if scramble:
        for parameter in refiner.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return refiner


def features(*size, seed=1):
    return torch.randn(*size, CHANNELS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(2, 4, 6), (1, 5, 7), (3, 1, 9), (1, 6, 1)])
@pytest.mark.parametrize("name", [*SPECTRAL, "none"])
def test_training_starts_at_the_frozen_backbone(name, size):
    x = features(*size)
    torch.testing.assert_close(build(name)(x, 2), x, rtol=1e-6, atol=1e-6)


def test_rein_starts_within_its_scale():
    x = features(2, 4, 6)
    refiner = build("rein")
    assert 0 < (refiner(x, 2) - x).abs().max() < 0.02
    refiner.scale.data.zero_()
    assert torch.equal(refiner(x, 2), x)


def test_rein_is_its_formula():
    refiner, x = build("rein", scramble=True), features(2, 3, 4)
    tokens = refiner.branch.tokens.a[1] @ refiner.branch.tokens.b[1]
    share = (x.flatten(1, 2) @ tokens.T / CHANNELS**0.5).softmax(-1)
    mixed = share[..., 1:] @ refiner.branch.token_map(tokens[1:])
    expected = x + refiner.scale * refiner.branch.delta_map(mixed + x.flatten(1, 2)).view_as(x)
    torch.testing.assert_close(refiner(x, 5), expected)


@pytest.mark.parametrize("name", [name for name in REFINERS if name != "none"])
def test_an_image_does_not_depend_on_its_batch(name):
    refiner = build(name, scramble=True)
    x = features(4, 5, 6)
    alone = refiner(x[:1], 2)
    other = torch.cat([x[:1], 100 * features(3, 5, 6, seed=9)])
    for batch, place in ((x, 0), (x.flip(0), 3), (other, 0)):
        difference = (refiner(batch, 2)[place] - alone[0]).norm() / alone.norm()
        assert difference < 1e-6


@pytest.mark.parametrize("size", [(2, 4, 6), (1, 5, 7), (1, 1, 9), (1, 8, 5)])
@pytest.mark.parametrize("name", SPECTRAL)
def test_refined_spectrum_is_that_of_a_real_signal(name, size):
    refiner, x = build(name, scramble=True).double(), features(*size).double()
    amplitude, change, unit = refiner.refine_spectrum(x, 5)
    assert amplitude.min() >= 0
    full = spectral.full_spectrum(torch.polar(amplitude, change) * unit, size[2])
    signal = torch.fft.ifft2(full, dim=(1, 2), norm="ortho")
    assert signal.imag.abs().max() < 1e-6 * signal.real.abs().max()
    torch.testing.assert_close(signal.real, refiner(x, 5))


@pytest.mark.parametrize("name", list(REFINERS))
def test_zero_and_constant_features_give_finite_values_and_gradients(name):
    refiner = build(name, scramble=True)
    for x in (torch.zeros(1, 4, 6, CHANNELS), torch.ones(1, 4, 6, CHANNELS)):
        x.requires_grad_()
        y = refiner(x, 2)
        y.square().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in refiner.parameters())


@pytest.mark.parametrize("name", [name for name in REFINERS if name != "none"])
def test_every_parameter_has_a_gradient_after_two_steps(name):
    refiner, x, goal = build(name), features(2, 4, 6), features(2, 4, 6, seed=3)
    optimiser = torch.optim.SGD(refiner.parameters(), lr=1e-4)
    for _ in range(3):
        optimiser.zero_grad()
        sum((refiner(x, layer) - goal).square().sum() for layer in LAYERS).backward()
        gradients = {key: p.grad.abs().sum().item() for key, p in refiner.named_parameters()}
        optimiser.step()
    assert all(value > 0 for value in gradients.values()), gradients


def test_normalised_attention_ignores_the_level_of_the_amplitudes():
    torch.manual_seed(0)
    branch = TokenBranch(1, CHANNELS, 7, 3, normalise=True)
    torch.nn.init.normal_(branch.tokens.a)
    torch.nn.init.normal_(branch.tokens.b)
    x = torch.rand(2, 30, CHANNELS)
    share = branch.attention(x, 0)
    torch.testing.assert_close(share.sum(-1), torch.ones(2, 30))
    torch.testing.assert_close(branch.attention(5 * x + 3, 0), share, rtol=1e-3, atol=1e-4)  # a style: scale and offset
    branch.normalise = False
    assert (branch.attention(5 * x + 3, 0) - branch.attention(x, 0)).abs().max() > 0.01


def test_attention_of_the_amplitude_branch_is_not_uniform():
    share = build("set").amplitude.attention(features(1, 8, 16).abs().flatten(1, 2), 0)
    entropy = -(share * share.log()).sum(-1).mean() / torch.log(torch.tensor(7.0))
    assert entropy < 0.95


def test_half_precision_comes_back_as_it_came():
    assert build("set")(features(1, 4, 6).bfloat16(), 2).dtype == torch.bfloat16


def test_tokens_at_the_papers_size():
    count = {
        n: sum(p.numel() for p in build_refiner(n, range(24), 1024, 100, 16).parameters()) for n in ("rein", "set")
    }
    assert count["rein"] == 24 * 16 * (100 + 1024) + 2 * (1024**2 + 1024) + 1
    assert count["set"] == 2 * (count["rein"] - 1) <= 5_600_000


def test_unknown_refiner_names_the_nearest():
    with pytest.raises(ValueError, match="Unknown refiner 'rien' .nearest: rein"):
        build_refiner("rien", LAYERS, CHANNELS, 7, 3)
