"""What the attention kernels share: the order of programs, sequences, masks and scores.

Scores are kept in log2 units, so that exp2 serves and log2(e) is a part of the scale; in natural units under an
additive mask, whose lowest number would be infinite in the others. A tile of scores is [M, N] (queries, keys) or its
transpose: `row` and `col` are index tensors that broadcast to it either way.

A weight of 0 times NaN is NaN, so in a product of tiles a key that a row does not attend to could reach that row. The
loops pay nothing against it: a program that finds a result not finite makes those rows again from what is finite, and
then marks as NaN what attends to the rest. In a gradient of the scores a weight of 0 gives 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import INTERPRETING, dropout_factors

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A tile of rows that are made again, fewer of float32: little for registers, nothing for tensor memory.
AGAIN_ROWS, AGAIN_SINGLE_ROWS, AGAIN_KEYS = tl.constexpr(16), tl.constexpr(4), tl.constexpr(64 if INTERPRETING else 16)
INTERPRETED = tl.constexpr(INTERPRETING)


@triton.jit
def tile_and_head(program, tiles, heads, together, REVERSED: tl.constexpr):
    """A program's place: sections of `together` heads in order, inside one the same tile of all heads in turn.

    REVERSED starts with the last tiles, which are the longest under a causal mask: no long one is left for the end.
    """
    section = program // (tiles * together)
    first = section * together
    inner = program - first * tiles
    size = tl.minimum(together, heads - first)
    tile = inner // size
    return tl.where(REVERSED, tiles - 1 - tile, tile), first + inner % size


@triton.jit
def find_sequence(cu_ptr, tile, B, BLOCK: tl.constexpr):
    """Which packed sequence a tile belongs to; sequence b owns the tiles from cu[b] // BLOCK + b on.

    So cdiv(total, BLOCK) + B tiles cover every sequence, wherever the boundaries are: the host need not know them.
    """
    low = tile * 0
    high = low + B
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_ptr + middle) // BLOCK + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, tile - (tl.load(cu_ptr + low) // BLOCK + low)


@triton.jit
def place(tile, head, tiles_cu_ptr, cu_q_ptr, cu_k_ptr, B, H, T, S, BLOCK: tl.constexpr):
    """A program's sequence: (tile in it, its b, h, first query, first key, T, S), sizes of the sequence alone.

    tiles_cu_ptr: cu_q_ptr or cu_k_ptr, whichever the tiles go over; None where nothing is packed.
    H: heads of what the tiles go over.
    """
    if tiles_cu_ptr is None:
        b = head // H
        return tile, b, head % H, b.to(tl.int64) * 0, b.to(tl.int64) * 0, T, S
    else:
        b, tile = find_sequence(tiles_cu_ptr, tile, B, BLOCK)
        q_start = tl.load(cu_q_ptr + b)
        k_start = tl.load(cu_k_ptr + b)
        T = tl.minimum(tl.load(cu_q_ptr + b + 1), T) - q_start  # offsets are not checked on a GPU
        S = tl.minimum(tl.load(cu_k_ptr + b + 1), S) - k_start
        return tile, b, head, q_start.to(tl.int64), k_start.to(tl.int64), T, S


@triton.jit
def owned(cu_ptr, b, B, own, total):
    """Rows that a sequence's programs write: its own, and for the last one what follows the last boundary too."""
    if cu_ptr is None:
        return own
    else:
        return tl.where(b == B - 1, total - tl.load(cu_ptr + b), own)


