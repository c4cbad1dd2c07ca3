"""The online softmax of forward and decoding, and its weights as backward makes them again.

A weight of 0 times NaN is NaN: in a product of tiles, a key that a row does not attend to could reach that row. The
main loops do not guard against it. A program that finds a non-finite result recomputes those rows with a product of
the finite elements alone, and sets to NaN what attends to any other. In a score's gradient a weight of 0 gives 0.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .._common import dropout_factors
from .arguments import Scoring
from .mask import LN2, LOG2E, MaskRows, scores
from .tiles import RECOMPUTE_KEYS, dot, finite, load_at, load_block, store_at


class Rows(NamedTuple):
    """The queries of a tile."""

    query: tl.tensor  # [M], in their sequence
    index: tl.tensor  # [M] int64, in lse and in the dropout mask


@triton.jit
def signed(q, scale):
    """q with the sign of the scale, whose absolute value the main loop takes."""
    return (q.to(tl.float32) * tl.where(scale < 0, -1.0, 1.0)).to(q.dtype)


@triton.jit
def online_softmax(M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """(acc, row_sum, row_max) of M rows before their first key."""
    return tl.zeros((M, BLOCK_DV), tl.float32), tl.zeros((M,), tl.float32), tl.full((M,), float("-inf"), tl.float32)


@triton.jit
def mainloop(
    acc,  # [M, BLOCK_DV] fp32: sum of weights times values
    row_sum,  # [M] fp32: of weights
    row_max,  # [M] fp32: the largest score so far
    q,  # [M, BLOCK_D], signed
    k,  # views of the sequence's keys and values
    v,
    mask,  # MaskRows of [M]
    rows,  # Rows
    start,
    end,
    seqlen,
    scoring,
    dropout,
    config: tl.constexpr,
    N: tl.constexpr,
    BOUNDS: tl.constexpr,
    RECOMPUTE: tl.constexpr = False,
):
    """Take the keys from `start` to `end` into the online softmax.

    RECOMPUTE: what is not finite reaches only the rows that attend to it, as NaN; with BOUNDS.
    """
    STAGES: tl.constexpr = 1 if RECOMPUTE else None
    scale = tl.abs(scoring.scale)
    for first in tl.range(start, end, N, num_stages=STAGES):
        first = tl.multiple_of(first, N)
        col = first + tl.arange(0, N)
        keys = load_block(k, first, N, seqlen.seqlen_k, config.D, config.BLOCK_D, BOUNDS)
        if RECOMPUTE:
            keys, not_finite = finite(keys)
            non_finite = tl.max(not_finite.to(tl.float32), 1)[None, :] != 0
        qk = dot(q, tl.trans(keys), tl.zeros((q.shape[0], N), tl.float32))
        if config.SOFTCAP or mask.ptr is not None or BOUNDS:
            s, _ = scores(
                qk, rows.query[:, None], col[None, :], MaskRows(mask.ptr, mask.row[:, None], mask.column),
                seqlen, Scoring(scale, scoring.softcap, scoring.window), config, BOUNDS,
            )  # fmt: skip
            if RECOMPUTE:
                s = tl.where(non_finite & (s != float("-inf")), float("nan"), s)
            new_max = tl.maximum(row_max, tl.max(s, 1))
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that attend to nothing yet
        else:  # the scale is not negative, so the maximum can be taken before it: one multiply-add an element less
            s = qk * (scale * LOG2E)
            new_max = tl.maximum(row_max, tl.max(qk, 1) * (scale * LOG2E))
            pivot = new_max
        if config.NATURAL:
            p = tl.exp2((s - pivot[:, None]) * LOG2E)
            alpha = tl.exp2((row_max - pivot) * LOG2E)
        else:
            p = tl.exp2(s - pivot[:, None])
            alpha = tl.exp2(row_max - pivot)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        if config.DROPOUT:
            p *= dropout_factors(rows.index, first, *dropout, N)
        values = load_block(v, first, N, seqlen.seqlen_k, config.DV, config.BLOCK_DV, BOUNDS)
        if RECOMPUTE:
            values, not_finite = finite(values)
            attended = tl.where(s != float("-inf"), 1.0, 0.0).to(values.dtype)
            reached = dot(attended, not_finite, tl.zeros_like(acc))
            acc = tl.where(reached != 0, float("nan"), acc)
        acc = dot(p.to(values.dtype), values, acc * alpha[:, None])
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def epilogue(acc, row_sum):
    """out of rows, 0 where a row attends to nothing."""
    return tl.where((row_sum != 0)[:, None], acc / tl.where(row_sum != 0, row_sum, 1.0)[:, None], 0.0)


@triton.jit
def log_sum(row_sum, row_max, NATURAL: tl.constexpr):
    """(log-sum-exp, what its rounding takes away) of rows; -inf where a row attends to nothing."""
    if not NATURAL:
        row_max *= LN2
    low = tl.log2(row_sum) * LN2
    lse = row_max + low
    added = lse - row_max  # Knuth's two-sum
    rest = (row_max - (lse - added)) + (low - added)
    return tl.where(row_sum != 0, lse, float("-inf")), tl.where(row_sum != 0, rest, 0.0)


@triton.jit
def store_lse(lse_ptr, rest_ptr, row_sum, row_max, offset, there, NATURAL: tl.constexpr):
    """What `log_sum` gives; either pointer may be None."""
    lse, rest = log_sum(row_sum, row_max, NATURAL)
    if lse_ptr is not None:
        tl.store(lse_ptr + offset, lse, there)
    if rest_ptr is not None:
        tl.store(rest_ptr + offset, rest, there)


@triton.jit
def recompute_rows(
    q_ptr,
    q_offset,  # [M] int64: where each row of q begins
    out_ptr,
    out_offset,  # [M] int64
    there,  # [M]: which rows are
    k,
    v,
    mask,
    rows,
    start,
    end,
    seqlen,
    scoring,
    dropout,
    config: tl.constexpr,
):
    """Compute those of the stored rows again that are not finite: their (row_sum, row_max), and which they are."""
    stored = load_at(out_ptr, out_offset, there, config.DV, config.BLOCK_DV)
    non_finite = tl.sum(stored.to(tl.float32) * 0.0, 1) != 0
    q = signed(load_at(q_ptr, q_offset, there, config.D, config.BLOCK_D), scoring.scale)
    acc, row_sum, row_max = mainloop(
        *online_softmax(there.shape[0], config.BLOCK_DV), q, k, v, mask, rows, start, end, seqlen, scoring, dropout,
        config, RECOMPUTE_KEYS, True, True,
    )  # fmt: skip
    store_at(out_ptr, epilogue(acc, row_sum), out_offset, non_finite, config.DV, config.BLOCK_DV)
    return row_sum, row_max, non_finite


class Statistics(NamedTuple):
    """What backward knows of the rows, (B, H, T) fp32."""

    lse: tl.tensor
    rest: tl.tensor | None  # what rounding took from lse
    delta: tl.tensor


@triton.jit
def row_statistics(statistics, first, row, T, NATURAL: tl.constexpr):
    """(lse in the scores' units, its rest, delta) of rows, of a sequence whose first row has the index `first`.

    A row that attends to nothing, or is not there, weighs 0.
    """
    lse_ptr, delta_ptr = statistics.lse + first, statistics.delta + first
    lse = tl.load(lse_ptr + row, row < T, float("-inf"))
    if not NATURAL:
        lse *= LOG2E
    rest = 0.0
    if statistics.rest is not None:
        rest = tl.load(statistics.rest + first + row, row < T, 0.0)
    delta = tl.load(delta_ptr + row, row < T, 0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse), rest, delta


@triton.jit
def weights(s, lse, rest, mask_ptr, CUT: tl.constexpr, NATURAL: tl.constexpr):
    """exp(s - lse - rest); under a mask never above 1, which cancellation in huge scores could make infinite.

    CUT: keys may be closed, whose weight is 0 even beside a NaN.
    """
    difference = s - lse
    if NATURAL:
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
