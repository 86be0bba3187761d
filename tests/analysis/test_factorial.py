"""The crossed design recovers shares that are known, within its intervals, and finds nothing in shuffled labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from setlib import spectral
from setlib.analysis import factorial

LAYOUTS, STYLES, GRID = 6, 5, (8, 10, 3)


def fields(*shape: int, seed: int) -> torch.Tensor:
    """Complex half spectra of real noise, each (H, W // 2 + 1, C): Hermitian, so parts of them can be put together."""
    noise = torch.randn(*shape, *GRID, generator=torch.Generator().manual_seed(seed))
    return torch.fft.rfft2(noise, dim=(-3, -2))


def features(amplitude: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """Features (cells, H, W, C) of log amplitudes and phasors, (layouts, styles, H, W // 2 + 1, C) each."""
    spectrum = (amplitude.exp() * phase).expand(LAYOUTS, STYLES, *amplitude.shape[2:])
    return torch.fft.irfft2(spectrum, s=GRID[:2], dim=(-3, -2)).flatten(0, 1)


def found(x: torch.Tensor) -> dict[tuple[str, str], np.ndarray]:
    rows = factorial.share_rows(x, LAYOUTS)
    return {
        (part, band): np.array([r["share"] for r in rows if (r["part"], r["band"]) == (part, band)])
        for part in factorial.PARTS
        for band in {r["band"] for r in rows}
    }


def normal(*shape: int, seed: list[int]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("turn", [0.0, np.pi - 0.01])
def test_amplitude_of_style_and_phase_of_content_are_told_apart(turn: float):
    """The premise itself, built: in every band; phases that lie around the wrap change nothing."""
    style, content = fields(1, STYLES, seed=0), fields(LAYOUTS, 1, seed=1)
    phase = spectral.unit_phasor(content.flatten(0, 1)).view_as(content)
    if turn:  # all phases within 0.3 of the wrap, half of them on each side
        angle = turn * torch.where(phase.imag < 0, -1.0, 1.0) + 0.1 * phase.imag
        phase = torch.polar(torch.ones_like(angle), angle)
        phase = torch.where(content.imag.abs() < 1e-4 * content.abs(), phase.real.sign(), phase)
    shares = found(features(style.abs().log(), phase))
    assert {band for _, band in shares} == {"mean", "to 1/4", "to 1/2", "to 1", "corners", "all"}
    for (part, band), share in shares.items():
        if band != "mean" and not (turn and part == "phase"):
            np.testing.assert_allclose(share, [1, 0, 0] if part == "amplitude" else [0, 1, 0], atol=2e-4)
    if turn:
        np.testing.assert_allclose(shares["phase", "all"], [0, 1, 0], atol=0.02)


def test_noise_is_interaction_and_parts_add_up():
    noise = fields(LAYOUTS, STYLES, seed=2)
    rows = factorial.share_rows(
        features(noise.abs().log(), spectral.unit_phasor(noise.flatten(0, 1)).view_as(noise)), 6
    )
    own = [row for row in rows if row["band"] == "all"]
    for row in own:
        expected = float(row["factor"] == "interaction")
        assert row["low"] <= expected <= row["high"] and abs(row["share"] - expected) < 0.1
        assert abs(row["null"] - expected) < 0.1 and row["null low"] < row["null"] < row["null high"]
    for part in factorial.PARTS:
        assert sum(row["share"] for row in own if row["part"] == part) == pytest.approx(1)
    bands = {(r["part"], r["band"]): r["bins"] for r in rows if r["band"] != "all"}
    assert sum(n for (part, _), n in bands.items() if part == "phase") == GRID[0] * GRID[1]


@pytest.mark.parametrize("part", ["amplitude", "phase"])
@pytest.mark.parametrize("kind", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.3, 0.5, 0.2), (0.1, 0.1, 0.8)])
def test_known_shares_lie_in_their_intervals(part: str, kind: tuple[float, float, float]):
    """100 drawings of style, content and interaction; the truth has the variance that the drawn styles have."""
    layouts, styles, width, hits = 8, 8, 120, np.zeros(3)
    for seed in range(100):
        draw = [
            normal(*shape, width, seed=[seed, i])
            for i, shape in enumerate([(1, styles), (layouts, 1), (layouts, styles)])
        ]
        if part == "amplitude":
            values = sum(np.sqrt(share) * one for share, one in zip(kind, draw, strict=True)) + normal(
                width, seed=[seed, 3]
            )
            spread = draw[0].var(1, ddof=1).mean()
        else:  # each position's phase is style's, content's or its own; all are uniform on the circle
            ends = np.round(np.cumsum(kind) * width).astype(int)
            angles = [np.random.default_rng([seed, i]).uniform(0, 2 * np.pi, one.shape) for i, one in enumerate(draw)]
            chosen = np.searchsorted(ends, np.arange(width), side="right")
            full = [np.broadcast_to(one, (layouts, styles, width)) for one in angles]
            values = np.exp(1j * np.choose(chosen, full))
            own = np.exp(1j * angles[0][0][:, chosen == 0])
            spread = (np.abs(own - own.mean(0)) ** 2).sum(0).mean() / (styles - 1) if own.size else 1.0
        values = np.broadcast_to(values, (layouts, styles, width)).reshape(layouts * styles, width)
        values = np.concatenate([values.real, values.imag], 1) - np.concatenate([values.real, values.imag], 1).mean(0)
        truth = np.array([kind[0] * spread, kind[1], kind[2]], float) / (kind[0] * spread + kind[1] + kind[2])
        products, weights = values @ values.T, factorial.resampled(layouts, seed, 500)
        low, high = factorial.interval(factorial.shares(products, layouts, weights), layouts)
        hits += (low - 1e-5 <= truth) & (truth <= high + 1e-5)
    assert (hits >= 93).all(), hits


def test_layouts_drawn_twice_are_not_two():
    """A resample that holds one layout twice says what the same layouts without it say of styles."""
    values = normal(4 * 3, 50, seed=[0])
    products = values @ values.T
    twice = factorial.shares(np.kron(np.ones((1, 1)), products), 4, np.array([[2.0, 1, 1, 0]]))[0]
    keep = np.arange(9)
    once = factorial.shares(products[np.ix_(keep, keep)], 3, np.array([[2.0, 1, 1]]))[0]
    np.testing.assert_allclose(twice, once)


def test_gain_is_style_of_amplitude_alone():
    """A style that is one factor on everything moves every log amplitude alike and no phase."""
    x = torch.randn(LAYOUTS, 1, *GRID, generator=torch.Generator().manual_seed(3))
    shares = found((x * torch.logspace(-1, 1, STYLES)[None, :, None, None, None]).flatten(0, 1))
    np.testing.assert_allclose(shares["phase", "all"], [0, 1, 0], atol=1e-5)
    assert shares["amplitude", "all"][0] > 0.5 and abs(shares["amplitude", "all"][2]) < 1e-4


def test_no_variance_has_no_shares_and_few_layouts_are_refused():
    assert np.isnan(factorial.shares(np.zeros((6, 6)), 3)).all()
    with pytest.raises(ValueError, match="at least 3 layouts and 2 styles"):
        factorial.share_rows(torch.randn(4, 4, 4, 2), 2)
