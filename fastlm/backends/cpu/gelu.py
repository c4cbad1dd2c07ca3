"""The GELU kernels behind tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu
from . import TYPE_CODE, chunks, compute_dtype, ptr, weight_type

# A plain elementwise call is one long row to C++; rows of this many elements let threads share it.
_FLAT_ROW = 4096


def _rows(x: Tensor, bias: Tensor | None, dropout_p: float) -> tuple[int, int]:
    """(M, N) as the GELU kernels see x: its own rows if the last dimension matters, else any that divide it."""
    numel = x.numel()
    if bias is None and dropout_p == 0:
        return (numel // _FLAT_ROW, _FLAT_ROW) if numel % _FLAT_ROW == 0 else (1, numel)
    N = x.shape[-1] if x.dim() else 1
    return (numel // N if N else 0), N


def gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """x (..., N), bias (N,) -> y, like x."""
    y = torch.empty_like(x)
    M, N = _rows(x, bias, dropout_p)
    cpu._cpu.gelu_fwd(
        x.data_ptr(), ptr(bias), y.data_ptr(), M, N, tanh, dropout_p, seed,
        TYPE_CODE[x.dtype], weight_type(bias, None),
    )  # fmt: skip
    return y


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, dropout_p: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """-> (dx, db or None), db in compute dtype."""
    dx = torch.empty_like(x)
    M, N = _rows(x, bias, dropout_p)
    compute = compute_dtype(x.dtype)
    partial = x.new_empty(chunks(M), N, dtype=compute) if bias is not None else None
    db = x.new_empty(N, dtype=compute) if bias is not None else None
    cpu._cpu.gelu_bwd(
        dy.data_ptr(), x.data_ptr(), ptr(bias), dx.data_ptr(), ptr(partial), ptr(db), M, N, tanh, dropout_p, seed,
        TYPE_CODE[x.dtype], weight_type(bias, None),
    )  # fmt: skip
    return dx, db
