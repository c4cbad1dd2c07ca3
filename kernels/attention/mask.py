"""Attention's scores: scale, softcap, mask and window.

Scores are kept in log2 units, so that exp2 serves and log2(e) is a part of the scale; in natural units under an
additive mask, whose lowest number would be infinite in the others.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class MaskRows(NamedTuple):
    """A mask's rows for those of a tile; the pointer may be None."""

    ptr: tl.tensor | None
    row: tl.tensor  # int64, of a tile's shape: where each row begins
    column: tl.tensor  # stride


@triton.jit
def tanh(x):
    """By exp2, but for small x, where 1 - 2 / (e^2x + 1) would cancel, by Taylor's series: error below 2e-7 of it."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.06, series, 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1))


@triton.jit
def scores(qk, row, col, mask, seqlen, scoring, config: tl.constexpr, BOUNDS: tl.constexpr):
    """(scores, -inf where nothing is attended; the softcap's tanh) of a tile of products.

    qk is [M, N] (queries, keys) or its transpose: `row`, `col` and the mask's rows are index tensors that broadcast to
    it either way. BOUNDS: whether the tile reaches over the last key or an edge of the window.
    """
    UNIT: tl.constexpr = 1.0 if config.NATURAL else LOG2E
    capped = qk
    if config.SOFTCAP:
        capped = tanh(qk * (scoring.scale / scoring.softcap))
        s = capped * (scoring.softcap * UNIT)
    else:
        s = qk * (scoring.scale * UNIT)
    if mask.ptr is not None:
        offset = mask.row + col.to(tl.int64) * mask.column
        there = (row < seqlen.seqlen_q) & (col < seqlen.seqlen_k)
        if config.NATURAL:
            added = tl.load(mask.ptr + offset, there, float("-inf")).to(tl.float32)
            s = tl.where(added == float("-inf"), added, s + added)  # whatever s is
        else:
            s = tl.where(tl.load(mask.ptr + offset, there, 0), s, float("-inf"))
    if BOUNDS:
        inside = col < seqlen.seqlen_k
        if config.RIGHT:
            inside = inside & (col <= row + scoring.window.right)
        if config.LEFT:
            inside = inside & (col >= row - scoring.window.left)
        s = tl.where(inside, s, float("-inf"))
    return s, capped