@triton.jit
def load_at(ptr, offset, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] from int64 offsets of rows with unit stride along D; 0 for those not there (None: all are)."""
    d = tl.arange(0, BLOCK_D)
    x_ptr = ptr + offset[:, None] + d[None, :]
    if there is None:
        if D == BLOCK_D:
            return tl.load(x_ptr)
        else:
            return tl.load(x_ptr, (d < D)[None, :], 0.0)
    else:
        mask = there[:, None]
        if D != BLOCK_D:
            mask = mask & (d < D)[None, :]
        return tl.load(x_ptr, mask, 0.0)


@triton.jit
def load_rows(ptr, row, limit, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDS: tl.constexpr = True):
    """[rows, BLOCK_D] of a matrix, 0 from row `limit` on; without BOUNDS all rows are there."""
    if BOUNDS:
        return load_at(ptr, row.to(tl.int64) * stride, row < limit, D, BLOCK_D)
    else:
        return load_at(ptr, row.to(tl.int64) * stride, None, D, BLOCK_D)


@triton.jit
def store_at(ptr, x, offset, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if D != BLOCK_D:
        mask = mask & (d < D)[None, :]
    tl.store(ptr + offset[:, None] + d[None, :], x.to(ptr.dtype.element_ty), mask)


@triton.jit
def store_rows(ptr, x, row, limit, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    store_at(ptr, x, row.to(tl.int64) * stride, row < limit, D, BLOCK_D)


@triton.jit
def dot(a, b, acc):
    """a @ b + acc in fp32; fp32 inputs are multiplied in full precision."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def is_spoilt(x):
    """Whether any of x is NaN or infinite."""
    return tl.sum(x * 0.0) != 0


@triton.jit
def finite(x):
    """(x with 0 in the place of what is not finite, 1 there and 0 elsewhere in x's dtype)."""
    kept = tl.abs(x.to(tl.float32)) < float("inf")
    return tl.where(kept, x, 0.0).to(x.dtype), tl.where(kept, 0.0, 1.0).to(x.dtype)


