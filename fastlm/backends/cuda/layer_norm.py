"""The LayerNorm kernels behind tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from ..cpu import TYPE_CODE, weight_type
from . import addresses, call, seed_argument
from .norm import backward_workspace


def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    N: int,
    eps: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As fastlm.backends.cpu.layer_norm.layer_norm_fwd."""
    M = x.numel() // N if N else 0
    stream = x if residual is None else residual
    y = torch.empty_like(x, dtype=out_dtype or stream.dtype)
    z = None if residual is None else torch.empty_like(residual)
    mean = x.new_empty(M, dtype=torch.float32) if statistics else None
    rstd = x.new_empty(M, dtype=torch.float32) if statistics else None
    call(
        cuda._cuda.layer_norm_fwd, x,
        *addresses(x, residual, weight, bias, z, y, mean, rstd),
        M, N, eps, dropout_p, seed_argument(seed),
        TYPE_CODE[x.dtype], TYPE_CODE[stream.dtype], TYPE_CODE[y.dtype], weight_type(weight, bias),
    )  # fmt: skip
    return y, z, mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    N: int,
    dz_in: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    x_dtype: torch.dtype | None = None,
    weight_grads: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As fastlm.backends.cpu.layer_norm.layer_norm_bwd."""
    M = z.numel() // N if N else 0
    x_dtype = x_dtype or z.dtype
    dz = torch.empty_like(z)
    dx = torch.empty_like(z, dtype=x_dtype) if dropout_p > 0 or x_dtype != z.dtype else None
    _work, rows, partial, sums = backward_workspace(z, M, N, 2, weight_grads)
    call(
        cuda._cuda.layer_norm_bwd, z,
        *addresses(dy, z, weight, mean, rstd, dz_in, dz, dx),
        partial, cuda.ptr(sums), rows, M, N, dropout_p, seed_argument(seed),
        TYPE_CODE[x_dtype], TYPE_CODE[z.dtype], TYPE_CODE[dy.dtype], weight_type(weight, None),
    )  # fmt: skip
    dw, db = (None, None) if sums is None else (sums[0], sums[1])
    return dz, dz if dx is None else dx, dw, db
