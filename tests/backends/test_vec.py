"""The vector functions' stated error bounds and the dropout generator, on every instruction set."""

import math

import numpy as np
import pytest
import torch

from fastlm._core import dropout as _dropout
from fastlm.backends.cpu import vec

# name -> (true function in fp64, interval, bound in units in the last place as csrc/cpu/vec.h states it)
BOUNDS = {
    "exp": (torch.exp, (-103.9, 88.7), 1),
    "tanh": (torch.tanh, (-12.0, 12.0), 2),
    "erf": (torch.erf, (-8.0, 8.0), 3),
    "erfc": (torch.erfc, (0.0, 9.1), 8),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_error_in_units_in_the_last_place(isa, name):
    function, (low, high), bound = BOUNDS[name]
    x = torch.cat([torch.linspace(low, high, 400_001), torch.logspace(-30, math.log10(high), 50_001)])
    truth = function(x.double())
    rounded = truth.float().numpy()
    unit = np.spacing(np.maximum(np.abs(rounded), np.finfo(np.float32).tiny)).astype(np.float64)
    error = np.abs(vec.vec_map(name, x).double().numpy() - truth.numpy()) / unit
    assert error.max() <= bound, f"{name}: {error.max():.2f} ULP at x = {x[int(error.argmax())]}"


def test_reciprocal(isa):
    x = torch.cat([torch.logspace(-37, 37, 100_001), -torch.linspace(1, 2, 100_001)])
    unit = np.spacing((1 / x).abs().numpy()).astype(np.float64)
    error = (vec.vec_map("reciprocal", x).double() - 1 / x.double()).abs().numpy() / unit
    assert error.max() <= 2


@pytest.mark.parametrize("name", ["exp", "tanh", "erf"])
def test_special_values(isa, name):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 89.5, -104.5])
    expected = BOUNDS[name][0](x.double()).float()
    assert torch.equal(vec.vec_map(name, x).nan_to_num(nan=7), expected.nan_to_num(nan=7))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 15, 16, 17, 33, 63])
def test_tails(isa, n):
    x = torch.randn(n)
    torch.testing.assert_close(vec.vec_map("exp", x), x.exp())


def test_philox_matches_the_published_vectors():
    # Known answers of Philox4x32-10 from the Random123 distribution (kat_vectors): counter and key all ones.
    ones = torch.tensor([0xFFFFFFFF])
    assert [int(w) for w in _dropout.philox(-1, (ones, ones, ones, ones))] == [
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    ]
    zero = torch.tensor([0])
    assert [int(w) for w in _dropout.philox(0, (zero, zero, zero, zero))] == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


@pytest.mark.parametrize("columns", [1, 5, 64, 67, 200])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_mask_is_the_reference_one(isa, columns, p):
    seed = -0x123456789ABCDEF
    expected = _dropout.factors(9, columns, p, seed, torch.float32)
    assert torch.equal(vec.dropout_factors(9, columns, p, seed), expected)


def test_dropout_rate():
    kept = vec.dropout_factors(1000, 1000, 0.3, 42) != 0
    standard_error = math.sqrt(0.3 * 0.7 / kept.numel())
    assert abs(float(kept.float().mean()) - 0.7) < 5 * standard_error


def test_seed_follows_torch():
    torch.manual_seed(5)
    first = [_dropout.draw_seed() for _ in range(3)]
    torch.manual_seed(5)
    assert [_dropout.draw_seed() for _ in range(3)] == first
    assert len(set(first)) == 3
