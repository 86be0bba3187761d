"""SET's variants are what their names say: real outputs, one change each, and a placebo of equal size."""

import math

import pytest
import torch
from scipy import fft
from torch import nn

from setlib import spectral, style, variants
from setlib.refiners import build_refiner
from setlib.weights.load import load_backbone

CHANNELS = 12
NAMES = ["set-tokens", "set-channels", "set-space", "set-phasor", "set-cosine", "set-dct", "set-placebo", "set-low"]


def build(name, moved=0.0, channels=CHANNELS, **options):
    torch.manual_seed(0)
    refiner = build_refiner(name, (2, 5), channels, **({"num_tokens": 7, "rank": 3} | options))
    for p in refiner.parameters():
        p.data.add_(moved * torch.randn_like(p))
    return refiner


def features(*size, channels=CHANNELS):
    return torch.randn(*size, channels, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_queries_come_from_tokens_of_any_width_and_precision_comes_back(name):
    refiner, x = build(name, moved=0.1, query_channels=5), features(1, 4, 6)
    assert refiner.queries().shape == (7, 5) and refiner(x.bfloat16(), 2).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = refiner(x, 2)
        y.square().sum().backward()
    assert y.dtype == torch.float32 and y.isfinite().all()


@pytest.mark.parametrize("channels", [12, 13])
def test_spectra_over_channels_see_one_patch_and_stay_real(channels):
    refiner, x = build("set-channels", 0.3, channels).double(), features(1, 3, 4, channels=channels).double()
    amplitude, phase = refiner.refine_spectrum(x, 5)
    assert amplitude.shape == phase.shape == (1, 12, 1, channels // 2 + 1) and amplitude.min() >= 0
    waves = torch.polar(amplitude, phase)[:, :, 0]
    assert waves.imag[..., 0].abs().max() < 1e-12 and (channels % 2 or waves.imag[..., -1].abs().max() < 1e-12)
    torch.testing.assert_close(torch.fft.rfft(refiner(x, 5).flatten(1, 2), norm="ortho"), waves)
    refiner.amplitude.normalise = ""  # it reads all patches of an image
    torch.testing.assert_close(refiner(x[:, 1:2, 2:3], 5), refiner(x, 5)[:, 1:2, 2:3])


def test_a_residual_in_space_is_the_inverse_of_its_spectrum():
    refiner, x = build("set-space", 0.3).double(), features(2, 5, 6).double()
    amplitude, phase = refiner.refine_spectrum(x, 5)
    again = spectral.split_spectrum((refiner(x, 5) - x) / refiner.scale)
    torch.testing.assert_close(again.amplitude, amplitude, rtol=1e-6, atol=1e-6)
    own = spectral.split_spectrum(x).phase
    assert torch.equal(phase[:, 0, 0], own[:, 0, 0])  # the mean of a channel keeps its sign
    torch.testing.assert_close(phase[:, 1:, 1], refiner.phase(own.flatten(1, 2), 1).view_as(own)[:, 1:, 1])


def test_phasors_stay_on_the_circle_where_the_sum_has_no_direction():
    refiner, x = build("set-phasor").double(), features(1, 4, 6).double().requires_grad_()
    refiner.phase.delta_map.weight.data = -torch.eye(2 * CHANNELS, dtype=torch.float64)  # p + beta(p) is all but 0
    refiner.phase.token_map.weight.data.mul_(1e-9)
    refiner.phase.token_map.bias.data.zero_()
    y = refiner(x, 2)
    torch.testing.assert_close(y, x)  # there phases stay
    (y * features(1, 4, 6)).sum().backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e3 for p in [x, *refiner.parameters()])
    turned = build("set-phasor", 0.3).double().refine_spectrum(x, 2).phase - spectral.split_spectrum(x).phase
    assert turned.abs().max() > 0.1


def test_attention_by_cosine_differs_between_places():
    x = features(1, 8, 12, channels=96).cumsum(1).cumsum(2)  # neighbours are alike
    phase = spectral.split_spectrum(x).phase.flatten(1, 2)
    refiners = [build(name, channels=96, num_tokens=100, rank=16) for name in ("set", "set-cosine")]
    plain, cosine = (refiner.phase.attention(phase, 0) for refiner in refiners)  # (1, P, M)
    entropy = [torch.special.entr(share).sum(-1).mean() / math.log(100) for share in (plain, cosine)]
    assert entropy[0] > 0.999 and entropy[1] < 0.97 and cosine.var(1).mean() > 100 * plain.var(1).mean()


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3)])
def test_the_cosine_transform_is_orthonormal_and_scipys(size):
    x = features(2, *size).double()
    waves = variants.to_cosines(x)
    torch.testing.assert_close(waves, torch.from_numpy(fft.dctn(x.numpy(), axes=(1, 2), norm="ortho")))
    torch.testing.assert_close(variants.to_cosines(waves, back=True), x)
    refined = variants.to_cosines(build("set-dct", 0.3).double()(x, 2))
    assert ((refined * waves) >= -1e-12).all()  # signs are kept


