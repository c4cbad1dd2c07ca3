"""Layer normalization, alone and fused with the residual addition (and dropout) before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ._norm import norm_bwd, norm_fwd


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
    return norm_fwd(x, residual, weight, bias, N, eps, dropout_p, seed, out_dtype, statistics, True)


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
    dz, dx, grads = norm_bwd(dy, z, weight, mean, rstd, N, dz_in, dropout_p, seed, x_dtype, weight_grads)
    return dz, dx, *((None, None) if grads is None else grads.unbind())
