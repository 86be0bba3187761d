"""Refiners with tokens: identity at the start, one image at a time, valid spectra, gradients everywhere."""

import math

import pytest
import torch
from full_spectrum import full_spectrum

from setlib import spectral
from setlib.refiners import REFINERS, build_refiner
from setlib.tokens import LowRankTokens, TokenBranch

LAYERS, CHANNELS = (2, 5), 12
SPECTRAL = [name for name in REFINERS if name.startswith("set") and name != "set-released"]
OTHERS = ("set-channels", "set-space", "set-dct", "set-placebo", "set-style-placebo")
OVER_GRID = [name for name in SPECTRAL if name not in OTHERS]
OURS = ["rein", "fada", "adaptformer", *SPECTRAL]  # what changes features behind the layers, one image at a time


def build(name, scramble=False, **options):
    torch.manual_seed(0)
    refiner = build_refiner(name, LAYERS, CHANNELS, num_tokens=7, rank=3, **options)
    if scramble:
        for parameter in refiner.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return refiner


def features(*size, seed=1):
    return torch.randn(*size, CHANNELS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(2, 4, 6), (1, 5, 7), (3, 1, 9), (1, 6, 1)])
@pytest.mark.parametrize("name", [*(n for n in SPECTRAL if n != "set-space"), "none", "adaptformer"])
def test_training_starts_at_the_frozen_backbone(name, size):
    x = features(*size)
    torch.testing.assert_close(build(name)(x, 2), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["rein", "fada", "set-space"])
def test_a_learnable_scale_starts_small(name):
    x = features(2, 4, 6)
    refiner = build(name)
    assert 0 < (refiner(x, 2) - x).abs().max() < 0.02
    refiner.scale.data.zero_()
    assert torch.equal(refiner(x, 2), x)


def test_rein_is_its_formula():
    refiner, x = build("rein", scramble=True), features(2, 3, 4)
    branch = refiner.patches
    tokens = branch.tokens.a[1] @ branch.tokens.b[1]
    share = (x.flatten(1, 2) @ tokens.T / CHANNELS**0.5).softmax(-1)
    mixed = share[..., 1:] @ branch.token_map(tokens[1:])
    expected = x + refiner.scale * branch.delta_map(mixed + x.flatten(1, 2)).view_as(x)
    torch.testing.assert_close(refiner(x, 5), expected)


