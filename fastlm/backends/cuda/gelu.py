"""The GELU kernels behind tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from ..cpu import TYPE_CODE, weight_type
from . import addresses, call, seed_argument


def _gelu_rows(x: Tensor) -> tuple[int, int]:
    """(M, N); without bias and dropout the kernels cut the array themselves."""
    N = x.shape[-1] if x.dim() else 1
    return (x.numel() // N if N else 0), N


def gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """As fastlm.backends.cpu.gelu.gelu_fwd."""
    y = torch.empty_like(x)
    call(
        cuda._cuda.gelu_fwd, x,
        *addresses(x, bias, y), *_gelu_rows(x), tanh, dropout_p, seed_argument(seed),
        TYPE_CODE[x.dtype], weight_type(bias, None),
    )  # fmt: skip
    return y


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, dropout_p: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """As fastlm.backends.cpu.gelu.gelu_bwd."""
    dx = torch.empty_like(x)
    M, N = _gelu_rows(x)
    partial = db = None
    if bias is not None:
        partial = x.new_empty(call(cuda._cuda.gelu_partials, x, M, N), N, dtype=torch.float32)
        db = x.new_zeros(N, dtype=torch.float32) if M == 0 else x.new_empty(N, dtype=torch.float32)
    call(
        cuda._cuda.gelu_bwd, x,
        *addresses(dy, x, bias, dx, partial, db), M, N, tanh, dropout_p, seed_argument(seed),
        TYPE_CODE[x.dtype], weight_type(bias, None),
    )  # fmt: skip
    return dx, db
