"""The RMSNorm kernels behind tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from ..cpu import TYPE_CODE, weight_type
from . import addresses, call
from .norm import backward_workspace


def rms_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    N: int,
    eps: float,
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As fastlm.backends.cpu.rms_norm.rms_norm_fwd."""
    M = x.numel() // N if N else 0
    stream = x if residual is None else residual
    y = torch.empty_like(x, dtype=out_dtype or stream.dtype)
    z = None if residual is None else torch.empty_like(residual)
    rstd = x.new_empty(M, dtype=torch.float32) if statistics else None
    call(
        cuda._cuda.rms_norm_fwd, x,
        *addresses(x, residual, weight, z, y, rstd), M, N, eps,
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
    """As fastlm.backends.cpu.rms_norm.rms_norm_bwd."""
    M = z.numel() // N if N else 0
    x_dtype = x_dtype or z.dtype
    dz = torch.empty_like(z)
    dx = torch.empty_like(z, dtype=x_dtype) if x_dtype != z.dtype else None
    _work, rows, partial, sums = backward_workspace(z, M, N, 1, weight_grad)
    call(
        cuda._cuda.rms_norm_bwd, z,
        *addresses(dy, z, weight, rstd, dz_in, dz, dx),
        partial, cuda.ptr(sums), rows, M, N,
        TYPE_CODE[x_dtype], TYPE_CODE[z.dtype], TYPE_CODE[dy.dtype], weight_type(weight, None),
    )  # fmt: skip
    return dz, dz if dx is None else dx, None if sums is None else sums[0]
