"""Attention of a few queries over a long cache: the keys are split over programs, and their results combined in order.

One program reads a split of the keys of one key head for all the queries that use them: the rows of its tile are the
queries of all heads of the group. It writes the attention over its own keys, their largest score and the sum relative
to it; a second kernel weighs the splits. How keys are split depends on their number alone, so a row's bits do not
depend on the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._core.architecture import GFX942, GFX1100, SM80

from .._common import Dropout, architecture, dropout_arguments, kernel, on_device_of
from .arguments import Args, Mask, Packing, Scoring, Sizes, View, Window, at
from .mask import LN2, LOG2E, MaskRows
from .seqlen import SeqlenInfo
from .softmax import Rows, epilogue, mainloop, online_softmax, recompute_rows, signed, store_lse
from .tables import (
    Blocking,
    Blockings,
    Blocks,
    Geometry,
    blocks_for,
    compiled_for,
    mask_strides,
)
from .tiles import (
    RECOMPUTE_ROWS,
    RECOMPUTE_SINGLE_ROWS,
    has_non_finite,
    load_at,
    program_id_again,
    store_at,
)

MOST_QUERIES, LEAST_KEYS = 16, 256  # what is worth splitting
SPLIT_KEYS, MOST_SPLITS = 256, 64
COMBINED_SPLITS = 16  # of a tile

# Rows are the queries of a group: up to 16, and more. Keys, warps and stages of the first as in the source of the
# forward pass's table for its decoding kernel; the rest by registers alone. Not measured on this kernel yet.
FEW = Blockings(
    {
        SM80: Blocking({128: Blocks(16, 64, 4, 3), 256: Blocks(16, 32, 4, 3)}, {256: Blocks(16, 16, 4, 2)}),
        GFX942: Blocking({256: Blocks(16, 64, 4, 1)}, {256: Blocks(16, 32, 4, 1)}),
        GFX1100: Blocking({128: Blocks(16, 32, 4, 1), 256: Blocks(16, 16, 8, 1)}, {256: Blocks(16, 16, 8, 1)}),
    }
)
MANY = Blockings(
    {
        SM80: Blocking({256: Blocks(64, 32, 8, 2)}, {256: Blocks(16, 16, 4, 1)}),
        GFX942: Blocking({256: Blocks(64, 32, 4, 1)}, {256: Blocks(64, 32, 4, 1)}),
        GFX1100: Blocking({256: Blocks(16, 16, 8, 1)}, {256: Blocks(16, 16, 8, 1)}),
    }
)


class Splits(NamedTuple):
    """How the keys of a grid are split, and the programs that follow from it."""

    splits: tl.tensor
    row_tiles: tl.tensor  # of a key head
    keys: tl.tensor  # of a split


class _Split(NamedTuple):
    """What a program works on."""

    split: tl.tensor
    first: tl.tensor  # row of its group
    b: tl.tensor
    kv_head: tl.tensor
    start: tl.tensor  # key
    end: tl.tensor


@triton.jit
def _split(program, splits, sizes, M: tl.constexpr):
    split, rest = program % splits.splits, program // splits.splits
    kv, heads = rest // splits.row_tiles, sizes.H // sizes.group
    end = tl.minimum(sizes.S, (split + 1) * splits.keys)
    return _Split(split, rest % splits.row_tiles * M, kv // heads, kv % heads, split * splits.keys, end)


class _Packed(NamedTuple):
    """Rows of a tile: the queries of all heads of a group."""

    h: tl.tensor
    query: tl.tensor
    there: tl.tensor
    index: tl.tensor  # in lse and in the dropout mask
    mask: tl.tensor  # where each begins in the mask


@triton.jit
def _packed(own, first, args, M: tl.constexpr):
    T = args.sizes.T
    packed = first + tl.arange(0, M)
    there = packed < args.sizes.group * T
    h = (own.kv_head * args.sizes.group + packed // T).to(tl.int64)
    query = tl.where(there, packed % T, T)
    mask = own.b * args.mask.batch + h * args.mask.head + query * args.mask.row
    return _Packed(h, query, there, (own.b * args.sizes.H + h) * T + query, mask)


@triton.jit
def _recompute(args, splits, partial_ptr, row_max_ptr, row_sum_ptr, config: tl.constexpr):
    """Compute those of a program's rows again that it stored as not finite."""
    ROWS: tl.constexpr = (
        RECOMPUTE_SINGLE_ROWS if args.q.ptr.dtype.element_ty == tl.float32 and not config.SINGLE else RECOMPUTE_ROWS
    )
    UNIT: tl.constexpr = 1.0 if config.NATURAL else LN2
    T = args.sizes.T
    own = _split(program_id_again(config.AMD), splits, args.sizes, config.M)
    tl.debug_barrier()  # what the program's other threads stored is read
    for part in range(own.first, tl.minimum(own.first + config.M, args.sizes.group * T), ROWS):
        rows = _packed(own, part, args, ROWS)
        place = rows.index * splits.splits + own.split
        row_sum, row_max, again = recompute_rows(
            args.q.ptr, own.b * args.q.batch + rows.h * args.q.head + rows.query * args.q.row,
            partial_ptr, place * config.DV, rows.there,
            at(args.k, own.b, own.kv_head, 0), at(args.v, own.b, own.kv_head, 0),
            MaskRows(args.mask.ptr, rows.mask, args.mask.column), Rows(rows.query, rows.index), own.start, own.end,
            SeqlenInfo(own.b, own.b, 0, 0, T, args.sizes.S), args.scoring, args.dropout, config,
        )  # fmt: skip
        tl.store(row_max_ptr + place, row_max * UNIT, again)
        tl.store(row_sum_ptr + place, row_sum, again)


