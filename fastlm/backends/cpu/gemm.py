"""Products of large matrices behind tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu
from . import TYPE_CODE, ptr


def gemm_serves(dtype: torch.dtype) -> bool:
    """Whether the instruction set in force has products of large matrices of this dtype."""
    return cpu._cpu is not None and dtype in TYPE_CODE and cpu._cpu.gemm_serves(TYPE_CODE[dtype])


def gemm(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> None:
    """out (M, N) = a (M, K) @ b (K, N) + bias (N,), or that is added to it.

    a and b are fp32 or bf16, not empty, with elements side by side along either dimension; out has contiguous rows, in
    their dtype or in fp32, which `add` needs; bias is fp32.
    """
    (M, K), N = a.shape, b.shape[1]
    a_transposed, b_transposed = (x.stride(1) != 1 and x.stride(0) == 1 for x in (a, b))
    rows = (a.stride(int(a_transposed)), b.stride(int(b_transposed)), out.stride(0))
    cpu._cpu.gemm(
        a.data_ptr(), b.data_ptr(), ptr(bias), out.data_ptr(), M, N, K, *rows, a_transposed, b_transposed,
        out.dtype is torch.float32, add, TYPE_CODE[a.dtype],
    )  # fmt: skip
