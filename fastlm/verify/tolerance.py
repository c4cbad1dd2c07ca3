"""How far a result may be from the truth: the one rule, of the tests, of `fastlm verify` and of `fastlm bench`.

The truth is the fp64 reference on the same rounded inputs. A result passes where its largest error is at most
twice PyTorch's own largest error in that dtype, plus an absolute term. That term is what rounding alone can do,
so that a lucky PyTorch result does not fail us:
  - half a unit in the last place of the storage dtype at the largest magnitude, for the final store;
  - sqrt(size) units of the compute dtype (fp32 under 16-bit storage) at the largest magnitude, where `size` is
    the number of terms in the longest sum behind an element: rounding errors add like a random walk. In fp64 four
    times that: there the reference rounds as well, and by another form of the formula.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RATIO_TO_TORCH = 2.0
PIECE, PIECE_ON_GPU = 2**18, 2**26  # elements compared at a time: two megabytes of fp64 stay in a core's cache


def atol(dtype: torch.dtype, magnitude: float, size: int) -> float:
    """What rounding alone can do to values of up to `magnitude` that are sums of `size` terms."""
    return rounding(dtype, magnitude, magnitude, size)


def rounding(dtype: torch.dtype, stored: float, summed: float, size: int) -> float:
    """`atol` where values larger than the result are rounded on the way to it, and then cancel.

    Args:
        dtype: of the result.
        stored: the largest magnitude that is rounded to `dtype`.
        summed: the largest magnitude that is rounded to the dtype of the computation.
        size: number of terms in the longest sum.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    store = torch.finfo(dtype).eps / 2 if dtype != compute else 0.0
    walk = torch.finfo(compute).eps * math.sqrt(max(size, 1)) * (4 if dtype == torch.float64 else 1)
    return stored * store + summed * walk


def max_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference where the truth is finite; infinities and NaNs have to sit in the same places.

    Raises:
        AssertionError: if shapes differ, or a NaN or an infinity sits where the truth has none.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    pieces = zip(_pieces(actual), _pieces(truth), strict=True)
    return max((_max_error(a.double(), t.double()) for a, t in pieces), default=0.0)


def rms_error(actual: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference."""
    pieces = zip(_pieces(actual), _pieces(truth), strict=True)
    return math.sqrt(sum(float((a.double() - t).square().sum()) for a, t in pieces) / max(truth.numel(), 1))


def magnitude(truth: Tensor) -> float:
    """Largest absolute value among the finite ones."""
    return max((_magnitude(piece) for piece in _pieces(truth)), default=0.0)


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    flat = x.detach().reshape(-1)
    return flat.split(PIECE_ON_GPU if x.is_cuda else PIECE) if flat.numel() else ()


def _max_error(actual: Tensor, truth: Tensor) -> float:
    finite = truth.isfinite()
    if not finite.all():
        if not torch.equal(actual[~finite].nan_to_num(nan=0.5), truth[~finite].nan_to_num(nan=0.5)):
            raise AssertionError("infinities or NaNs are not where the reference has them")
        actual, truth = actual[finite], truth[finite]
    difference = (actual - truth).abs()
    if difference.isnan().any():
        raise AssertionError(f"{int(difference.isnan().sum())} NaNs where the reference is finite")
    return float(difference.max()) if difference.numel() else 0.0


def _magnitude(truth: Tensor) -> float:
    finite = truth.isfinite()
    finite_ones = truth if finite.all() else truth[finite]
    return float(finite_ones.abs().max()) if finite_ones.numel() else 0.0


def assert_as_close_as_torch(
    actual: Tensor, truth: Tensor, by_torch: Tensor | None, size: int = 1, name: str = "result"
) -> None:
    """Assert the rule of this module.

    Args:
        actual: fastlm's result, in its own dtype.
        truth: the fp64 reference.
        by_torch: PyTorch's result in the same dtype, or None to allow the absolute term alone.
        size: number of terms in the longest sum behind one element.
        name: for the message.
    """
    error = max_error(actual, truth)
    theirs = 0.0 if by_torch is None else max_error(by_torch, truth)
    bound = RATIO_TO_TORCH * theirs + atol(actual.dtype, magnitude(truth), size)
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e} (PyTorch's own {theirs:.3e}, {actual.dtype})"