@kernel(
    do_not_specialize=[
        "H", "T", "S", "group", "splits", "row_tiles", "split_keys", "scale", "softcap", "window_left", "window_right",
        "seed", "threshold", "dropout_scale",
    ]
)  # fmt: skip
def _attention_decode_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, Hkv, S, D)
    v_ptr,  # (B, Hkv, S, DV)
    mask_ptr,  # broadcast over (B, H, T, S) by strides, or None
    partial_ptr,  # (B, H, T, splits, DV) fp32
    row_max_ptr,  # (B, H, T, splits) fp32: largest scores, in natural units
    row_sum_ptr,  # (B, H, T, splits) fp32: sums of exponentials relative to them
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qt: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_ks: tl.int64,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vs: tl.int64,
    stride_mb: tl.int64,
    stride_mh: tl.int64,
    stride_mt: tl.int64,
    stride_ms: tl.int64,
    H,
    T,
    S,
    group,
    splits,
    row_tiles,
    split_keys,
    scale,
    softcap,
    window_left,
    window_right,
    seed: tl.int64,
    threshold: tl.uint32,
    dropout_scale,
    config: tl.constexpr,
):
    args = Args(
        View(q_ptr, stride_qb, stride_qh, stride_qt), View(k_ptr, stride_kb, stride_kh, stride_ks),
        View(v_ptr, stride_vb, stride_vh, stride_vs), Mask(mask_ptr, stride_mb, stride_mh, stride_mt, stride_ms),
        Packing(None, None), Sizes(1, H, T, S, group), Scoring(scale, softcap, Window(window_left, window_right)),
        Dropout(seed, threshold, dropout_scale),
    )  # fmt: skip
    grid = Splits(splits, row_tiles, split_keys)
    own = _split(tl.program_id(0), grid, args.sizes, config.M)
    rows = _packed(own, own.first, args, config.M)
    q = own.b * stride_qb + rows.h * stride_qh + rows.query * stride_qt
    q = signed(load_at(q_ptr, q, rows.there, config.D, config.BLOCK_D), scale)
    end = own.end
    if config.RIGHT:
        end = tl.minimum(end, T + window_right)
    acc, row_sum, row_max = mainloop(
        *online_softmax(config.M, config.BLOCK_DV), q,
        at(args.k, own.b, own.kv_head, 0), at(args.v, own.b, own.kv_head, 0),
        MaskRows(mask_ptr, rows.mask, stride_ms), Rows(rows.query, rows.index), own.start, end,
        SeqlenInfo(own.b, own.b, 0, 0, T, S), args.scoring, args.dropout, config, config.N, True,
    )  # fmt: skip
    UNIT: tl.constexpr = 1.0 if config.NATURAL else LN2
    out = epilogue(acc, row_sum)
    non_finite = has_non_finite(out) if mask_ptr is not None or config.LEFT or config.RIGHT else False
    place = rows.index * splits + own.split
    store_at(partial_ptr, out, place * config.DV, rows.there, config.DV, config.BLOCK_DV)
    tl.store(row_max_ptr + place, row_max * UNIT, rows.there)
    tl.store(row_sum_ptr + place, row_sum, rows.there)
    if non_finite:
        _recompute(args, grid, partial_ptr, row_max_ptr, row_sum_ptr, config)


