"""Each lesson's numbers are those of an independent calculation, with numpy, by counting, or from a known case."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from setlib import spectral
from setlib.analysis import lessons


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Shift


@pytest.mark.parametrize("d", [0, 1, 5, -3])
@pytest.mark.parametrize("axes, shape", [(spectral.PIXELS, (1, 3, 9, 24)), (spectral.GRID, (2, 5, 15, 4))])
def test_phases_tell_a_shift_and_lie_on_the_line(d, axes, shape):
    x = noise(*shape)
    found = lessons.shift(x, x.roll(d, axes[1]), axes)
    assert found.numbers == [{"shift": d, "agreement": pytest.approx(1, abs=1e-5)}]
    assert f"moved by **{d}** columns" in found.says
    frequency, turned = found.drawn["measured"]
    full = np.fft.fft2(x.numpy(), axes=axes), np.fft.fft2(np.roll(x.numpy(), d, axes[1]), axes=axes)
    place = (0, 1) if axes == spectral.PIXELS else (0, slice(None), slice(None), 1)  # one channel; its row u = 2
    one, other = (z[place][2, : len(turned)] for z in full)
    assert np.exp(1j * turned.numpy()) == pytest.approx(np.exp(1j * (np.angle(other) - np.angle(one))), abs=1e-3)
    line = np.exp(-2j * np.pi * np.arange(len(turned)) * d / shape[axes[1]])
    assert np.exp(1j * found.drawn["-2π v d / W"][1].numpy()) == pytest.approx(line, abs=1e-4)
    assert frequency.numpy() == pytest.approx(np.fft.rfftfreq(shape[axes[1]]))


def test_a_moved_window_agrees_less_than_a_rolled_picture_and_more_than_another_one():
    x = noise(1, 3, 16, 60)
    moved, other = lessons.shift(x[..., 4:], x[..., :-4]), lessons.shift(x, noise(1, 3, 16, 60, seed=1))
    assert moved.numbers[0]["shift"] == 4
    assert other.numbers[0]["agreement"] < moved.numbers[0]["agreement"] < 0.999


# One part alone


@pytest.mark.parametrize("axes, shape", [(spectral.GRID, (4, 6, 7, 4)), (spectral.PIXELS, (4, 3, 7, 8))])
def test_what_is_rebuilt_has_one_part_of_its_own_and_the_other_of_the_others(axes, shape):
    """Up to a factor for each picture and channel, and but for zero frequency, by numpy's full transform.

    Three others: the signs of a bin that is its own partner cannot cancel.
    """
    x = noise(*shape)
    made = {name: np.fft.fft2(one.double().numpy(), axes=axes) for name, one in lessons.alone(x, axes).items()}
    own = np.fft.fft2(x.double().numpy(), axes=axes)
    kept = np.ones(own.shape, bool)
    kept[(slice(None), 0, 0) if axes == spectral.GRID else (slice(None), slice(None), 0, 0)] = False

    def factor(found: np.ndarray, expected: np.ndarray) -> float:
        """How far the ratio of two spectra is from one number for each picture and channel."""
        ratio = np.divide(found, expected, out=np.full_like(found, np.nan), where=kept)
        return float(np.nanmax(np.abs(ratio / np.nanmean(ratio, axes, keepdims=True) - 1)))

    others = np.stack([np.delete(np.abs(own), i, 0).mean(0) for i in range(4)])
    direction = np.stack([np.delete(own / np.abs(own), i, 0).sum(0) for i in range(4)])
    assert factor(made["phase, mean amplitudes"], others * own / np.abs(own)) < 1e-3
    assert factor(made["phase, amplitudes 1"], own / np.abs(own)) < 1e-3
    assert factor(made["amplitude, mean phases"], np.abs(own) * direction / np.abs(direction)) < 1e-3
    assert factor(np.abs(made["amplitude, phases of noise"]), np.abs(own)) < 1e-3
    assert lessons.alone(x, axes)["another picture"][1] == pytest.approx(x[0])


@pytest.mark.parametrize("axes", [spectral.GRID, spectral.PIXELS])
def test_rebuilt_channels_keep_their_mean_and_spread(axes):
    x = 3 + noise(3, 6, 8, 5)
    for one in [one for name, one in lessons.alone(x, axes).items() if name != "another picture"]:
        assert one.mean(axes) == pytest.approx(x.mean(axes), abs=1e-4)
        assert one.std(axes) == pytest.approx(x.std(axes), rel=1e-4)


@pytest.mark.parametrize("axes, channel", [(spectral.GRID, 3), (spectral.PIXELS, 1)])
def test_correlation_is_numpys(axes, channel):
    x, y = noise(2, 4, 5, 3), noise(2, 4, 5, 3) + 0.5 * noise(2, 4, 5, 3, seed=1)
    pairs = zip(*(np.moveaxis(z.numpy(), channel, 1).reshape(2 * z.shape[channel], -1) for z in (x, y)), strict=True)
    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])
    assert lessons.correlation(x, y, axes) == pytest.approx(expected, abs=1e-5)


def test_in_white_noise_the_phase_alone_correlates_by_the_mean_over_the_root_of_the_mean_square_of_its_amplitudes():
    """These are Rayleigh's: mean^2 / mean square = pi / 4; the amplitude alone says nothing at all."""
    found = lessons.rebuilding({"pixels": torch.rand(3, 3, 16, 16), "layer 1": noise(3, 16, 24, 32, seed=1)})
    assert [row["place"] for row in found.numbers] == ["pixels", "layer 1", "white noise"]
    for row in found.numbers[1:]:
        assert row["phase, amplitudes 1"] == pytest.approx(math.sqrt(math.pi) / 2, abs=0.01)
        assert row["amplitude, mean phases"] == pytest.approx(0, abs=0.03)
        assert row["amplitude, phases of noise"] == pytest.approx(0, abs=0.03)
    places, values = found.drawn["phase, amplitudes 1"]
    assert places == ["pixels", "layer 1", "white noise"] and values[2] == found.numbers[2]["phase, amplitudes 1"]
    assert f"- phase, amplitudes 1: {values[0]:.2f} (pixels), {values[1]:.2f} (layer 1)" in found.says


