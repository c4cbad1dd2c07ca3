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
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._core.architecture import SM80, Architecture

from ._common import Table, Tile, architecture, in_pairs, kernel, on_device_of, tile_for, widened

# Not measured on any GPU yet: 16 elements a thread of a short row, 32 of a longer one.
FORWARD: Table = {SM80: (Tile(1024, 2048, 4), Tile(4096, 4096, 4))}
BACKWARD: Table = {SM80: (Tile(1024, 2048, 4), Tile(4096, 4096, 4))}
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


class _Fold(NamedTuple):
    """What is known of the columns so far, of each row or of each lane of a row."""

    m: tl.tensor  # maximum
    others: tl.tensor  # sum of exp(x - m), without y
    smooth: tl.tensor  # sum of w (x - m)
    weight: tl.tensor  # sum of w


@triton.jit
def _nothing(ROWS: tl.constexpr, LANES: tl.constexpr):
    """The folds of no column."""
    zero = tl.zeros((ROWS, LANES), tl.float32)
    return _Fold(tl.full((ROWS, LANES), float("-inf"), tl.float32), zero, zero, zero)


@triton.jit
def _faded(fold, m):
    """A fold as it is where the maximum is m, which is no less than its own."""
    fade = tl.where(fold.m == m, 1.0, tl.exp2((fold.m - m) * LOG2_E))
    smooth = fold.smooth + fold.weight * (_pivot(fold.m) - _pivot(m))
    return _Fold(m, fold.others * fade, smooth, fold.weight)


@triton.jit
def _joined(a, b):
    """Two folds in one."""
    m = tl.maximum(a.m, b.m)
    a, b = _faded(a, m), _faded(b, m)
    return _Fold(m, a.others + b.others, a.smooth + b.smooth, a.weight + b.weight)


@triton.jit
def _over_lanes(lanes):
    """A row's fold from those of its lanes."""
    m = tl.max(lanes.m, 1)
    faded = _faded(lanes, m[:, None])
    return _Fold(m, tl.sum(faded.others, 1), tl.sum(faded.smooth, 1), tl.sum(faded.weight, 1))


@triton.jit
def _columns(tile: tl.constexpr):
    """[1, REPEATS, LANES, VECTOR]: a tile's columns."""
    REPEATS: tl.constexpr = tile.N // (tile.LANES * tile.VECTOR)
    repeat = tl.arange(0, REPEATS)[None, :, None, None] * (tile.LANES * tile.VECTOR)
    lane = tl.arange(0, tile.LANES)[None, None, :, None] * tile.VECTOR
    return repeat + lane + tl.arange(0, tile.VECTOR)[None, None, None, :]


@triton.jit
def _of_row(x):
    """[ROWS] beside a tile."""
    return x[:, None, None, None]


@triton.jit
def _offsets(n, start, tile: tl.constexpr):
    """Where a tile's elements are, from the first element of its rows on."""
    N: tl.constexpr = tile.N
    inner = _columns(tile)
    if tile.ROWS > 1:
        inner += _of_row(tl.arange(0, tile.ROWS)) * n
    return tl.multiple_of(start, N) + inner


@triton.jit
def _fold_tile(lanes, x_ptr, w_ptr, own, there, first, n, start, tile: tl.constexpr, SMOOTH: tl.constexpr,
               MASKED: tl.constexpr):  # fmt: skip
    """The columns from `start` on taken into each lane's fold. Without MASKED all of them are there, y is not."""
    offsets = _offsets(n, start, tile)
    col = start + _columns(tile)
    if MASKED:
        mask = _of_row(there) & (col < n)
        x = tl.load(x_ptr + offsets, mask, float("-inf")).to(tl.float32)
    else:
        x = widened(tl.load(x_ptr + offsets), tile.PAIRS)
    m = tl.maximum(lanes.m, tl.max(tl.max(x, 3), 1))
    faded = _faded(lanes, m)
    centred = x - _pivot(m)[:, None, :, None]
    e = tl.exp2(centred * LOG2_E)
    if MASKED:
        e = tl.where(col == _of_row(own), 0.0, e)
    smooth, weight = faded.smooth, faded.weight
    if SMOOTH:
        w = tl.full(x.shape, 1.0, tl.float32)
        if MASKED:
            w = tl.where(mask, w, 0.0)
            if w_ptr is not None:
                w = tl.load(w_ptr + first + col, mask, 0.0).to(tl.float32)
            centred = tl.where(mask, centred, 0.0)
        elif w_ptr is not None:
            w = tl.load(w_ptr + first + col).to(tl.float32)
        smooth += tl.sum(tl.sum(w * centred, 3), 1)
        weight += tl.sum(tl.sum(w, 3), 1)
    return _Fold(m, faded.others + tl.sum(tl.sum(e, 3), 1), smooth, weight)


