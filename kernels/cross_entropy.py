"""Softmax cross-entropy over rows of logits, whole or in windows of columns, and its gradient.

Of a row x with class y: m its maximum, o the sum of exp(x - m) over the classes other than y, s = o + exp(x_y - m):
  nll = m - x_y + log s,  log s = log1p(o) where y holds the maximum;   1 - p_y = o / s
which keep all their digits where p_y is near 1. Loss and gradient, with smoothing e, class weights w, W = sum w:
  loss = (1 - e) w_y nll + e/N sum_c w_c (m + log s - x_c)
  dx_c = g (((1 - e) w_y + e W/N) p_c - (1 - e) w_y [c = y] - e/N w_c)
A program folds its rows block by block. Forward can write the gradient too, for an expected incoming gradient: the
row it has just read comes from the second-level cache. Ignored rows have loss 0 and gradient 0, whatever they hold.

Nothing here waits for the device: the count of targets and the factors of the gradient stay there. A target outside
[0, N) that is not ignored cannot raise, so its row's loss and gradient are NaN.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._core.architecture import SM80, Architecture

from ._common import Table, Tile, architecture, kernel, on_device_of, tile_for

# Not measured on any GPU yet: 16 elements a thread.
FORWARD: Table = {SM80: (Tile(1024, 2048, 4), Tile(4096, 4096, 8))}
BACKWARD: Table = {SM80: (Tile(1024, 2048, 4), Tile(4096, 4096, 8))}
# Windows of columns begin at multiples of this.
CROSS_ENTROPY_BLOCK = 2048

LOG2_E = tl.constexpr(1.44269504088896340736)


@triton.jit
def _pivot(m):
    """m where it is finite below, so that a row of -inf makes no NaN on the way."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0; the second factor undoes the rounding of 1 + x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _fold_row(
    x_ptr, w_ptr, row, target, in_rows, first, n, m, others, smooth, weight,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The rows' columns first .. first + n folded into a running maximum, sum without y, and smoothing sums."""
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in tl.range(0, n, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        mask = in_rows[:, None] & (col < n)[None, :]
        x = tl.load(x_ptr + row[:, None] * n + col[None, :], mask, float("-inf")).to(tl.float32)
        above = tl.maximum(m, tl.max(x, 1))
        fade = tl.where(m == above, 1.0, tl.exp2((m - above) * LOG2_E))
        total *= fade[:, None]
        others *= fade
        centred = x - _pivot(above)[:, None]
        total += tl.where(first + col[None, :] == target[:, None], 0.0, tl.exp2(centred * LOG2_E))
        if SMOOTH:
            w = tl.where(mask, 1.0, 0.0)
            if w_ptr is not None:
                w = tl.load(w_ptr + first + col[None, :], mask, 0.0).to(tl.float32)
            smooth += weight * (_pivot(m) - _pivot(above)) + tl.sum(tl.where(mask, w * centred, 0.0), 1)
            weight += tl.sum(w, 1)
        m = above
    return m, others + tl.sum(total, 1), smooth, weight


@triton.jit
def _finish_row(m, others, smooth, weight, x_y, target, w_ptr, N, ignore_index, keep, spread, SMOOTH: tl.constexpr):
    """(loss, 1 / s, 1 - p_y); keep is 1 - e, spread e / N."""
    ignored = target == ignore_index
    wrong = (tl.abs(m) == float("inf")) | (target < 0) | (target >= N)
    s = others + tl.exp2((x_y - m) * LOG2_E)
    log_s = tl.where(x_y == m, _log1p(others), tl.log(s))
    loss = log_s + (m - x_y)
    if w_ptr is not None:
        loss *= tl.load(w_ptr + target, (target >= 0) & (target < N), 0.0).to(tl.float32)
    if SMOOTH:
        loss = keep * loss + spread * (weight * log_s - smooth)
    loss = tl.where(wrong, float("nan"), loss)
    inv_s = tl.where(wrong, float("nan"), 1.0 / s)
    return tl.where(ignored, 0.0, loss), tl.where(ignored, 0.0, inv_s), tl.where(ignored, 0.0, others * inv_s)


@triton.jit
def _store_gradient(
    x_ptr, dx_ptr, w_ptr, w_sum_ptr, row, col, target, first, n, N, mask, m, inv_s, q, g, ignore_index, keep, spread,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """dx of one tile; w_sum is W."""
    offsets = row[:, None] * n + col[None, :]
    x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
    p = tl.exp2((x - _pivot(m)[:, None]) * LOG2_E) * inv_s[:, None]
    kept = keep * tl.full(p.shape, 1.0, tl.float32)
    if w_ptr is not None:
        w_y = tl.load(w_ptr + target, (target >= 0) & (target < N), 0.0).to(tl.float32)
        kept *= w_y[:, None]
    here = first + col[None, :] == target[:, None]
    dx = tl.where(here, -kept * q[:, None], kept * p)
    if SMOOTH:
        if w_ptr is not None:
            w = tl.load(w_ptr + first + col[None, :], mask, 0.0).to(tl.float32)
            dx += spread * (tl.load(w_sum_ptr) * p - w)
        else:
            dx += spread * (N * p - 1.0)
    dx = tl.where((target == ignore_index)[:, None], 0.0, g[:, None] * dx)
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask)


@triton.jit
def _factors(scale_ptr, scale_stride, scale, row, in_rows):
    """What each row's gradient is multiplied by."""
    g = scale + tl.zeros(row.shape, tl.float32)
    if scale_ptr is not None:
        g = tl.load(scale_ptr + row * scale_stride, in_rows, 0.0)
    return g


@kernel(do_not_specialize=["M", "first", "ignore_index", "scale_stride"])
def _cross_entropy_fwd_kernel(
    x_ptr,  # (M, n): columns first .. first + n of N
    target_ptr,  # (M) int64
    w_ptr,  # (N) class weights or None
    w_sum_ptr,  # () fp32: their sum, with smoothing and dx
    scale_ptr,  # fp32: one factor of dx, or one a row; or None for `scale`
    states_ptr,  # (M, 5) fp32 or None: maximum, others, smooth, weight, x_y of the windows so far
    loss_ptr,  # (M) fp32, without states
    stats_ptr,  # (M, 3) fp32, without states: maximum, 1 / s, 1 - p_y
    dx_ptr,  # (M, n) or None
    M: tl.int64,
    first: tl.int64,
    n,
    N,
    scale_stride: tl.int64,
    ignore_index: tl.int64,
    keep,
    spread,
    scale,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < M
    target = tl.load(target_ptr + row, in_rows, ignore_index)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    others = tl.zeros((ROWS,), tl.float32)
    smooth = tl.zeros((ROWS,), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    x_y = tl.zeros((ROWS,), tl.float32)
    if states_ptr is not None:
        later = row < tl.where(first > 0, M, 0)  # no row in the first window
        m = tl.load(states_ptr + row * 5, later, float("-inf"))
        others = tl.load(states_ptr + row * 5 + 1, later, 0.0)
        smooth = tl.load(states_ptr + row * 5 + 2, later, 0.0)
        weight = tl.load(states_ptr + row * 5 + 3, later, 0.0)
        x_y = tl.load(states_ptr + row * 5 + 4, later, 0.0)
    here = in_rows & (target >= first) & (target < first + n)
    x_y += tl.load(x_ptr + row * n + (target - first), here, 0.0).to(tl.float32)
    m, others, smooth, weight = _fold_row(
        x_ptr, w_ptr, row, target, in_rows, first, n, m, others, smooth, weight, SMOOTH, ROWS, BLOCK_N
    )
    if states_ptr is not None:
        tl.store(states_ptr + row * 5, m, in_rows)
        tl.store(states_ptr + row * 5 + 1, others, in_rows)
        tl.store(states_ptr + row * 5 + 2, smooth, in_rows)
        tl.store(states_ptr + row * 5 + 3, weight, in_rows)
        tl.store(states_ptr + row * 5 + 4, x_y, in_rows)
    else:
        loss, inv_s, q = _finish_row(
            m, others, smooth, weight, x_y, target, w_ptr, N, ignore_index, keep, spread, SMOOTH
        )
        tl.store(loss_ptr + row, loss, in_rows)
        tl.store(stats_ptr + row * 3, m, in_rows)
        tl.store(stats_ptr + row * 3 + 1, inv_s, in_rows)
        tl.store(stats_ptr + row * 3 + 2, q, in_rows)
        if dx_ptr is not None:
            g = _factors(scale_ptr, scale_stride, scale, row, in_rows)
            for start in tl.range(0, n, BLOCK_N):
                col = start + tl.arange(0, BLOCK_N)
                mask = in_rows[:, None] & (col < n)[None, :]
                _store_gradient(
                    x_ptr, dx_ptr, w_ptr, w_sum_ptr, row, col, target, first, n, N, mask, m, inv_s, q, g,
                    ignore_index, keep, spread, SMOOTH,
                )  # fmt: skip


@kernel(do_not_specialize=["M", "ignore_index"])
def _cross_entropy_finish_kernel(
    states_ptr,  # (M, 5) fp32
    target_ptr,  # (M) int64
    w_ptr,  # (N) or None
    loss_ptr,  # (M) fp32
    stats_ptr,  # (M, 3) fp32
    M: tl.int64,
    N,
    ignore_index: tl.int64,
    keep,
    spread,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < M
    target = tl.load(target_ptr + row, in_rows, ignore_index)
    m = tl.load(states_ptr + row * 5, in_rows, 0.0)
    others = tl.load(states_ptr + row * 5 + 1, in_rows, 0.0)
    smooth = tl.load(states_ptr + row * 5 + 2, in_rows, 0.0)
    weight = tl.load(states_ptr + row * 5 + 3, in_rows, 0.0)
    x_y = tl.load(states_ptr + row * 5 + 4, in_rows, 0.0)
    loss, inv_s, q = _finish_row(m, others, smooth, weight, x_y, target, w_ptr, N, ignore_index, keep, spread, SMOOTH)
    tl.store(loss_ptr + row, loss, in_rows)
    tl.store(stats_ptr + row * 3, m, in_rows)
    tl.store(stats_ptr + row * 3 + 1, inv_s, in_rows)
    tl.store(stats_ptr + row * 3 + 2, q, in_rows)


@kernel(do_not_specialize=["M", "first", "ignore_index", "scale_stride"])
def _cross_entropy_bwd_kernel(
    x_ptr,  # (M, n): columns first .. first + n of N
    target_ptr,  # (M) int64
    w_ptr,  # (N) or None
    w_sum_ptr,  # () fp32: their sum, with smoothing
    stats_ptr,  # (M, 3) fp32
    scale_ptr,  # fp32: one factor, or one a row; or None for `scale`
    grad_ptr,  # () or None: where it holds `expected`, dx is left as it is
    dx_ptr,  # (M, n), may be x
    M: tl.int64,
    first: tl.int64,
    n,
    N,
    scale_stride: tl.int64,
    ignore_index: tl.int64,
    keep,
    spread,
    scale,
    expected,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n, BLOCK_N)
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    col = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = row < M
    if grad_ptr is not None:
        same = tl.load(grad_ptr + tl.zeros((ROWS,), tl.int32)).to(tl.float32) == expected
        in_rows = in_rows & (same == 0)
    target = tl.load(target_ptr + row, in_rows, ignore_index)
    m = tl.load(stats_ptr + row * 3, in_rows, 0.0)
    inv_s = tl.load(stats_ptr + row * 3 + 1, in_rows, 0.0)
    q = tl.load(stats_ptr + row * 3 + 2, in_rows, 0.0)
    g = _factors(scale_ptr, scale_stride, scale, row, in_rows)
    mask = in_rows[:, None] & (col < n)[None, :]
    _store_gradient(
        x_ptr, dx_ptr, w_ptr, w_sum_ptr, row, col, target, first, n, N, mask, m, inv_s, q, g,
        ignore_index, keep, spread, SMOOTH,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _plan(n: int, backward: bool, arch: Architecture) -> tuple[int, int, int]:
    """(rows and columns of a tile, warps)."""
    tile = tile_for(BACKWARD if backward else FORWARD, arch, n)
    block = min(tile.block, max(16, triton.next_power_of_2(n)))
    return tile.rows(block), block, tile.warps


def _factor_arguments(scale: Tensor | float | None) -> tuple[Tensor | None, int, float]:
    """(pointer, stride, value) of one factor or of one a row."""
    if isinstance(scale, Tensor):
        return scale, int(scale.dim() > 0), 0.0
    return None, 0, scale or 0.0


def _weight_sum(class_weight: Tensor | None, smoothing: float) -> Tensor | None:
    return None if class_weight is None or smoothing == 0 else class_weight.sum(dtype=torch.float32)


def cross_entropy_targets(target: Tensor, class_weight: Tensor | None, N: int, ignore_index: int) -> Tensor:
    """() fp32, on the device: the sum of the class weights of the targets that count, or their number."""
    counted = target != ignore_index
    if class_weight is None:
        return counted.sum(dtype=torch.float32)
    inside = counted & (target >= 0) & (target < N)
    weights = class_weight.to(torch.float32)[torch.where(inside, target, 0)]
    return torch.where(inside, weights, 0.0).sum()


def cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    scale: Tensor | float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As fastlm.backends.cpu.cross_entropy.cross_entropy_fwd; scale may be a () fp32 tensor."""
    M, N = x.shape
    loss, stats = x.new_empty(M, dtype=torch.float32), x.new_empty(M, 3, dtype=torch.float32)
    dx = None if scale is None else torch.empty_like(x)
    w_sum = None if dx is None else _weight_sum(class_weight, smoothing)
    pointer, stride, value = _factor_arguments(scale)
    rows, block, warps = _plan(N, False, architecture(x.device))
    if M:
        with on_device_of(x):
            _cross_entropy_fwd_kernel[(triton.cdiv(M, rows),)](
                x, target, class_weight, w_sum, pointer, None, loss, stats, dx, M, 0, N, N, stride, ignore_index,
                1.0 - smoothing, smoothing / N, value, smoothing > 0, rows, block, num_warps=warps,
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
    """As fastlm.backends.cpu.cross_entropy.cross_entropy_update."""
    M, n = x.shape
    rows, block, warps = _plan(n, False, architecture(x.device))
    if M:
        with on_device_of(x):
            _cross_entropy_fwd_kernel[(triton.cdiv(M, rows),)](
                x, target, class_weight, None, None, states, None, None, None, M, first, n, N, 0, ignore_index,
                1.0 - smoothing, smoothing / N, 0.0, smoothing > 0, rows, block, num_warps=warps,
            )  # fmt: skip


FINISH_ROWS = 128


def cross_entropy_finish(
    states: Tensor, target: Tensor, class_weight: Tensor | None, N: int, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """As fastlm.backends.cpu.cross_entropy.cross_entropy_finish."""
    M = states.shape[0]
    loss, stats = states.new_empty(M), states.new_empty(M, 3)
    if M:
        with on_device_of(states):
            _cross_entropy_finish_kernel[(triton.cdiv(M, FINISH_ROWS),)](
                states, target, class_weight, loss, stats, M, N, ignore_index,
                1.0 - smoothing, smoothing / N, smoothing > 0, FINISH_ROWS, num_warps=4,
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
    unless: tuple[Tensor, float] | None = None,
) -> Tensor:
    """As fastlm.backends.cpu.cross_entropy.cross_entropy_bwd; scale may be a () fp32 tensor.

    unless: (grad, expected): where the scalar tensor grad holds `expected`, `out` already has what would be written
    and is left alone. The device decides, so that nobody waits for it.
    """
    M, n = x.shape
    N = n if N is None else N
    dx = torch.empty_like(x) if out is None else out
    grad, expected = unless or (None, 0.0)
    pointer, stride, value = _factor_arguments(scale)
    rows, block, warps = _plan(n, True, architecture(x.device))
    if M:
        with on_device_of(x):
            _cross_entropy_bwd_kernel[(triton.cdiv(M, rows) * triton.cdiv(n, block),)](
                x, target, class_weight, _weight_sum(class_weight, smoothing), stats, pointer, grad, dx,
                M, first, n, N, stride, ignore_index, 1.0 - smoothing, smoothing / N, value, expected,
                smoothing > 0, rows, block, num_warps=warps,
            )  # fmt: skip
    return dx
