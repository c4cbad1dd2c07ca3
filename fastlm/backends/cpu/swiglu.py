"""The SwiGLU kernels behind tensors."""

from __future__ import annotations

from torch import Tensor

from .. import cpu
from . import TYPE_CODE


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (M, N) with unit stride along N -> y (M, N)."""
    M, N = gate.shape
    y = gate.new_empty(M, N)
    cpu._cpu.swiglu_fwd(
        gate.data_ptr(), up.data_ptr(), y.data_ptr(), M, N, gate.stride(0), up.stride(0), TYPE_CODE[gate.dtype]
    )
    return y


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """-> (dgate, dup), both (M, N) and contiguous; dy is contiguous."""
    M, N = gate.shape
    dgate, dup = gate.new_empty(M, N), gate.new_empty(M, N)
    cpu._cpu.swiglu_bwd(
        dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr(),
        M, N, gate.stride(0), up.stride(0), TYPE_CODE[gate.dtype],
    )  # fmt: skip
    return dgate, dup