class _Schedule(NamedTuple):
    """In what order a program takes the blocks of its rows' columns."""

    fast: tl.tensor  # how many go without masks
    own: tl.tensor  # the block that has the row's class, or the number of whole blocks
    whole: tl.tensor  # how many blocks are whole
    slow: tl.tensor  # how many go with masks


@triton.jit
def _own_column(target, first, n):
    """[ROWS] int32: which column of the window is the row's class, -1 where none is."""
    place = target - first
    return tl.where((place >= 0) & (place < n), place, -1).to(tl.int32)


@triton.jit
def _schedule(own, n, tile: tl.constexpr):
    """Masks are for the block with the row's class and for the last one; for all where a tile has several rows."""
    whole = n // tile.N
    if tile.ROWS > 1:
        return _Schedule(whole * 0, whole, whole, tl.cdiv(n, tile.N))
    else:
        own = tl.max(own, 0)
        here = (own >= 0) & (own < whole * tile.N)
        with_own = tl.where(here, 1, 0)
        own = tl.where(here, own // tile.N, whole)
        return _Schedule(whole - with_own, own, whole, with_own + tl.cdiv(n, tile.N) - whole)


@triton.jit
def _fast_block(i, schedule):
    """The i-th of those that go without masks."""
    return i + tl.where(i >= schedule.own, 1, 0)


@triton.jit
def _slow_block(i, schedule, EACH: tl.constexpr):
    """The i-th of those that go with masks; EACH: of all."""
    if EACH:
        return i
    else:
        return tl.where(i == 0, schedule.own, schedule.whole)  # own is the number of the last where none has the class


@triton.jit
def _finish_row(fold, x_y, target, w_ptr, N, ignore_index, keep, spread, SMOOTH: tl.constexpr):
    """(loss, 1 / s, 1 - p_y); keep is 1 - e, spread e / N."""
    m, others = fold.m, fold.others
    ignored = target == ignore_index
    wrong = (tl.abs(m) == float("inf")) | (target < 0) | (target >= N)
    s = others + tl.exp2((x_y - m) * LOG2_E)
    log_s = tl.where(x_y == m, _log1p(others), tl.log(s))
    loss = log_s + (m - x_y)
    if w_ptr is not None:
        loss *= tl.load(w_ptr + target, (target >= 0) & (target < N), 0.0).to(tl.float32)
    if SMOOTH:
        loss = keep * loss + spread * (fold.weight * log_s - fold.smooth)
    loss = tl.where(wrong, float("nan"), loss)
    inv_s = tl.where(wrong, float("nan"), 1.0 / s)
    return tl.where(ignored, 0.0, loss), tl.where(ignored, 0.0, inv_s), tl.where(ignored, 0.0, others * inv_s)


class _Gradient(NamedTuple):
    """dx of a row: exp(x - m) factor - w constant, but own for its class."""

    m: tl.tensor
    factor: tl.tensor
    constant: tl.tensor
    own: tl.tensor


@triton.jit
def _gradient(m, inv_s, q, g, target, w_ptr, w_sum_ptr, N, keep, spread, SMOOTH: tl.constexpr):
    """w_sum is W; without class weights N."""
    kept = keep + tl.zeros_like(inv_s)
    w_y = tl.full(kept.shape, 1.0, tl.float32)
    if w_ptr is not None:
        w_y = tl.load(w_ptr + target, (target >= 0) & (target < N), 0.0).to(tl.float32)
        kept *= w_y
    total, own = kept, -kept * q
    if SMOOTH:
        w_sum = tl.load(w_sum_ptr) if w_sum_ptr is not None else N
        total += spread * w_sum
        p_y = 1.0 - q
        own += spread * (w_sum * p_y - w_y)
    return _Gradient(_pivot(m), g * total * inv_s, g * spread, g * own)


@triton.jit
def _store_gradient(
    x_ptr, dx_ptr, w_ptr, gradient, own, there, counted, first, n, start,
    tile: tl.constexpr, SMOOTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dx of one tile, 0 in rows that are not `counted`."""
    offsets = _offsets(n, start, tile)
    col = start + _columns(tile)
    if MASKED:
        mask = _of_row(there) & (col < n)
        x = tl.load(x_ptr + offsets, mask & _of_row(counted), 0.0).to(tl.float32)
    else:
        x = widened(tl.load(x_ptr + offsets), tile.PAIRS)
    dx = tl.exp2((x - _of_row(gradient.m)) * LOG2_E) * _of_row(gradient.factor)
    if SMOOTH:
        w = tl.full(x.shape, 1.0, tl.float32)
        if w_ptr is not None:
            w = (tl.load(w_ptr + first + col, mask, 0.0) if MASKED else tl.load(w_ptr + first + col)).to(tl.float32)
        dx -= w * _of_row(gradient.constant)
    if MASKED:
        dx = tl.where(col == _of_row(own), _of_row(gradient.own), dx)
        tl.store(dx_ptr + offsets, tl.where(_of_row(counted), dx, 0.0).to(dx_ptr.dtype.element_ty), mask)
    else:
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty))


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
    tile: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program * tile.ROWS + tl.arange(0, tile.ROWS)
    x_ptr += program * tile.ROWS * n
    in_rows = row < M
    target = tl.load(target_ptr + row, in_rows, ignore_index)
    counted = in_rows & (target != ignore_index)
    own = _own_column(target, first, n)
    schedule = _schedule(own, n, tile)
    some = tl.max(counted.to(tl.int32), 0)
    lanes = _nothing(tile.ROWS, tile.LANES)
    for i in tl.range(0, schedule.fast * some):
        start = _fast_block(i, schedule) * tile.N
        lanes = _fold_tile(lanes, x_ptr, w_ptr, own, counted, first, n, start, tile, SMOOTH, False)
    for i in tl.range(0, schedule.slow * some):
        start = _slow_block(i, schedule, tile.ROWS > 1) * tile.N
        lanes = _fold_tile(lanes, x_ptr, w_ptr, own, counted, first, n, start, tile, SMOOTH, True)
    fold = _over_lanes(lanes)
    x_y = tl.load(x_ptr + tl.arange(0, tile.ROWS) * n + own, counted & (own >= 0), 0.0).to(tl.float32)
    if states_ptr is not None:
        states = states_ptr + row * 5
        later = row < tl.where(first > 0, M, 0)  # no row in the first window
        before = _Fold(
            tl.load(states, later, float("-inf")), tl.load(states + 1, later, 0.0),
            tl.load(states + 2, later, 0.0), tl.load(states + 3, later, 0.0),
        )  # fmt: skip
        fold = _joined(before, fold)
        x_y += tl.load(states + 4, later, 0.0)
        tl.store(states, fold.m, in_rows)
        tl.store(states + 1, fold.others, in_rows)
        tl.store(states + 2, fold.smooth, in_rows)
        tl.store(states + 3, fold.weight, in_rows)
        tl.store(states + 4, x_y, in_rows)
    else:
        loss, inv_s, q = _finish_row(fold, x_y, target, w_ptr, N, ignore_index, keep, spread, SMOOTH)
        tl.store(loss_ptr + row, loss, in_rows)
        tl.store(stats_ptr + row * 3, fold.m, in_rows)
        tl.store(stats_ptr + row * 3 + 1, inv_s, in_rows)
        tl.store(stats_ptr + row * 3 + 2, q, in_rows)
        if dx_ptr is not None:
            dx_ptr += program * tile.ROWS * n
            g = _factors(scale_ptr, scale_stride, scale, row, in_rows)
            gradient = _gradient(fold.m, inv_s, q, g, target, w_ptr, w_sum_ptr, N, keep, spread, SMOOTH)
            for i in tl.range(0, schedule.fast * some):
                start = _fast_block(i, schedule) * tile.N
                _store_gradient(
                    x_ptr, dx_ptr, w_ptr, gradient, own, in_rows, counted, first, n, start, tile, SMOOTH, False
                )
            for i in tl.range(0, tl.where(some != 0, schedule.slow, tl.cdiv(n, tile.N))):
                start = tl.where(some != 0, _slow_block(i, schedule, tile.ROWS > 1), i) * tile.N
                _store_gradient(
                    x_ptr, dx_ptr, w_ptr, gradient, own, in_rows, counted, first, n, start, tile, SMOOTH, True
                )


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
    states = states_ptr + row * 5
    fold = _Fold(
        tl.load(states, in_rows, 0.0), tl.load(states + 1, in_rows, 0.0),
        tl.load(states + 2, in_rows, 0.0), tl.load(states + 3, in_rows, 0.0),
    )  # fmt: skip
    x_y = tl.load(states + 4, in_rows, 0.0)
    loss, inv_s, q = _finish_row(fold, x_y, target, w_ptr, N, ignore_index, keep, spread, SMOOTH)
    tl.store(loss_ptr + row, loss, in_rows)
    tl.store(stats_ptr + row * 3, fold.m, in_rows)
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
    tile: tl.constexpr,
):
    blocks = tl.cdiv(n, tile.N)
    program = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    row = program * tile.ROWS + tl.arange(0, tile.ROWS)
    x_ptr += program * tile.ROWS * n
    dx_ptr += program * tile.ROWS * n
    in_rows = row < M
    wanted = True
    if grad_ptr is not None:
        wanted = tl.load(grad_ptr).to(tl.float32) != expected
    if wanted:
        target = tl.load(target_ptr + row, in_rows, ignore_index)
        counted = in_rows & (target != ignore_index)
        m = tl.load(stats_ptr + row * 3, in_rows, 0.0)
        inv_s = tl.load(stats_ptr + row * 3 + 1, in_rows, 0.0)
        q = tl.load(stats_ptr + row * 3 + 2, in_rows, 0.0)
        g = _factors(scale_ptr, scale_stride, scale, row, in_rows)
        gradient = _gradient(m, inv_s, q, g, target, w_ptr, w_sum_ptr, N, keep, spread, SMOOTH)
        own = _own_column(target, first, n)
        schedule = _schedule(own, n, tile)
        start = block * tile.N
        if tile.ROWS > 1:
            _store_gradient(x_ptr, dx_ptr, w_ptr, gradient, own, in_rows, counted, first, n, start, tile, SMOOTH, True)
        elif (block < schedule.whole) & (block != schedule.own) & (tl.max(counted.to(tl.int32), 0) != 0):
            _store_gradient(x_ptr, dx_ptr, w_ptr, gradient, own, in_rows, counted, first, n, start, tile, SMOOTH, False)
        else:
            _store_gradient(x_ptr, dx_ptr, w_ptr, gradient, own, in_rows, counted, first, n, start, tile, SMOOTH, True)


class _Columns(NamedTuple):
    """A program's tile: ROWS rows by N columns, of which a thread takes VECTOR side by side, then LANES * VECTOR on.

    PAIRS: as in `widened`.
    """

    ROWS: int
    N: int
    LANES: int
    VECTOR: int
    PAIRS: bool


@functools.lru_cache(maxsize=1024)
def _plan(n: int, itemsize: int, backward: bool, arch: Architecture) -> tuple[_Columns, int]:
    """(tile, warps); rows that no 16-byte load can take go an element a load, neighbours to neighbouring threads."""
    tile = tile_for(BACKWARD if backward else FORWARD, arch, n)
    block = min(tile.block, max(16, triton.next_power_of_2(n)))
    vector = 1 if n % 16 else 16 // itemsize
    lanes = min(tile.warps * arch.wavefront, block // vector)
    return _Columns(tile.rows(block), block, lanes, vector, in_pairs(arch)), tile.warps


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
    tile, warps = _plan(N, x.element_size(), False, architecture(x.device))
    if M:
        with on_device_of(x):
            _cross_entropy_fwd_kernel[(triton.cdiv(M, tile.ROWS),)](
                x, target, class_weight, w_sum, pointer, None, loss, stats, dx, M, 0, N, N, stride, ignore_index,
                1.0 - smoothing, smoothing / N, value, smoothing > 0, tile, num_warps=warps,
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
    tile, warps = _plan(n, x.element_size(), False, architecture(x.device))
    if M:
        with on_device_of(x):
            _cross_entropy_fwd_kernel[(triton.cdiv(M, tile.ROWS),)](
                x, target, class_weight, None, None, states, None, None, None, M, first, n, N, 0, ignore_index,
                1.0 - smoothing, smoothing / N, 0.0, smoothing > 0, tile, num_warps=warps,
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
    tile, warps = _plan(n, x.element_size(), True, architecture(x.device))
    if M:
        with on_device_of(x):
            _cross_entropy_bwd_kernel[(triton.cdiv(M, tile.ROWS) * triton.cdiv(n, tile.N),)](
                x, target, class_weight, _weight_sum(class_weight, smoothing), stats, pointer, grad, dx,
                M, first, n, N, stride, ignore_index, 1.0 - smoothing, smoothing / N, value, expected,
                smoothing > 0, tile, num_warps=warps,
            )  # fmt: skip
    return dx
