"""A transplant carries what it names; a placebo moves as far and is the same for what knows no order."""

from __future__ import annotations

import pytest
import torch

from setlib import spectral
from setlib.analysis import transplant
from setlib.analysis.transplant import PARTS, PLACEBOS


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for _ in range(2))


X, Y = pair(3, 6, 10, 4)


def test_amplitude_and_phase_come_from_where_they_should():
    kept = spectral.split_spectrum(X), spectral.split_spectrum(Y)
    mixed = spectral.split_spectrum(PARTS["amplitude"](X, Y))
    torch.testing.assert_close(mixed.amplitude, kept[1].amplitude, atol=1e-4, rtol=1e-4)
    mixed = spectral.split_spectrum(PARTS["phase"](X, Y))
    torch.testing.assert_close(mixed.amplitude, kept[0].amplitude, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["amplitude", "phase"])
def test_spans_part_the_spectrum(part: str):
    """Mean, low and high one after the other are the whole; each changes bins of its own alone."""
    spans = {name: span for name, span in transplant.SPANS.items() if name != "all"}
    x = X
    for low, high in spans.values():
        x = transplant.swap_spectrum(x, Y, part, low, high)
    torch.testing.assert_close(x, transplant.swap_spectrum(X, Y, part), atol=1e-4, rtol=1e-4)
    radius = spectral.frequency_radius((6, 10))
    for low, high in spans.values():
        moved = (spectral.transform(transplant.swap_spectrum(X, Y, part, low, high)) - spectral.transform(X)).abs()
        inside = (radius > low) & (radius <= high) if low else radius <= high
        assert moved[:, ~inside].max() < 1e-5 and (part == "phase" or moved[:, inside].max() > 1e-2)


@pytest.mark.parametrize("low, high", [("Haar, low", "Haar, high"), ("DCT, low", "DCT, high")])
def test_two_bands_of_a_linear_transform_are_the_whole(low: str, high: str):
    torch.testing.assert_close(PARTS[high](PARTS[low](X, Y), Y), Y, atol=1e-4, rtol=1e-4)


def test_moments_and_mean():
    mean, moments = PARTS["mean (DC)"](X, Y), PARTS["mean and deviation (AdaIN)"](X, Y)
    torch.testing.assert_close(mean.mean((1, 2)), Y.mean((1, 2)))
    torch.testing.assert_close(moments.mean((1, 2)), Y.mean((1, 2)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments.std((1, 2)), Y.std((1, 2)))


@pytest.mark.parametrize("name", PLACEBOS)
@pytest.mark.parametrize("part", PARTS)
def test_placebo_moves_as_far_elsewhere(part: str, name: str):
    """Same length of the way for every picture; only what does not know the order of positions is its own placebo."""
    own = PARTS[part](X, Y)
    reach = transplant.distance(own, X)
    moved = transplant.placebo(PARTS[part], name, X, Y, reach)
    torch.testing.assert_close((moved - X).flatten(1).norm(dim=1), (own - X).flatten(1).norm(dim=1))
    torch.testing.assert_close(moved, transplant.placebo(PARTS[part], name, X, Y, reach))
    is_itself = name == "shuffled patches" and part.startswith("mean")
    assert torch.allclose(moved, own, atol=1e-4) == is_itself


def test_placebos_keep_what_they_should():
    """An amplitude swap with shuffled patches takes the mean along, over the channels it mixes no two positions."""
    swap = PARTS["amplitude"]
    change = transplant.placebo(swap, "channel axis", X, Y, torch.ones(3)) - X
    other = Y.clone()
    other[:, 2, 3] += 5
    again = transplant.placebo(swap, "channel axis", X, other, torch.ones(3)) - X
    ratio = again / change
    untouched = torch.ones(6, 10, dtype=torch.bool)
    untouched[2, 3] = False
    assert (ratio[:, untouched].flatten(1).std(1) < 1e-2 * ratio[:, untouched].flatten(1).mean(1).abs()).all()
    with pytest.raises(ValueError, match="Unknown placebo 'sugar'"):
        transplant.placebo(swap, "sugar", X, Y, torch.ones(3))
    with pytest.raises(ValueError, match="Unknown part 'colour'"):
        transplant.swap_spectrum(X, Y, "colour")


def test_closed_is_the_share_of_the_way():
    half = X + 0.5 * (Y - X)
    for x, share in ((X, 0.0), (Y, 1.0), (half, 0.5), (2 * X - Y, -1.0)):
        torch.testing.assert_close(transplant.closed(x, X, Y), torch.full((3,), share), atol=1e-5, rtol=1e-5)
