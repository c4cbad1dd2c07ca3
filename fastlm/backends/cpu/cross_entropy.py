"""The cross-entropy kernels behind tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu
from . import TYPE_CODE, compute_dtype, ptr, weight_type

# Windows of columns begin at multiples of this.
CROSS_ENTROPY_BLOCK = 2048


def cross_entropy_targets(target: Tensor, class_weight: Tensor | None, N: int, ignore_index: int) -> float:
    """Sum of the class weights of the targets that count; their number where there are no weights.

    Raises:
        ValueError: for a target outside [0, N) that is not ignore_index.
    """
    M = target.numel()
    bad, total = cpu._cpu.cross_entropy_targets(
        target.data_ptr(), ptr(class_weight), M, N, ignore_index, weight_type(class_weight, None)
    )
    if bad >= 0:
        raise ValueError(
            f"cross_entropy: target[{bad}] is {int(target.reshape(-1)[bad])}, "
            f"expected 0 to {N - 1} or ignore_index {ignore_index}"
        )
    return total


def cross_entropy_total(loss: Tensor) -> float:
    """Sum of a (M,) loss in compute dtype, in fp64 and in order."""
    return cpu._cpu.cross_entropy_total(loss.data_ptr(), loss.numel(), TYPE_CODE[loss.dtype])


def cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x (M, N), target (M,) int64 -> (loss (M,), stats (M, 3), dx of scale * sum(loss) or None)."""
    M, N = x.shape
    compute = compute_dtype(x.dtype)
    loss, stats = x.new_empty(M, dtype=compute), x.new_empty(M, 3, dtype=compute)
    dx = None if scale is None else torch.empty_like(x)
    cpu._cpu.cross_entropy_fwd(
        x.data_ptr(), target.data_ptr(), ptr(class_weight), loss.data_ptr(), stats.data_ptr(), ptr(dx),
        M, N, ignore_index, smoothing, scale or 0.0, TYPE_CODE[x.dtype], weight_type(class_weight, None),
    )  # fmt: skip
    return loss, stats, dx


def cross_entropy_update(
    x: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    states: Tensor,
    first: int,
    N: int,
    ignore_index: int,
    smoothing: float,
) -> None:
    """Fold x (M, n), columns first to first + n of N, into states (M, 5); first == 0 starts them."""
    M, n = x.shape
    cpu._cpu.cross_entropy_update(
        x.data_ptr(), target.data_ptr(), ptr(class_weight), states.data_ptr(),
        M, n, first, N, ignore_index, smoothing, TYPE_CODE[x.dtype], weight_type(class_weight, None),
    )  # fmt: skip


def cross_entropy_finish(
    states: Tensor, target: Tensor, class_weight: Tensor | None, N: int, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """states (M, 5) -> (loss (M,), stats (M, 3))."""
    M = states.shape[0]
    loss, stats = states.new_empty(M), states.new_empty(M, 3)
    cpu._cpu.cross_entropy_finish(
        states.data_ptr(), target.data_ptr(), ptr(class_weight), loss.data_ptr(), stats.data_ptr(),
        M, N, ignore_index, smoothing, TYPE_CODE[states.dtype], weight_type(class_weight, None),
    )  # fmt: skip
    return loss, stats


def cross_entropy_bwd(
    x: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    scale: Tensor | float,
    ignore_index: int,
    smoothing: float,
    out: Tensor | None = None,
    first: int = 0,
    N: int | None = None,
) -> Tensor:
    """-> dx, like x, in `out` (which may be x) if given; scale is one factor, or (M,) of them in compute dtype."""
    M, n = x.shape
    dx = torch.empty_like(x) if out is None else out
    rows, factor = (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
    cpu._cpu.cross_entropy_bwd(
        x.data_ptr(), target.data_ptr(), ptr(class_weight), stats.data_ptr(), ptr(rows), dx.data_ptr(),
        M, n, first, n if N is None else N, ignore_index, smoothing, factor,
        TYPE_CODE[x.dtype], weight_type(class_weight, None),
    )  # fmt: skip
    return dx
