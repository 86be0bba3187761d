"""How much of amplitude and of phase is style, and how much is content: a crossed design of layouts x styles.

Every layout is seen in every style, pixel by pixel, so the variance of log amplitudes, and that of phases on the unit
circle, parts into what style, content and their interaction explain. All is computed from inner products between the
n x S pictures ("cells"), layout by layout: cell l * S + s is layout l in style s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from setlib import spectral
from setlib.analysis.spectra import PARTS

EDGES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 1.5)  # of the bands; 1 = Nyquist, corners lie beyond it
BANDS = ("mean", "to 1/64", "to 1/32", "to 1/16", "to 1/8", "to 1/4", "to 1/2", "to 1", "corners")
ALL = "all"  # every frequency but zero
FACTORS = ("style", "content", "interaction")
RESAMPLES, SHUFFLES, LEVEL = 2000, 100, 0.95


def band_index(size: tuple[int, int]) -> Tensor:
    """Which of BANDS holds each bin of a half spectrum: 0 zero frequency, i: EDGES[i - 1] < radius <= EDGES[i]."""
    return torch.bucketize(spectral.frequency_radius(size), torch.tensor(EDGES))


def part_values(x: Tensor, part: str) -> Tensor:
    """What is analysed of features x (cells, H, W, C): real values (cells, H, W // 2 + 1, C or 2 C).

    amplitude: its logarithm, where empty bins (`spectral.is_empty`) count as just empty. phase: the point on the unit
    circle, real part and imaginary part; 0, no direction, in empty bins. Bins that stand for two of the full spectrum
    are longer by sqrt(2), so that all its frequencies count alike.
    """
    spectrum, width = spectral.transform(x), x.shape[2]
    amplitude = spectrum.abs()
    twice = torch.where(spectral.own_partners(width)[: width // 2 + 1], 1.0, math.sqrt(2))[:, None]
    if part == "amplitude":
        least = spectral.NOTHING * amplitude.amax(spectral.GRID, keepdim=True)
        return amplitude.maximum(least.clamp(min=torch.finfo(least.dtype).tiny)).log() * twice
    phasor = spectral.unit_phasor(spectrum) * ~spectral.is_empty(amplitude)
    return torch.view_as_real(phasor).flatten(3) * twice


def band_products(x: Tensor, part: str) -> dict[str, np.ndarray]:
    """Inner products between the cells of x (cells, H, W, C) over the bins of each band that the grid has, and of all.

    Values are taken from their mean over the cells, which changes no share. {band: (cells, cells) float64}.
    """
    values, index = part_values(x, part), band_index(tuple(x.shape[1:3]))
    products = {}
    for number in index.unique().tolist():
        chosen = values[:, index == number].flatten(1)
        chosen = chosen - chosen.mean(0)
        products[BANDS[number]] = (chosen @ chosen.T).double().numpy()
    products[ALL] = sum(own for band, own in products.items() if band != BANDS[0])
    return products


def shares(products: np.ndarray, layouts: int, weights: np.ndarray | None = None) -> np.ndarray:
    """The shares of the variance that style, content and their interaction explain: (..., 3), sum 1, unbiased parts.

    The variance components of a crossed design with one picture a cell, both factors random (omega squared of the
    random model): with y = m + style + content + interaction, the products of two pictures have the mean
    m^2 + (style's variance, if they share it) + (content's, if they share it) + (interaction's, if they are one).
    What is left besides is counted as interaction. Shares are not cut off, so that 0 is 0 on average; NaN without any
    variance. For phases the whole is the circular variance, 1 - |mean phasor|^2.

    products: (n S, n S), see `band_products`; layouts: n. weights: (R, n), how often each layout counts; a layout that
    counts twice is not taken for two. Source: Vaughan & Corballis, Psychological Bulletin 72 (1969).
    """
    styles = len(products) // layouts
    cells = products.reshape(layouts, styles, layouts, styles)
    alike, every = np.einsum("lsms->lm", cells) / styles, cells.sum((1, 3)) / styles
    unlike = (every - alike) / (styles - 1)  # mean product of two layouts in unlike styles
    weights = np.ones((1, layouts)) if weights is None else weights
    total = weights.sum(-1, keepdims=True)
    pairs = (total**2).squeeze(-1) - (weights**2).sum(-1)

    def between(table: np.ndarray) -> np.ndarray:
        """Mean over pairs of two layouts."""
        return (weights @ (table - np.diag(np.diag(table))) * weights).sum(-1) / pairs

    def within(table: np.ndarray) -> np.ndarray:
        """Mean over layouts, each with itself."""
        return (weights @ np.diag(table)) / total.squeeze(-1)

    base, style, content, cell = between(unlike), between(alike), within(unlike), within(alike)
    parts = np.stack([style - base, content - base, cell - style - content + base], -1)
    whole = parts.sum(-1, keepdims=True)
    scale = np.abs(np.diag(products)).mean() / styles
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(whole > 1e-9 * scale, parts / whole, np.nan)
    return found if found.shape[0] > 1 else found[0]


def interval(found: np.ndarray, count: int) -> np.ndarray:
    """Low and high end of a bootstrap's 95 % interval along the first axis, widened for `count` independent units.

    The expanded percentile interval: percentiles are those at which a t interval of few units would end.
    Source: Hesterberg, The American Statistician 69 (2015).
    """
    reach = stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf((1 - LEVEL) / 2, count - 1))
    return np.nanquantile(found, [reach, 1 - reach], axis=0)


def resampled(count: int, seed: int = 0, times: int = RESAMPLES) -> np.ndarray:
    """How often each of `count` units is drawn in each resample, (times, count), at least two different ones."""
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), times).astype(float)
    return draws[(draws > 0).sum(1) > 1]


def share_rows(x: Tensor, layouts: int, parts: Sequence[str] = PARTS, seed: int = 0) -> list[dict]:
    """The shares of style, content and interaction in amplitude and phase, by band, with intervals and a null.

    x: (layouts * styles, H, W, C), at least 3 layouts and 2 styles. Rows with part, band, bins (of the full spectrum),
    factor, share, low, high (a 95 % bootstrap interval over the layouts, the styles being these), and null, null low,
    null high: mean and 95 % range of the share when the labels of the cells are shuffled.
    Raises ValueError for fewer layouts or styles.
    """
    if layouts < 3 or len(x) < 2 * layouts:
        raise ValueError(f"Shares need at least 3 layouts and 2 styles of each, got {layouts} in {len(x)} pictures.")
    height, width = x.shape[1:3]
    index = band_index((height, width))
    counts = torch.where(spectral.own_partners(width)[: width // 2 + 1], 1, 2).expand(index.shape)
    bins = {band: int(counts[index == number].sum()) for number, band in enumerate(BANDS)}
    bins[ALL] = height * width - 1
    weights, rows = resampled(layouts, seed), []
    shuffles = [np.random.default_rng([seed, n]).permutation(len(x)) for n in range(SHUFFLES)]
    for part in parts:
        for band, products in band_products(x, part).items():
            found, spread = shares(products, layouts), interval(shares(products, layouts, weights), layouts)
            null = np.array([shares(products[np.ix_(order, order)], layouts) for order in shuffles])
            ends = np.quantile(null, [0.025, 0.975], axis=0)
            for k, factor in enumerate(FACTORS):
                row = {"part": part, "band": band, "bins": bins[band], "factor": factor, "share": found[k]}
                row |= {"low": _outwards(spread[0, k], math.floor), "high": _outwards(spread[1, k], math.ceil)}
                rows.append(row | {"null": null[:, k].mean(), "null low": ends[0, k], "null high": ends[1, k]})
    return rows


def _outwards(end: float, towards: Callable[[float], int]) -> float:
    """An end of an interval, moved outwards by what float32 rounds, to the fifth decimal."""
    return towards(1e5 * end) / 1e5 if math.isfinite(end) else end
