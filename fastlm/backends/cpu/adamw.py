"""AdamW's kernels behind tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .. import cpu
from . import TYPE_CODE, ptr


def gradient_square_sum(grads: Sequence[Tensor]) -> float:
    """Sum of the squares of fp32 and bf16 tensors, in a fixed order."""
    return cpu._cpu.gradient_square_sum([(g.data_ptr(), g.numel(), TYPE_CODE[g.dtype]) for g in grads])


class AdamWScalars(NamedTuple):
    """What AdamW multiplies by at one step: see csrc/cpu/ops.h."""

    grad_scale: float
    decay: float
    beta1: float
    beta2: float
    step_size: float
    sqrt_factor: float
    eps: float


AdamWRow = tuple[Tensor, Tensor, Tensor, Tensor, "Tensor | None", AdamWScalars]


def adamw_update(rows: Sequence[AdamWRow]) -> None:
    """Update the parameter, exp_avg and exp_avg_sq of rows (parameter, grad, exp_avg, exp_avg_sq, copy, scalars)."""
    cpu._cpu.adamw_update(
        [
            (
                (p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), ptr(copy),
                 p.numel(), TYPE_CODE[p.dtype], TYPE_CODE[g.dtype]),
                scalars,
            )
            for p, g, m, v, copy, scalars in rows
        ]
    )  # fmt: skip