@triton.jit
def program_again():
    """The program's id, read anew: what follows from it takes no registers in the loops before."""
    if INTERPRETED:
        return tl.program_id(0)
    else:
        return tl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def tanh(x):
    """By exp2, but for small x, where 1 - 2 / (e^2x + 1) would cancel, by Taylor's series: error below 2e-7 of it."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.06, series, 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1))


@triton.jit
def natural(mask_ptr):
    """Whether scores are in natural units."""
    if mask_ptr is None:
        return tl.constexpr(False)
    else:
        return tl.constexpr(mask_ptr.dtype.element_ty != tl.int1)


@triton.jit
def scores(
    qk,
    row,
    col,
    mask_ptr,  # or None
    mask_row,  # int64, like row: where each row's mask begins
    stride_ms,
    T,
    S,
    scale,
    softcap,
    window_left,
    window_right,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """(scores in the mask's units, -inf where nothing is attended; the softcap's tanh).

    BOUNDS: whether the tile reaches over the last key or an edge of the window.
    """
    UNIT: tl.constexpr = 1.0 if natural(mask_ptr) else LOG2E
    capped = qk
    if SOFTCAP:
        capped = tanh(qk * (scale / softcap))
        s = capped * (softcap * UNIT)
    else:
        s = qk * (scale * UNIT)
    if mask_ptr is not None:
        offsets = mask_row + col.to(tl.int64) * stride_ms
        there = (row < T) & (col < S)
        if mask_ptr.dtype.element_ty == tl.int1:
            s = tl.where(tl.load(mask_ptr + offsets, there, 0), s, float("-inf"))
        else:
            mask = tl.load(mask_ptr + offsets, there, float("-inf")).to(tl.float32)
            s = tl.where(mask == float("-inf"), mask, s + mask)  # whatever s is
    if BOUNDS:
        inside = col < S
        if RIGHT:
            inside = inside & (col <= row + window_right)
        if LEFT:
            inside = inside & (col >= row - window_left)
        s = tl.where(inside, s, float("-inf"))
    return s, capped


@triton.jit
def span(
    first,
    limit,
    before,
    after,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    TAIL: tl.constexpr,
):
    """What a tile of OWN from `first` on meets, in tiles of OTHER: (start, start and end of whole tiles, end).

    Everything meets from `before` ahead of itself to `after` behind itself, where BEFORE and AFTER say that there
    are such bounds. In a whole tile everything meets everything. TAIL: a tile over the limit is not whole.
    """
    start = first * 0
    whole = start
    end = start + limit
    whole_end = end
    if AFTER:
        end = tl.minimum(limit, first + OWN + after)
        whole_end = tl.minimum(limit, first + after + 1)
    if BEFORE:
        start = tl.maximum(0, first - before) // OTHER * OTHER
        whole = tl.cdiv(tl.maximum(0, first + OWN - 1 - before), OTHER) * OTHER
        whole = tl.maximum(start, tl.minimum(whole, tl.cdiv(end, OTHER) * OTHER))
    if AFTER or TAIL:
        whole_end = whole_end // OTHER * OTHER
    return start, whole, tl.maximum(whole, whole_end), end


@triton.jit
def attend(
    acc,  # [M, BLOCK_DV] fp32: sum of weights times values
    total,  # [M] fp32: sum of weights
    peak,  # [M] fp32: the largest score so far
    q,  # [M, BLOCK_D]
    k_ptr,  # at the tile's batch and head
    v_ptr,
    mask_ptr,  # or None
    row,  # [M]: which queries
    mask_row,  # [M] int64: where each row's mask begins
    dropout_row,  # [M] int64: number of each row in the dropout mask
    start,
    end,
    stride_ks,
    stride_vs,
    stride_ms,
    T,
    S,
    scale,  # not negative
    softcap,
    window_left,
    window_right,
    seed,
    threshold,
    dropout_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    BOUNDS: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """Take the keys from `start` to `end` into the online softmax.

    AGAIN: what is not finite reaches only the rows that attend to it, as NaN; with BOUNDS.
    """
    STAGES: tl.constexpr = 1 if AGAIN else None
    for first in tl.range(start, end, N, num_stages=STAGES):
        first = tl.multiple_of(first, N)
        col = first + tl.arange(0, N)
        k = load_rows(k_ptr, col, S, stride_ks, D, BLOCK_D, BOUNDS)
        if AGAIN:
            k, not_finite = finite(k)
            spoilt = tl.max(not_finite.to(tl.float32), 1)[None, :] != 0
        qk = dot(q, tl.trans(k), tl.zeros((q.shape[0], N), tl.float32))
        if SOFTCAP or mask_ptr is not None or BOUNDS:
            s, _ = scores(
                qk, row[:, None], col[None, :], mask_ptr, mask_row[:, None], stride_ms, T, S, scale, softcap,
                window_left, window_right, LEFT, RIGHT, SOFTCAP, BOUNDS,
            )  # fmt: skip
            if AGAIN:
                s = tl.where(spoilt & (s != float("-inf")), float("nan"), s)
            new_peak = tl.maximum(peak, tl.max(s, 1))
        else:  # the scale is not negative, so the maximum can be taken before it: one multiply-add an element less
            s = qk * (scale * LOG2E)
            new_peak = tl.maximum(peak, tl.max(qk, 1) * (scale * LOG2E))
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # rows that attend to nothing yet
        if natural(mask_ptr):
            p = tl.exp2((s - pivot[:, None]) * LOG2E)
            alpha = tl.exp2((peak - pivot) * LOG2E)
        else:
            p = tl.exp2(s - pivot[:, None])
            alpha = tl.exp2(peak - pivot)
        total = total * alpha + tl.sum(p, 1)
        if DROPOUT:
            p *= dropout_factors(dropout_row, first, seed, threshold, dropout_scale, N)
        v = load_rows(v_ptr, col, S, stride_vs, DV, BLOCK_DV, BOUNDS)
        if AGAIN:
            v, not_finite = finite(v)
            attended = tl.where(s != float("-inf"), 1.0, 0.0).to(v.dtype)
            reached = dot(attended, not_finite, tl.zeros_like(acc))
            acc = tl.where(reached != 0, float("nan"), acc)
        acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
        peak = new_peak
    return acc, total, peak


@triton.jit
def normalized(acc, total):
    """out of rows, 0 where a row attends to nothing."""
    return tl.where((total != 0)[:, None], acc / tl.where(total != 0, total, 1.0)[:, None], 0.0)


@triton.jit
def log_sum(total, peak, NATURAL: tl.constexpr):
    """(log-sum-exp, what its rounding takes away) of rows; -inf where a row attends to nothing."""
    if not NATURAL:
        peak *= LN2
    low = tl.log2(total) * LN2
    lse = peak + low
    added = lse - peak  # Knuth's two-sum
    rest = (peak - (lse - added)) + (low - added)
    return tl.where(total != 0, lse, float("-inf")), tl.where(total != 0, rest, 0.0)


@triton.jit
def store_lse(lse_ptr, rest_ptr, total, peak, offset, there, NATURAL: tl.constexpr):
    """What `log_sum` gives; either pointer may be None."""
    lse, rest = log_sum(total, peak, NATURAL)
    if lse_ptr is not None:
        tl.store(lse_ptr + offset, lse, there)
    if rest_ptr is not None:
        tl.store(rest_ptr + offset, rest, there)


@triton.jit
def attend_again(
    q_ptr,  # at the tile's batch and head, as out_ptr and sums_ptr
    q_offset,  # [M] int64: where each row of q begins
    out_ptr,
    out_offset,  # [M] int64
    there,  # [M]: which rows are
    k_ptr,
    v_ptr,
    mask_ptr,
    row,
    mask_row,
    dropout_row,
    start,
    end,
    stride_ks,
    stride_vs,
    stride_ms,
    T,
    S,
    scale,  # of any sign
    softcap,
    window_left,
    window_right,
    seed,
    threshold,
    dropout_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Make those of AGAIN_ROWS stored rows again that are not finite: their (total, peak), and which they are."""
    M: tl.constexpr = row.shape[0]
    stored = load_at(out_ptr, out_offset, there, DV, BLOCK_DV)
    again = tl.sum(stored.to(tl.float32) * 0.0, 1) != 0
    q = load_at(q_ptr, q_offset, there, D, BLOCK_D)
    q = (q.to(tl.float32) * tl.where(scale < 0, -1.0, 1.0)).to(q.dtype)
    acc, total, peak = attend(
        tl.zeros((M, BLOCK_DV), tl.float32), tl.zeros((M,), tl.float32), tl.full((M,), float("-inf"), tl.float32),
        q, k_ptr, v_ptr, mask_ptr, row, mask_row, dropout_row, start, end,
        stride_ks, stride_vs, stride_ms, T, S, tl.abs(scale), softcap, window_left, window_right,
        seed, threshold, dropout_scale, D, DV, BLOCK_D, BLOCK_DV, AGAIN_KEYS,
        LEFT, RIGHT, SOFTCAP, DROPOUT, True, True,
    )  # fmt: skip
    store_at(out_ptr, normalized(acc, total), out_offset, again, DV, BLOCK_DV)
    return total, peak, again


