"""RMS normalization, alone and fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ._norm import norm_bwd, norm_fwd


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
    y, z, _, rstd = norm_fwd(x, residual, weight, None, N, eps, 0.0, 0, out_dtype, statistics, False)
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
    dz, dx, grads = norm_bwd(dy, z, weight, None, rstd, N, dz_in, 0.0, 0, x_dtype, weight_grad)
    return dz, dx, None if grads is None else grads[0]
