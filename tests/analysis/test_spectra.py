"""What is measured of spectra is what the docstrings define: distances, swaps, pictures and similarities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from setlib import spectral
from setlib.analysis import spectra

AXES = pytest.mark.parametrize("axes, shape", [(spectral.GRID, (2, 6, 8, 5)), (spectral.PIXELS, (2, 3, 7, 9))])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@AXES
def test_amplitude_and_phase_move_apart(axes, shape):
    """Nothing, a doubling, a change of amplitude alone, of phase alone, and the opposite phase."""
    x, y = noise(*shape), noise(*shape, seed=1)
    assert spectra.compare(x, x, axes) == pytest.approx({"amplitude": 0, "phase": 0}, abs=1e-12)
    assert spectra.compare(x, 2 * x, axes) == pytest.approx({"amplitude": math.log(2), "phase": 0}, abs=1e-9)
    found = spectra.compare(x, spectral.mix_amplitude(x, y, axes=axes), axes)
    assert found["phase"] == pytest.approx(0, abs=1e-9) and found["amplitude"] > 0.1
    found = spectra.compare(x, spectral.mix_phase(x, y, axes=axes), axes)
    assert found["amplitude"] == pytest.approx(0, abs=1e-9) and found["phase"] > 0.1
    assert spectra.compare(x, -x, axes) == pytest.approx({"amplitude": 0, "phase": 2}, abs=1e-9)


def test_comparing_is_symmetric_ignores_the_mean_and_stands_empty_pictures():
    x, y = noise(1, 6, 8, 5), noise(1, 6, 8, 5, seed=1)
    assert spectra.compare(x, y) == pytest.approx(spectra.compare(y, x))
    assert spectra.compare(x, y + 7) == pytest.approx(spectra.compare(x, y))
    assert spectra.compare(torch.zeros_like(x), y) == {"amplitude": 0, "phase": 0}


@pytest.mark.parametrize("width", [7, 8])
def test_half_spectrum_columns_count_as_often_as_in_the_full_one(width):
    x, y = noise(1, 5, width, 2), noise(1, 5, width, 2, seed=1)
    one, other = (torch.fft.fft2(z, dim=(1, 2), norm="ortho")[0].flatten(0, 1)[1:] for z in (x, y))
    weights = (one.abs() * other.abs()).sqrt()
    moved = (weights * (one.abs() / other.abs()).log().abs()).sum() / weights.sum()
    assert spectra.compare(x, y)["amplitude"] == pytest.approx(moved.item())


@AXES
def test_round_trip_loses_nothing_and_keeps_the_energy(axes, shape):
    found = spectra.round_trip(noise(*shape), axes)
    assert found["largest error"] < 1e-12
    assert found["energy of the spectrum"] == pytest.approx(found["energy"])


@AXES
def test_mix_phase_keeps_what_it_should(axes, shape):
    x, y = noise(*shape), noise(*shape, seed=1)
    assert spectral.mix_phase(x, y, weight=0, axes=axes) == pytest.approx(x)
    assert spectral.mix_phase(x, x, weight=0.5, axes=axes) == pytest.approx(x)
    assert spectral.mix_phase(x, y, axes=axes) == pytest.approx(spectral.mix_amplitude(y, x, axes=axes))
    assert spectral.mix_phase(x, y, low=9, high=10, axes=axes) == pytest.approx(x)


def test_feature_pictures_share_their_colours():
    x = noise(1, 4, 6, 5).float()
    same, again, other = spectra.feature_pictures([x, x, x + noise(1, 4, 6, 5, seed=1).float()])
    assert same.shape == (4, 6, 3) and same.min() >= 0 and same.max() <= 1
    assert (same == again).all() and not np.allclose(same, other)


def test_spectrum_pictures_are_full_spectra_with_zero_frequency_amid():
    x = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    amplitude, phase, against = spectra.spectrum_pictures(x).values()
    assert amplitude.shape == phase.shape == against.shape == (2, 8, 12)
    assert np.unravel_index(amplitude[0].argmax(), (8, 12)) == (4, 6)
    assert against[0] == pytest.approx(0, abs=1e-6)
    assert np.cos(against[1]) == pytest.approx(np.cos(phase[1] - phase[0]), abs=1e-5)


def test_the_picture_of_a_phase_has_nothing_where_nothing_is():
    picture = spectra.phase_picture(noise(1, 1, 8).expand(1, 4, 8))  # every row alike: all but one of its spectrum
    assert picture[:, 2].isfinite().all()
    assert picture[:, [0, 1, 3]].isnan().all()


def test_radial_profile_finds_a_wave():
    x = torch.arange(64).float()
    image = torch.cos(2 * math.pi * 16 * x / 64).expand(1, 3, 64, 64)  # 16 cycles in 64 pixels: half of Nyquist
    radii, profile = spectra.radial_profile(image, bins=28)
    assert abs(radii[profile[0].argmax()].item() - 0.5) < 0.06


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (37, 1), (5, 4)])
def test_profiles_and_pictures_of_any_size(size):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    radii, profile = spectra.radial_profile(x, bins=4)
    assert radii.isfinite().all() and profile.isfinite().all() and profile[:, 0].min() > 0
    assert spectra.log_amplitude_picture(x).isfinite().all()


def test_a_patch_is_most_similar_to_itself_and_components_are_shared():
    x, y = noise(1, 4, 6, 40), noise(1, 4, 6, 40, seed=1)
    for found in spectra.similarities([x, y], 7):
        assert found.shape == (4, 6) and found[1, 1] == pytest.approx(1) and np.abs(found).max() <= 1 + 1e-6
    one, other = spectra.similarities([x, x], 7)
    np.testing.assert_array_equal(one, other)
    assert not np.allclose(one, spectra.similarities([x, 9 * y], 7)[0], atol=0.01)  # the basis is that of both
    with pytest.raises(ValueError, match="The patches are 0 to 23, row by row, not 24"):
        spectra.similarities([x], 24)
