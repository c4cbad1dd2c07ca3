"""The RMSNorm kernels behind tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu
from . import TYPE_CODE, chunks, compute_dtype, ptr, weight_type


def rms_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    N: int,
    eps: float,
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x of M rows of N -> (y, z or None, rstd (M,) or None)."""
    M = x.numel() // N if N else 0
    stream = x if residual is None else residual
    y = torch.empty_like(x, dtype=out_dtype or stream.dtype)
    z = None if residual is None else torch.empty_like(residual)
    rstd = x.new_empty(M, dtype=compute_dtype(stream.dtype)) if statistics else None
    cpu._cpu.rms_norm_fwd(
        x.data_ptr(), ptr(residual), ptr(weight), ptr(z), y.data_ptr(), ptr(rstd), M, N, eps,
        TYPE_CODE[x.dtype], TYPE_CODE[stream.dtype], TYPE_CODE[y.dtype], weight_type(weight, None),
    )  # fmt: skip
    return y, z, rstd


def rms_norm_bwd(
    dy: Tensor,
    z: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    N: int,
    dz_in: Tensor | None = None,
    x_dtype: torch.dtype | None = None,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> (dz, dx, dw or None); dx is dz itself without a cast, dw in compute dtype."""
    M = z.numel() // N if N else 0
    x_dtype = x_dtype or z.dtype
    dz = torch.empty_like(z)
    dx = torch.empty_like(z, dtype=x_dtype) if x_dtype != z.dtype else None
    compute = compute_dtype(z.dtype)
    partial = z.new_empty(chunks(M), N, dtype=compute) if weight_grad else None
    dw = z.new_empty(N, dtype=compute) if weight_grad else None
    cpu._cpu.rms_norm_bwd(
        dy.data_ptr(), z.data_ptr(), ptr(weight), rstd.data_ptr(), ptr(dz_in),
        dz.data_ptr(), ptr(dx), ptr(partial), ptr(dw), M, N,
        TYPE_CODE[x_dtype], TYPE_CODE[z.dtype], TYPE_CODE[dy.dtype], weight_type(weight, None),
    )  # fmt: skip
    return dz, dz if dx is None else dx, dw