def test_set_is_its_formula():
    refiner, x = build("set", scramble=True), features(2, 4, 6)
    amplitude, phase = spectral.split_spectrum(x)
    changes = [
        branch(part.flatten(1, 2), 1).view_as(part)
        for branch, part in ((refiner.amplitude, amplitude), (refiner.phase, phase))
    ]
    refined = (amplitude + changes[0]).relu(), spectral.change_phase(phase, changes[1], 6)
    torch.testing.assert_close(refiner(x, 5), spectral.join_spectrum(refined, (4, 6)), rtol=1e-4, atol=1e-4)
    without = {"set-amplitude": (refined[0], phase), "set-phase": (amplitude, refined[1])}
    for name, parts in without.items():
        part = build(name)
        part.load_state_dict({key: value for key, value in refiner.state_dict().items() if key in part.state_dict()})
        torch.testing.assert_close(part(x, 5), spectral.join_spectrum(parts, (4, 6)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_an_image_does_not_depend_on_its_batch(name):
    refiner = build(name, scramble=True)
    x = features(4, 5, 6)
    alone = refiner(x[:1], 2)
    other = torch.cat([x[:1], 100 * features(3, 5, 6, seed=9)])
    for batch, place in ((x, 0), (x.flip(0), 3), (other, 0)):
        difference = (refiner(batch, 2)[place] - alone[0]).norm() / alone.norm()
        assert difference < 1e-6


@pytest.mark.parametrize("size", [(2, 4, 6), (1, 5, 7), (1, 1, 9), (1, 8, 5)])
@pytest.mark.parametrize("name", OVER_GRID)
def test_refined_spectrum_is_that_of_a_real_signal(name, size):
    refiner, x = build(name, scramble=True).double(), features(*size).double()
    amplitude, phase = refiner.refine_spectrum(x, 5)
    assert amplitude.min() >= 0
    full = full_spectrum(torch.polar(amplitude, phase), size[2])
    signal = torch.fft.ifft2(full, dim=(1, 2), norm="ortho")
    assert signal.imag.abs().max() < 1e-6 * signal.real.abs().max()
    torch.testing.assert_close(signal.real, refiner(x, 5))


@pytest.mark.parametrize("name", ["none", "set-released", *OURS])
def test_zero_and_constant_features_give_finite_values_and_gradients(name):
    refiner = build(name, scramble=True)
    for x in (torch.zeros(1, 4, 6, CHANNELS), torch.ones(1, 4, 6, CHANNELS)):
        x.requires_grad_()
        y = refiner(x, 2)
        y.square().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in refiner.parameters())


@pytest.mark.parametrize("name", OURS)
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
    tokens = LowRankTokens(1, 7, CHANNELS, 3)
    torch.nn.init.normal_(tokens.a)
    torch.nn.init.normal_(tokens.b)
    branch = TokenBranch(tokens, CHANNELS, normalise="positions")
    x = torch.rand(2, 30, CHANNELS)
    share = branch.attention(x, 0)
    torch.testing.assert_close(share.sum(-1), torch.ones(2, 30))
    torch.testing.assert_close(branch.attention(5 * x + 3, 0), share, rtol=1e-4, atol=1e-5)  # a style: scale and offset
    branch.normalise = ""
    assert (branch.attention(5 * x + 3, 0) - branch.attention(x, 0)).abs().max() > 0.01
    assert branch.attention(x[:, :1], 0).isfinite().all()  # a grid of one patch


def test_attention_of_the_amplitude_branch_is_not_uniform():
    share = build("set").amplitude.attention(features(1, 8, 16).abs().flatten(1, 2), 0)
    entropy = -(share * share.log()).sum(-1).mean() / torch.log(torch.tensor(7.0))
    assert entropy < 0.95


def test_half_precision_comes_back_as_it_came():
    assert build("set")(features(1, 4, 6).bfloat16(), 2).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "linked", "others"),
    [
        ("rein", "patches", []),
        ("set", "phase", ["amplitude"]),
        ("set-amplitude", "amplitude", []),
        ("fada", "low", ["high"]),
    ],
)
def test_queries_pool_the_linked_tokens_of_all_layers(name, linked, others):
    refiner = build(name, query_channels=5)
    tokens = getattr(refiner, linked).tokens
    projected = refiner.query_map.transform(tokens())  # (L, M, Q)
    pooled = torch.stack([projected.max(0).values, projected.mean(0), projected[-1]], -1).flatten(1)
    assert refiner.queries().shape == (7, 5)
    torch.testing.assert_close(refiner.queries(), refiner.query_map.merge(pooled))
    refiner.queries().square().sum().backward()
    assert tokens.a.grad.abs().sum() > 0
    assert all(getattr(refiner, other).tokens.a.grad is None for other in others)


def test_without_query_channels_there_are_no_queries():
    assert build("set").queries() is None and build("none", query_channels=5).queries() is None


# SET as released


def test_the_released_form_leaks_from_image_to_image_and_ours_does_not():
    x, changed = features(2, 4, 6), features(2, 4, 6)
    changed[1] = features(1, 4, 6, seed=9)[0]
    for name in ("set-released", "rein", "set"):
        refiner = build(name, scramble=True)
        delta, other = ((refiner(f, 2) - f)[0] for f in (x, changed))
        assert ((other - delta).norm() / delta.norm() > 0.3) == (name == "set-released")


def test_the_released_form_refuses_another_batch_size_than_that_of_training():
    refiner, x = build("set-released").train(), features(4, 3, 4)
    refiner(x, 2)
    refiner.eval()
    assert refiner(x, 2).shape == x.shape
    with pytest.raises(ValueError, match="trained with batches of 4.* instead of 1, or set model.any_batch=true"):
        refiner(x[:1], 2)
    copy = build("set-released", any_batch=True).eval()
    copy.load_state_dict(refiner.state_dict())
    assert copy(x[:1], 2).isfinite().all()


def test_normalising_over_tokens_makes_the_attention_all_but_uniform():
    torch.manual_seed(0)
    released = build_refiner("set-released", LAYERS, 384, num_tokens=100, rank=16)
    share = released.amplitude.attention(100 * torch.rand(1, 500, 384), 0)
    assert share.max() < math.exp(math.sqrt(99 / 384)) / 100 * 1.01
    assert -(share * share.log()).sum(-1).min() / math.log(100) > 0.998