def test_the_placebo_has_sets_parameters_and_its_function_on_scrambled_positions():
    real, placebo, x = build("set", 0.3), build("set-placebo", 0.3), features(2, 4, 6)
    assert all(torch.equal(a, b) for a, b in zip(real.parameters(), placebo.parameters(), strict=True))
    order, signs = style.random_basis(24)
    expected = real((x.flatten(1, 2) * signs)[:, order].view_as(x), 2).flatten(1, 2)
    torch.testing.assert_close((placebo(x, 2).flatten(1, 2) * signs)[:, order], expected)
    assert (placebo(x, 2) - real(x, 2)).norm() > 0.1 * (real(x, 2) - x).norm()


def test_low_tokens_leave_phases_and_what_is_above_their_radius():
    refiner, x = build("set-low", 0.3).double(), features(1, 16, 32).double()
    own, found = (spectral.split_spectrum(y) for y in (x, refiner(x, 2)))
    low = spectral.frequency_radius((16, 32)) <= variants.LOW
    moved = (found.amplitude - own.amplitude).abs().amax((0, 3)) > 1e-9
    assert torch.equal(moved, low) and 1 < low.sum() < 10
    kept = torch.polar(found.amplitude, own.phase)
    torch.testing.assert_close(torch.polar(found.amplitude, found.phase), kept)


def test_an_eager_rein_is_rein_with_a_larger_scale():
    rein, eager, x = build("rein"), build("rein-eager"), features(1, 4, 6)
    torch.testing.assert_close(eager(x, 2) - x, 100 * (rein(x, 2) - x), rtol=1e-3, atol=1e-4)


def test_soma_learns_the_smallest_components_and_starts_as_the_backbone():
    backbone, images = load_backbone("tiny-random"), torch.rand(1, 3, 32, 48)
    adapted, rank = backbone.adapted(build_refiner("soma", (2,), backbone.channels).adapt), variants.SOMA_RANK
    torch.testing.assert_close(adapted(images)[4], backbone(images)[4], rtol=1e-4, atol=1e-5)
    maps = [[m for m in b._layers[1].modules() if isinstance(m, nn.Linear)] for b in (adapted, backbone)]
    assert sum(p.requires_grad for p in adapted.parameters()) == 2 * len(maps[0]) == 12
    for split, whole in zip(*maps, strict=True):
        (minor,), rest = split.parametrizations.weight, split.parametrizations.weight.original
        values = torch.linalg.svdvals(whole.weight)
        parts = torch.linalg.svdvals(rest)[: len(values) - rank], torch.linalg.svdvals(minor.b @ minor.a)[:rank]
        torch.testing.assert_close(torch.cat(parts), values, rtol=1e-3, atol=1e-5)
        assert minor.a.requires_grad and not rest.requires_grad and not split.bias.requires_grad
