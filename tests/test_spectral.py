"""The mathematics of the transform, property based: inverse, energy, symmetry, swaps."""

import math

import pytest
import torch
from full_spectrum import full_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st

from setlib import spectral

sizes = st.tuples(st.integers(1, 13), st.integers(1, 13))
seeds = st.integers(0, 2**31)
few = settings(max_examples=40, deadline=None)


def features(size, seed, batch=2, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *size, channels, generator=generator, dtype=torch.float64)


def striped():
    """(1, 4, 8, 2): every row alike, so that all but one row of the spectrum is nothing; then rounded anew."""
    x = torch.randn(1, 1, 8, 2, generator=torch.Generator().manual_seed(0)).expand(1, 4, 8, 2)
    return x * (1 + 1e-7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))


@few
@given(sizes, seeds)
def test_split_and_join_is_the_identity_and_keeps_the_energy(size, seed):
    x = features(size, seed)
    torch.testing.assert_close(spectral.join_spectrum(spectral.split_spectrum(x), size), x)
    full = full_spectrum(spectral.transform(x), size[1])
    torch.testing.assert_close(full, torch.fft.fft2(x, dim=(1, 2), norm="ortho"))
    torch.testing.assert_close(full.abs().square().sum(), x.square().sum())


@pytest.mark.parametrize("size", [(37, 37), (16, 32), (1, 37), (37, 1), (224, 448)])
def test_images_of_any_size(size):
    x = features(size, 0).permute(0, 3, 1, 2)
    spectrum = spectral.split_spectrum(x, spectral.PIXELS)
    assert spectrum.amplitude.shape == (2, 3, size[0], size[1] // 2 + 1)
    torch.testing.assert_close(spectral.join_spectrum(spectrum, size, spectral.PIXELS), x)
    for mix in (spectral.mix_amplitude, spectral.mix_phase):
        mixed = mix(x, x.flip(0), axes=spectral.PIXELS)
        assert mixed.shape == x.shape and mixed.isfinite().all()


@few
@given(sizes, seeds)
def test_a_change_of_phase_keeps_the_signal_real(size, seed):
    x = features(size, seed)
    amplitude, phase = spectral.split_spectrum(x)
    change = 3 * torch.randn(phase.shape, generator=torch.Generator().manual_seed(seed)).double()
    changed = spectral.change_phase(phase, change, size[1])
    full = full_spectrum(torch.polar(amplitude, changed), size[1])
    signal = torch.fft.ifft2(full, dim=(1, 2), norm="ortho")
    assert signal.imag.abs().max() < 1e-12 * (1 + signal.real.abs().max())
    torch.testing.assert_close(signal.abs().square().sum(), x.square().sum())  # no amplitude was lost
    inner = slice(1, (size[1] + 1) // 2)
    assert torch.equal(changed[:, :, inner], (phase + change)[:, :, inner])  # elsewhere it is what was asked for


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 9), (6, 1), (1, 1), (37, 2)])
@pytest.mark.parametrize("axes", [spectral.GRID, spectral.PIXELS])
def test_gradients_are_those_of_the_function(size, axes):
    x = features(size, 0, channels=2)
    x = x if axes == spectral.GRID else x.permute(0, 3, 1, 2)
    amplitude, phase = (part.detach().requires_grad_() for part in spectral.split_spectrum(x, axes))
    assert torch.autograd.gradcheck(lambda z: spectral.split_spectrum(z, axes), x.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, p: spectral.join_spectrum((a, p), size, axes), (amplitude, phase))


# Where a phase would be chance


def test_bins_that_are_their_own_partners_have_phase_0_or_pi():
    phase = spectral.split_spectrum(features((6, 8), 3, batch=5).float()).phase
    own = phase[:, ::3, ::4].flatten()
    assert ((own == 0) | (own == torch.tensor(math.pi))).all() and 0 < (own == 0).float().mean() < 1  # never -pi
    checked = -torch.ones(4, 6)
    checked[::2, ::2] = 1  # its other bins are real as well
    assert (spectral.split_spectrum(checked[None, :, :, None]).phase >= 0).all()


@pytest.mark.parametrize("scale", [1, 1e-6, 1e6])
def test_what_is_nothing_has_phase_0_and_no_gradient_at_every_brightness(scale):
    x = (scale * striped() * torch.tensor([1, 1e-4])).requires_grad_()  # one channel is darker
    amplitude, phase = spectral.split_spectrum(x)
    assert spectral.is_empty(amplitude)[:, 1:].all() and not spectral.is_empty(amplitude)[:, 0].any()
    assert (phase[:, 1:] == 0).all() and (phase[:, 0] != 0).any()
    (phase[:, 1:].sum() + amplitude[:, 1:].sum()).backward()
    assert (x.grad == 0).all()
    assert (spectral.unit_phasor(spectral.transform(x.detach()))[:, 1:] == 1).all()


def test_gradients_are_finite_where_the_amplitude_is_zero():
    x = torch.zeros(1, 4, 6, 2, requires_grad=True)
    amplitude, phase = spectral.split_spectrum(x)
    (amplitude.sum() + phase.sum() + spectral.unit_phasor(spectral.transform(x)).real.sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_returned_as_it_came(dtype):
    x = features((6, 8), 0).to(dtype)
    assert spectral.transform(x).dtype == torch.complex64
    with torch.autocast("cpu", torch.bfloat16):
        assert {part.dtype for part in spectral.split_spectrum(x)} == {torch.float32}
    mixed = spectral.mix_amplitude(x, x)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, x)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="4-D"):
        spectral.transform(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="differ in shape"):
        spectral.mix_amplitude(torch.zeros(1, 4, 4, 1), torch.zeros(1, 4, 5, 1))


# Swaps and bands


@few
@given(sizes, seeds)
def test_full_swap_moves_exactly_the_amplitude(size, seed):
    content, style = features(size, seed), features(size, seed + 1)
    swapped = spectral.split_spectrum(spectral.mix_amplitude(content, style))
    torch.testing.assert_close(swapped.amplitude, spectral.split_spectrum(style).amplitude)
    turn = swapped.phase - spectral.split_spectrum(content).phase
    assert torch.cos(turn).min() > 1 - 1e-9
    torch.testing.assert_close(spectral.mix_amplitude(content, content, weight=0.7), content)


def test_low_band_swap_leaves_high_frequencies_alone():
    content, style = features((12, 20), 0), features((12, 20), 1)
    result = spectral.transform(spectral.mix_amplitude(content, style, high=0.3))
    outside = spectral.frequency_radius((12, 20)) > 0.3
    assert torch.equal(spectral.band_mask((12, 20), high=0.3), (~outside).float()) and not outside[0, 0]
    torch.testing.assert_close(result[:, outside], spectral.transform(content)[:, outside])
    inside = spectral.transform(style).abs()[:, ~outside]
    torch.testing.assert_close(result.abs()[:, ~outside], inside)


def test_half_way_between_opposed_phases_the_contents_stays():
    content = features((6, 8), 0).float()
    torch.testing.assert_close(spectral.mix_phase(content, -content, weight=0.5), content)
    torch.testing.assert_close(spectral.mix_phase(content, -content, weight=1.0), -content)


def test_only_the_grid_is_transformed():
    x = features((6, 8), 0)
    changed = x.clone()
    changed[1] += 1
    changed[..., 2] += 1
    assert torch.equal(spectral.transform(changed)[0, ..., :2], spectral.transform(x)[0, ..., :2])
