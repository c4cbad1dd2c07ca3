"""Single functions of the kernels behind tensors, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu


def vec_map(name: str, x: Tensor) -> Tensor:
    """exp, tanh, erf or erfc of vec.h over a contiguous fp32 tensor, for the tests of their error bounds."""
    y = torch.full_like(x, float("nan"))
    cpu._cpu.vec_map(name, x.data_ptr(), y.data_ptr(), x.numel())
    return y


def dropout_factors(M: int, N: int, p: float, seed: int) -> Tensor:
    """(M, N) fp32: 0 where the CPU kernels drop, 1 / (1 - p) where they keep."""
    out = torch.full((M, N), float("nan"))
    cpu._cpu.dropout_factors(out.data_ptr(), M, N, p, seed)
    return out