# Leakage, waves


def test_energy_on_the_axes_is_that_of_the_means_of_rows_and_columns_mirrored_or_not():
    x = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    plain, _, mirrored = lessons.leakage(x).numbers
    centred = x.double().numpy() - x.double().numpy().mean((2, 3), keepdims=True)
    means = centred.mean(3).var(-1).sum() + centred.mean(2).var(-1).sum()
    assert plain["all (%)"] == pytest.approx(100 * means / centred.var((2, 3)).sum(), rel=1e-4)
    assert mirrored["all (%)"] == pytest.approx(plain["all (%)"], rel=1e-4)


def test_a_step_at_the_border_leaks_and_a_window_or_a_mirror_keeps_it_in():
    """A ramp along the diagonal, on a wave that meets itself; by numpy, bin by bin."""
    u, v = torch.arange(32)[:, None], torch.arange(48)
    wave = torch.cos(2 * math.pi * (9 * u / 32 + 12 * v / 48))
    found = lessons.leakage((wave + (u / 32 + v / 48)).expand(1, 3, -1, -1), low=0.2)
    plain, window, mirrored = (row["beyond 0.2 (%)"] for row in found.numbers)
    assert mirrored < window + 0.1 < plain / 5
    x = (wave + (u / 32 + v / 48)).double().numpy()
    x = (x - x.mean()) * np.outer(np.hanning(33)[:-1], np.hanning(49)[:-1])
    energy = np.abs(np.fft.fft2(x)) ** 2
    for key, low in (("all (%)", 0), ("beyond 0.2 (%)", 0.2)):
        on = total = 0.0
        for i, j in product(range(32), range(48)):
            if 2 * math.hypot(min(i, 32 - i) / 32, min(j, 48 - j) / 48) > low:
                total += energy[i, j]
                on += energy[i, j] if i == 0 or j == 0 else 0
        assert found.numbers[1][key] == pytest.approx(100 * on / total, rel=1e-3)
    assert lessons.leakage(wave.expand(1, 3, -1, -1)).numbers[0]["all (%)"] == pytest.approx(0, abs=1e-4)
    assert f"{plain:.1f} % as it is" in found.says and found.drawn["mirrored"].shape == (64, 96)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (4, 5), (3, 4)])
def test_waves_are_counted_once_with_their_partners(size):
    height, width = size
    found = lessons.count_waves({"grid": size}, (0.4, 1.0, 1.5))
    waves = {}
    for u, v in product(range(height), range(width)):
        key = frozenset([(u, v), (-u % height, -v % width)])
        waves[key] = 2 * math.hypot(min(u, height - u) / height, min(v, width - v) / width)
    radii = sorted(waves.values())[1:]
    (row,) = found.numbers
    assert row == {"grid": "grid"} | {f"up to {r:g}": sum(one <= r + 1e-6 for one in radii) for r in (0.4, 1.0, 1.5)}
    assert found.drawn["grid"][0].numpy() == pytest.approx(radii, abs=1e-6)
    assert f"grid: {row['up to 0.4']} up to 0.4" in found.says


# What the release mixes, and phases of nothing


def test_mixing_is_that_of_a_transform_of_each_patch_over_batch_and_channel():
    x = noise(3, 4, 6, 5)
    released, grid = lessons.mixing(x).numbers
    own, mate = (
        [np.abs(np.fft.fft2(two[:, i, j].numpy()))[0] for i, j in np.ndindex(4, 6)] for two in (x[:2], x[[0, 2]])
    )
    expected = np.linalg.norm(np.subtract(mate, own)) / np.linalg.norm(own)
    assert released == {
        "over": "batch and channel",
        "mate (%)": pytest.approx(100 * expected),
        "positions": 1,
        "of": 24,
    }
    assert grid == {"over": "the patch grid", "mate (%)": 0, "positions": 24, "of": 24}
    drawn = lessons.mixing(x).drawn
    assert drawn["over batch and channel"][2, 3] == 100 and drawn["over batch and channel"].sum() == 100
    assert "one patch moves 1 of 24 positions" in lessons.mixing(x).says


def test_phases_of_nothing_are_chance_by_torch_and_nothing_by_the_rule():
    """The mean of T random phasors has length sqrt(pi / 4 T) on average, of T random signs sqrt(2 / pi T)."""
    plain, rule = lessons.empty_phases((16, 32), 64).numbers
    assert plain["empty"] == pytest.approx(1 - math.sqrt(math.pi / 4 / 64), abs=0.02)
    assert rule["empty"] == pytest.approx(0, abs=1e-6)
    assert plain["others"] == pytest.approx(rule["others"], abs=1e-6) == pytest.approx(0, abs=1e-5)
    found = lessons.empty_phases((16, 32), 4)
    assert f"In {16 * 17 - 3} of {16 * 17} bins" in found.says  # not v = 0, 4, 12: a square wave of period 8
    once, again, rule = found.drawn.values()
    assert np.isnan(rule).sum() == 16 * 32 - 5 and np.abs(once - again).max() > 1
