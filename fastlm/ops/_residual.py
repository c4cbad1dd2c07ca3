"""What the two norms of a sum ask of its second term."""

from __future__ import annotations

import torch
from torch import Tensor


def stream_dtype(op: str, x: Tensor, residual: Tensor) -> torch.dtype:
    """The dtype of x + residual.

    Raises:
        ValueError: if the two disagree in shape or device.
        TypeError: if the residual is not floating-point.
    """
    if residual.shape != x.shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)} to match x")
    if residual.device != x.device:
        raise ValueError(f"{op}: residual is on {residual.device}, x is on {x.device}")
    if not residual.is_floating_point():
        raise TypeError(f"{op}: residual has dtype {residual.dtype}, expected a floating-point dtype")
    return x.dtype if residual.dtype is x.dtype else torch.promote_types(x.dtype, residual.dtype)
