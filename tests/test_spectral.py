"""The mathematics of the transform, property based: inverse, energy, symmetry, swaps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from setlib import spectral

sizes = st.tuples(st.integers(1, 13), st.integers(1, 13))
seeds = st.integers(0, 2**31)
few = settings(max_examples=40, deadline=None)


def features(size, seed, batch=2, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *size, channels, generator=generator, dtype=torch.float64)


@few
@given(sizes, seeds)
def test_split_and_join_is_the_identity(size, seed):
    x = features(size, seed)
    torch.testing.assert_close(spectral.join_spectrum(spectral.split_spectrum(x), size), x)


@pytest.mark.parametrize("size", [(37, 37), (16, 32), (1, 37), (37, 1), (224, 448)])
def test_pictures_and_grids_of_any_size(size):
    x = features(size, 0).permute(0, 3, 1, 2)
    spectrum = spectral.split_spectrum(x, spectral.PIXELS)
    assert spectrum.amplitude.shape == (2, 3, size[0], size[1] // 2 + 1)
    torch.testing.assert_close(spectral.join_spectrum(spectrum, size, spectral.PIXELS), x)


@few
@given(sizes, seeds)
def test_energy_is_kept(size, seed):
    x = features(size, seed)
    full = spectral.full_spectrum(spectral.transform(x), size[1])
    assert full.shape == x.shape
    torch.testing.assert_close(full.abs().square().sum(), x.square().sum())


@few
@given(sizes, seeds)
def test_half_spectrum_and_symmetry_give_the_full_one(size, seed):
    x = features(size, seed)
    expected = torch.fft.fft2(x, dim=(1, 2), norm="ortho")
    torch.testing.assert_close(spectral.full_spectrum(spectral.transform(x), size[1]), expected)


@few
@given(sizes, seeds)
def test_a_change_of_phase_keeps_the_signal_real(size, seed):
    x = features(size, seed)
    amplitude, phase = spectral.split_spectrum(x)
    change = 3 * torch.randn(phase.shape, generator=torch.Generator().manual_seed(seed)).double()
    changed = spectral.change_phase(phase, change, size[1])
    full = spectral.full_spectrum(torch.polar(amplitude, changed), size[1])
    signal = torch.fft.ifft2(full, dim=(1, 2), norm="ortho")
    assert signal.imag.abs().max() < 1e-12 * (1 + signal.real.abs().max())
    torch.testing.assert_close(signal.abs().square().sum(), x.square().sum())  # no amplitude was lost
    inner = slice(1, (size[1] + 1) // 2)
    assert torch.equal(changed[:, :, inner], (phase + change)[:, :, inner])  # elsewhere it is what was asked for


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 9), (6, 1), (1, 1), (37, 2)])
@pytest.mark.parametrize("axes", [spectral.GRID, spectral.PIXELS])
def test_gradients_are_those_of_the_function(size, axes, monkeypatch):
    x = features(size, 0, batch=2, channels=2).requires_grad_()
    x = x if axes == spectral.GRID else x.permute(0, 3, 1, 2).detach().requires_grad_()
    amplitude, phase = (part.detach().requires_grad_() for part in spectral.split_spectrum(x, axes))
    for largest in (spectral.LARGEST_GRID, 0):  # products with matrices, and the FFT
        monkeypatch.setattr(spectral, "LARGEST_GRID", largest)
        assert torch.autograd.gradcheck(lambda z: spectral.split_spectrum(z, axes), x)
        assert torch.autograd.gradcheck(lambda a, p: spectral.join_spectrum((a, p), size, axes), (amplitude, phase))
    if axes == spectral.GRID:
        change = torch.randn_like(phase).requires_grad_()
        assert torch.autograd.gradcheck(lambda p, c: spectral.change_phase(p, c, size[1]), (phase, change))


@few
@given(sizes, seeds)
def test_products_with_matrices_are_the_fft(size, seed):
    x = features(size, seed)
    expected = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
    real, imaginary = spectral.to_parts(x).unbind(1)
    torch.testing.assert_close(torch.complex(real, imaginary), expected)
    torch.testing.assert_close(spectral.from_parts(spectral.to_parts(x), size), x)


def test_a_bin_that_is_its_own_partner_has_phase_0_or_pi():
    phase = spectral.split_spectrum(features((6, 8), 3, batch=5).float()).phase
    own = phase[:, ::3, ::4].flatten()
    assert ((own == 0) | (own == torch.tensor(math.pi))).all() and 0 < (own == 0).float().mean() < 1


def striped(columns: int = 8) -> torch.Tensor:
    """(1, 4, columns, 2): every row alike, so that all but one row of the spectrum is nothing; then rounded anew."""
    x = torch.randn(1, 1, columns, 2, generator=torch.Generator().manual_seed(0)).expand(1, 4, columns, 2)
    return x * (1 + 1e-7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("largest", [spectral.LARGEST_GRID, 0])
def test_what_is_nothing_has_phase_0_and_no_gradient(largest, monkeypatch):
    monkeypatch.setattr(spectral, "LARGEST_GRID", largest)
    x = striped().requires_grad_()
    amplitude, phase = spectral.split_spectrum(x)
    assert spectral.is_empty(amplitude)[:, 1:].all() and not spectral.is_empty(amplitude)[:, 0].any()
    assert (phase[:, 1:] == 0).all() and (phase[:, 0] != 0).any()
    (phase[:, 1:].sum() + amplitude[:, 1:].sum()).backward()
    assert (x.grad == 0).all()
    assert (spectral.unit_phasor(spectral.transform(x.detach()))[:, 1:] == 1).all()


def test_what_is_nothing_is_so_at_every_brightness_and_in_each_channel():
    x = striped()
    x[..., 1] *= 1e-4
    for scale in (1, 1e-6, 1e6):
        empty = spectral.is_empty(spectral.split_spectrum(scale * x).amplitude)
        assert empty[:, 1:].all() and not empty[:, 0].any()


@pytest.mark.parametrize("largest", [spectral.LARGEST_GRID, 0])
def test_bins_that_are_their_own_partners_are_real_in_both_forms(largest, monkeypatch):
    monkeypatch.setattr(spectral, "LARGEST_GRID", largest)
    parts = spectral.to_parts(features((6, 8), 3, batch=5).float())
    assert (parts[:, 1, ::3, ::4] == 0).all() and (parts[:, 1, 1, 1] != 0).any()
    phase = spectral.split_spectrum(features((6, 8), 3, batch=5).float()).phase[:, ::3, ::4]
    assert (phase >= 0).all()  # pi, never -pi


def test_the_picture_of_a_phase_has_nothing_where_nothing_is():
    picture = spectral.phase_picture(striped()[..., 0])
    middle = picture.shape[1] // 2
    rest = torch.cat([picture[:, :middle], picture[:, middle + 1 :]], 1)
    assert rest.isnan().all() and picture[:, middle].isfinite().all()


def test_half_way_between_opposed_phases_the_contents_stays():
    content = features((6, 8), 0).float()
    turned = spectral.split_spectrum(spectral.mix_phase(content, -content, weight=0.5))
    torch.testing.assert_close(spectral.join_spectrum(turned, (6, 8)), content)
    full = spectral.mix_phase(content, -content, weight=1.0)
    torch.testing.assert_close(full, -content)


@few
@given(sizes, seeds)
def test_swap_with_itself_changes_nothing(size, seed):
    x = features(size, seed)
    torch.testing.assert_close(spectral.mix_amplitude(x, x, weight=0.7), x)


@few
@given(sizes, seeds)
def test_full_swap_moves_exactly_the_amplitude(size, seed):
    content, style = features(size, seed), features(size, seed + 1)
    swapped = spectral.split_spectrum(spectral.mix_amplitude(content, style))
    torch.testing.assert_close(swapped.amplitude, spectral.split_spectrum(style).amplitude)
    turn = swapped.phase - spectral.split_spectrum(content).phase
    assert torch.cos(turn).min() > 1 - 1e-9


def test_low_band_swap_leaves_high_frequencies_alone():
    content, style = features((12, 20), 0), features((12, 20), 1)
    result = spectral.transform(spectral.mix_amplitude(content, style, high=0.3))
    outside = spectral.frequency_radius((12, 20)) > 0.3
    torch.testing.assert_close(result[:, outside], spectral.transform(content)[:, outside])
    inside = spectral.transform(style).abs()[:, ~outside]
    torch.testing.assert_close(result.abs()[:, ~outside], inside)


@few
@given(sizes, seeds, st.integers(0, 12), st.integers(0, 12))
def test_shifting_the_picture_leaves_amplitude_unchanged(size, seed, down, right):
    x = features(size, seed)
    moved = x.roll((down, right), (1, 2))
    torch.testing.assert_close(spectral.transform(moved).abs(), spectral.transform(x).abs())


def test_only_the_grid_is_transformed():
    x = features((6, 8), 0)
    changed = x.clone()
    changed[1] += 1
    changed[..., 2] += 1
    same = spectral.transform(changed)[0, ..., :2]
    assert torch.equal(same, spectral.transform(x)[0, ..., :2])


def test_gradients_are_finite_where_the_amplitude_is_zero():
    x = torch.zeros(1, 4, 6, 2, requires_grad=True)
    spectrum = spectral.split_spectrum(x)
    (
        spectrum.amplitude.sum() + spectrum.phase.sum() + spectral.unit_phasor(spectral.transform(x)).real.sum()
    ).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_returned_as_it_came(dtype):
    x = features((6, 8), 0).to(dtype)
    assert spectral.transform(x).dtype == torch.complex64
    mixed = spectral.mix_amplitude(x, x)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, x)


def test_bands_cover_the_spectrum_once():
    low, high = spectral.band_mask((9, 12), 0, 0.5), spectral.band_mask((9, 12), 0.5 + 1e-6, 1.5)
    assert (low + high).eq(1).all()
    assert low[0, 0] == 1 and high[0, 0] == 0


def test_radial_profile_finds_a_wave():
    x = torch.arange(64).float()
    picture = torch.cos(2 * math.pi * 16 * x / 64).expand(1, 3, 64, 64)  # 16 cycles in 64 pixels: half of Nyquist
    radii, profile = spectral.radial_profile(picture, bins=28)
    assert abs(radii[profile[0].argmax()].item() - 0.5) < 0.06


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (37, 1), (5, 4)])
def test_profiles_and_pictures_of_any_size(size):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    radii, profile = spectral.radial_profile(x, bins=4)
    assert radii.isfinite().all() and profile.isfinite().all() and profile[:, 0].min() > 0
    assert spectral.log_amplitude_picture(x).isfinite().all()
    for mixed in (spectral.mix_amplitude(x, x.flip(0), axes=(2, 3)), spectral.mix_phase(x, x.flip(0), axes=(2, 3))):
        assert mixed.shape == x.shape and mixed.isfinite().all()


def test_log_amplitude_picture_has_the_mean_in_the_middle():
    picture = spectral.log_amplitude_picture(torch.ones(1, 3, 8, 12))
    assert picture.shape == (1, 8, 12)
    assert picture[0].argmax() == 4 * 12 + 6


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="4-D"):
        spectral.transform(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="differ in shape"):
        spectral.mix_amplitude(torch.zeros(1, 4, 4, 1), torch.zeros(1, 4, 5, 1))


# The Haar transform over the patch grid


@few
@given(sizes, seeds)
def test_haar_bands_joined_are_the_features(size, seed):
    x = features(size, seed)
    bands = spectral.split_haar(x)
    assert bands.shape == (4, 2, -(-size[0] // 2), -(-size[1] // 2), 3)
    torch.testing.assert_close(spectral.join_haar(bands, size), x)


@few
@given(st.tuples(st.integers(1, 6), st.integers(1, 6)), seeds)
def test_haar_bands_keep_the_energy(half, seed):
    x = features((2 * half[0], 2 * half[1]), seed)
    torch.testing.assert_close(spectral.split_haar(x).square().sum(), x.square().sum())


def test_haar_bands_are_the_mean_and_the_differences_of_each_square():
    x = features((4, 6), 0)
    one, right, below, across = (x[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    signs = ((1, 1, 1), (-1, 1, -1), (1, -1, -1), (-1, -1, 1))  # of right, below and across
    for band, (r, b, a) in zip(spectral.split_haar(x), signs, strict=True):
        torch.testing.assert_close(band, (one + r * right + b * below + a * across) / 2)
    ramp = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 4, 6, 1)
    low, along_width, along_height, both = spectral.split_haar(ramp)
    assert (along_width == -1).all() and not along_height.any() and not both.any()
    assert low[0, 0, :, 0].tolist() == [1, 5, 9]  # twice the mean
    assert not spectral.split_haar(torch.ones(1, 5, 7, 2))[1:].any()  # odd sides repeat their last patches
    assert spectral.split_haar(x.half()).dtype == torch.float32
