"""The fast forms are their definitions in values and gradients, at every size, also where a phase would be chance."""

import pytest
import torch

from setlib import _kernels, spectral, tokens
from setlib.refiners import build_refiner

every_size = pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 9), (6, 1), (1, 1), (37, 2), (16, 32), (150, 5)])


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_equal(found, expected):
    """To 1e-6 of the largest value."""
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def assert_same_function(fast, plain, inputs):
    """In values, and in gradients of a random sum of them."""
    results = []
    for function in (fast, plain):
        given = [x.detach().requires_grad_() for x in inputs]
        values = function(*given)
        values = [values] if isinstance(values, torch.Tensor) else list(values)
        weights = [noise(*value.shape, seed=i) for i, value in enumerate(values)]
        results.append([*values, *torch.autograd.grad(values, given, weights)])
    for found, expected in zip(*results, strict=True):
        assert_equal(found, expected)


@every_size
@pytest.mark.parametrize("kind", ["noise", "empty bins", "zeros"])
def test_split_is_its_definition(size, kind):
    x = noise(2, *size, 3)
    if kind == "empty bins":
        x = x[:, :1] + 1e-9 * x  # rows alike but for rounding
        assert size[0] == 1 or spectral.is_empty(spectral.transform(x).abs())[:, 1:].all()
    x = torch.zeros_like(x) if kind == "zeros" else x
    assert_same_function(_kernels.split_spectrum, spectral.split_spectrum, [x])


@every_size
def test_split_is_its_definition_in_float32(size):
    x = noise(2, *size, 3).float()
    found, expected = _kernels.split_spectrum(x), spectral.split_spectrum(x)
    assert_equal(found.amplitude, expected.amplitude)
    for turn in (torch.cos, torch.sin):  # a phase counts as much as its amplitude, and -pi and pi are the same
        error = found.amplitude * turn(found.phase) - expected.amplitude * turn(expected.phase)
        assert error.abs().max() <= 1e-6 * expected.amplitude.max()
    own_rows, own_columns = (spectral.own_partners(length) for length in size)
    own = found.phase[:, own_rows][:, :, own_columns[: size[1] // 2 + 1]]
    assert ((own == 0) | (own == torch.tensor(torch.pi))).all()  # never -pi


def test_a_phase_of_pi_is_so_beside_minus_zero(monkeypatch):
    negative = torch.complex(-torch.ones(1, 3, 3, 1), torch.full((1, 3, 3, 1), -0.0))  # as some processors sum
    monkeypatch.setattr(spectral, "transform", lambda x, axes: negative)
    monkeypatch.setattr(_kernels, "to_parts", lambda x: torch.stack([negative.real, negative.imag], 1))
    for split in (spectral.split_spectrum, _kernels.split_spectrum):
        assert (split(torch.zeros(1, 3, 4, 1)).phase == torch.tensor(torch.pi)).all()


@every_size
def test_join_is_its_definition(size):
    amplitude, phase = spectral.split_spectrum(noise(2, *size, 3))
    inputs = [(amplitude - 0.5).relu(), phase + noise(*phase.shape)]  # some are 0, and no real signal has these phases
    assert_same_function(
        lambda a, p: _kernels.join_spectrum((a, p), size), lambda a, p: spectral.join_spectrum((a, p), size), inputs
    )


@every_size
def test_parts_are_the_fft(size):
    x = noise(2, *size, 3)
    real, imaginary = _kernels.to_parts(x).unbind(1)
    torch.testing.assert_close(torch.complex(real, imaginary), spectral.transform(x))
    torch.testing.assert_close(_kernels.from_parts(_kernels.to_parts(x), size), x)


def test_set_needs_the_definitions_alone(monkeypatch):
    torch.manual_seed(0)
    refiner, x = build_refiner("set", (2, 5), 12, num_tokens=7, rank=3).double(), noise(2, 5, 8, 12)
    for p in refiner.parameters():
        torch.nn.init.normal_(p, std=0.3)
    results = []
    for source in (_kernels, spectral):
        for name in ("split_spectrum", "join_spectrum"):
            monkeypatch.setattr(tokens, name, getattr(source, name))
        given = x.clone().requires_grad_()
        refined = refiner(given, 5)
        results.append([refined, *torch.autograd.grad((refined * x.cos()).sum(), [given, *refiner.phase.parameters()])])
    for found, expected in zip(*results, strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    with torch.autocast("cpu", torch.bfloat16):
        spectrum = _kernels.split_spectrum(noise(2, 6, 8, 3).to(dtype))
        assert {part.dtype for part in spectrum} == {torch.float32}
        half = [part.to(dtype) for part in spectrum]
        assert _kernels.join_spectrum(half, (6, 8)).dtype == torch.float32


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="4-D"):
        _kernels.split_spectrum(torch.zeros(3, 4, 5))
