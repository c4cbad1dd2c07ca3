"""The rotary embedding's kernel behind tensors."""

from __future__ import annotations

from torch import Tensor

from .. import cpu
from . import TYPE_CODE, compute_dtype, heads_like


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """x (B, H, L, D) with unit stride along D, cos and sin (L, R) or (B, L, R) contiguous -> y, in x's order."""
    compute = compute_dtype(x.dtype)
    cos, sin = cos.to(compute), sin.to(compute)
    y = heads_like(x)
    L, R = cos.shape[-2:]
    cpu._cpu.rotary(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), x.shape, x.stride(), y.stride(),
        R, L * R if cos.dim() == 3 else 0, interleaved, inverse, TYPE_CODE[x.dtype],
    )  # fmt: skip
    return y