@kernel(do_not_specialize=["H", "T", "splits"])
def _attention_combine_kernel(
    partial_ptr,  # (B, H, T, splits, DV) fp32
    row_max_ptr,  # (B, H, T, splits) fp32
    row_sum_ptr,  # (B, H, T, splits) fp32
    out_ptr,  # (B, T, H, DV)
    lse_ptr,  # (B, H, T) fp32 or None
    rest_ptr,  # the same: what rounding takes from lse
    H,
    T,
    splits,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out = sum of partial row_sum exp(row_max - lse) over the splits, in order."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    row_sum = 0.0
    row_max = float("-inf")
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        place = row * splits + split
        maxima = tl.load(row_max_ptr + place, split < splits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(maxima, 0))
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2((maxima - pivot) * LOG2E) * tl.load(row_sum_ptr + place, split < splits, 0.0)
        inside = (split < splits)[:, None] & (d < DV)[None, :]
        partial = tl.load(partial_ptr + place[:, None] * DV + d[None, :], inside, 0.0)
        alpha = tl.exp2((row_max - pivot) * LOG2E)
        row_sum = row_sum * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(partial * weight[:, None], 0)
        row_max = new_max
    acc = tl.where(row_sum != 0, acc / tl.where(row_sum != 0, row_sum, 1.0), 0.0)
    b, h, t = row // (H * T), row // T % H, row % T
    tl.store(out_ptr + ((b * T + t) * H + h) * DV + d, acc.to(out_ptr.dtype.element_ty), d < DV)
    store_lse(lse_ptr, rest_ptr, row_sum, row_max, row, None, True)


def splits_keys(size: Geometry) -> bool:
    """Whether the keys of a call are worth splitting."""
    return size.T <= MOST_QUERIES and size.S >= LEAST_KEYS


def launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    rest: Tensor | None,
    size: Geometry,
    options: tuple,
) -> None:
    """Write out (B, T, H, Dv), lse (B, H, T) and its rest."""
    _, scale, dropout_p, seed, _, _, softcap = options
    rows = size.group * size.T
    table = FEW if rows <= 16 else MANY
    arch = architecture(q.device)
    blocks = blocks_for(table, arch, q.dtype, max(size.head[2:]), False)
    split_keys = max(SPLIT_KEYS, triton.next_power_of_2(triton.cdiv(size.S, MOST_SPLITS)))
    splits, row_tiles = triton.cdiv(size.S, split_keys), triton.cdiv(rows, blocks.M)
    partial = q.new_empty(q.shape[0], size.H, size.T, splits, size.head[1], dtype=torch.float32)
    row_max, row_sum = (q.new_empty(partial.shape[:4], dtype=torch.float32) for _ in range(2))
    with on_device_of(q):
        _attention_decode_kernel[(splits * row_tiles * q.shape[0] * k.shape[1],)](
            q, k, v, mask, partial, row_max, row_sum, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *mask_strides(mask), *size[1:5], splits, row_tiles, split_keys, float(scale), softcap,
            size.window_left, size.window_right, *dropout_arguments(dropout_p, seed),
            compiled_for(size, blocks, mask, softcap, dropout_p, arch),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        _attention_combine_kernel[(q.shape[0] * size.H * size.T,)](
            partial, row_max, row_sum, out, lse, rest, size.H, size.T, splits, size.head[1], size.head[3],
            COMBINED_SPLITS, num_warps=2,
        )  # fmt: skip