@triton.jit
def row_statistics(lse_ptr, rest_ptr, delta_ptr, row, T, NATURAL: tl.constexpr):
    """(lse in the scores' units, its rest, delta) of rows; one that attends to nothing, or is not there, weighs 0."""
    lse = tl.load(lse_ptr + row, row < T, float("-inf"))
    if not NATURAL:
        lse *= LOG2E
    rest = 0.0
    if rest_ptr is not None:
        rest = tl.load(rest_ptr + row, row < T, 0.0)
    delta = tl.load(delta_ptr + row, row < T, 0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse), rest, delta


@triton.jit
def weights(s, lse, rest, mask_ptr, CUT: tl.constexpr):
    """exp(s - lse - rest); under a mask never above 1, which cancellation in huge scores could make infinite.

    CUT: keys may be closed, whose weight is 0 even beside a NaN.
    """
    difference = s - lse
    if natural(mask_ptr):
        difference = (difference - rest) * LOG2E
    if mask_ptr is not None:
        difference = tl.minimum(difference, 0.0, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(difference)
    if CUT:
        p = tl.where(s == float("-inf"), 0.0, p)
    return p


@triton.jit
def weighted(p, x, CUT: tl.constexpr):
    """p x; with CUT, 0 where p is 0, whatever x is."""
    product = p * x
    if CUT:
        product = tl.where(p == 0.0, 0.0, product)
    return product
