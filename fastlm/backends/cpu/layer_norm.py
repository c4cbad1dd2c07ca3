"""The LayerNorm kernels behind tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu
from . import TYPE_CODE, chunks, compute_dtype, ptr, weight_type


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
    """x of M rows of N -> (y, z or None, mean (M,) or None, rstd or None); weight and bias share a dtype.

    out_dtype: of y; None means x's.
    """
    M = x.numel() // N if N else 0
    stream = x if residual is None else residual
    y = torch.empty_like(x) if out_dtype in (None, x.dtype) else torch.empty_like(x, dtype=out_dtype)
    z = None if residual is None else torch.empty_like(residual)
    mean = x.new_empty(M, dtype=compute_dtype(stream.dtype)) if statistics else None
    rstd = torch.empty_like(mean) if mean is not None else None
    cpu._cpu.layer_norm_fwd(
        x.data_ptr(), ptr(residual), ptr(weight), ptr(bias), ptr(z), y.data_ptr(), ptr(mean), ptr(rstd),
        M, N, eps, dropout_p, seed,
        TYPE_CODE[x.dtype], TYPE_CODE[stream.dtype], TYPE_CODE[y.dtype], weight_type(weight, bias),
    )  # fmt: skip
    return y, z, mean, rstd


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, N: int, eps: float, dtype: torch.dtype) -> Tensor:
    """`layer_norm_fwd` where every tensor has x's dtype and y alone is wanted."""
    y = torch.empty_like(x)
    cpu._cpu.layer_norm(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), x.numel() // N, N, eps, TYPE_CODE[dtype]
    )
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, N: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`layer_norm_fwd` of a sum where every tensor has x's dtype and (y, z) alone are wanted."""
    y, z, code = torch.empty_like(x), torch.empty_like(x), TYPE_CODE[dtype]
    cpu._cpu.layer_norm_fwd(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), bias.data_ptr(), z.data_ptr(), y.data_ptr(), 0, 0,
        x.numel() // N, N, eps, 0.0, 0, code, code, code, code,
    )  # fmt: skip
    return y, z


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
    """-> (dz, dx, dw or None, db or None); dx is dz itself without dropout and cast, dw and db in compute dtype."""
    M = z.numel() // N if N else 0
    x_dtype = x_dtype or z.dtype
    dz = torch.empty_like(z)
    dx = torch.empty_like(z, dtype=x_dtype) if dropout_p > 0 or x_dtype != z.dtype else None
    compute = compute_dtype(z.dtype)
    partial = z.new_empty(chunks(M), 2, N, dtype=compute)  # written even where nobody asks for the sums
    dw = z.new_empty(N, dtype=compute) if weight_grads else None
    db = z.new_empty(N, dtype=compute) if weight_grads else None
    cpu._cpu.layer_norm_bwd(
        dy.data_ptr(), z.data_ptr(), ptr(weight), mean.data_ptr(), rstd.data_ptr(), ptr(dz_in),
        dz.data_ptr(), ptr(dx), partial.data_ptr(), ptr(dw), ptr(db),
        M, N, dropout_p, seed,
        TYPE_CODE[x_dtype], TYPE_CODE[z.dtype], TYPE_CODE[dy.dtype], weight_type(weight, None),
    )  # fmt: skip
    return dz, dz if dx is None else dx, dw, db
