"""The linear layer of a few rows behind tensors."""

from __future__ import annotations

from torch import Tensor

from .. import cpu
from . import TYPE_CODE, ptr, weight_type

LINEAR_ROWS = 8  # at most, in the kernels for decoding


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) of 1 to 8 rows and weight (N, K) of one dtype, bias (N,) -> y (..., N), like x."""
    N, K = weight.shape
    type_code = TYPE_CODE[x.dtype]
    y = x.new_empty(*x.shape[:-1], N)
    cpu._cpu.linear_fwd(
        x.data_ptr(), weight.data_ptr(), ptr(bias), y.data_ptr(), x.numel() // K, N, K,
        type_code, type_code, weight_type(bias, None), type_code,
    )  # fmt: skip
    return y
