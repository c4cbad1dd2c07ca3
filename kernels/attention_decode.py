"""Attention of a few queries over a long cache: the keys are split over programs, and their results combined in order.

One program reads a split of the keys of one key head for all the queries that use them: the rows of its tile are the
queries of all heads of the group. It writes the attention over its own keys, their largest score and the sum relative
to it; a second kernel weighs the splits. How keys are split depends on their number alone, so a row's bits do not
depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, dropout_arguments, on_device_of
from .attention_tables import (
    Blocking,
    Blockings,
    Blocks,
    Geometry,
    blocks_for,
    broadcast_strides,
)
from .attention_tiles import (
    AGAIN_ROWS,
    AGAIN_SINGLE_ROWS,
    LN2,
    LOG2E,
    attend,
    attend_again,
    is_spoilt,
    load_at,
    natural,
    normalized,
    program_again,
    store_at,
    store_lse,
)

MOST_QUERIES, LEAST_KEYS = 16, 256  # what is worth splitting
SPLIT_KEYS, MOST_SPLITS = 256, 64
COMBINED_SPLITS = 16  # of a tile

# Rows are the queries of a group: up to 16, and more. Keys, warps and stages of the first as in the source of the
# forward pass's table for its decoding kernel; the rest by registers alone. Not measured on this kernel yet.
FEW = Blockings(
    {
        80: Blocking({128: Blocks(16, 64, 4, 3), 256: Blocks(16, 32, 4, 3)}, {256: Blocks(16, 16, 4, 2)}),
    }
)
MANY = Blockings(
    {
        80: Blocking({256: Blocks(64, 32, 8, 2)}, {256: Blocks(16, 16, 4, 1)}),
    }
)


@triton.jit
def _split(program, splits, row_tiles, H, group, M: tl.constexpr):
    """A program's (split of the keys, first row, batch, key head)."""
    split, rest = program % splits, program // splits
    kv, heads = rest // row_tiles, H // group
    return split, rest % row_tiles * M, kv // heads, kv % heads


@triton.jit
def _rows(first, b, kv_head, group, stride_mb, stride_mh, stride_mt, H, T, M: tl.constexpr):
    """Rows from `first` on, of all heads of a group: (h, query, whether it is there, its mask's begin, its number)."""
    packed = first + tl.arange(0, M)
    there = packed < group * T
    h = (kv_head * group + packed // T).to(tl.int64)
    row = tl.where(there, packed % T, T)
    return h, row, there, b * stride_mb + h * stride_mh + row * stride_mt, (b * H + h) * T + row


@triton.jit(
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
    peaks_ptr,  # (B, H, T, splits) fp32: largest scores, in natural units
    totals_ptr,  # (B, H, T, splits) fp32: sums of exponentials relative to them
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
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    split, first, b, kv_head = _split(tl.program_id(0), splits, row_tiles, H, group, M)
    h, row, there, mask_row, numbered = _rows(first, b, kv_head, group, stride_mb, stride_mh, stride_mt, H, T, M)
    q = load_at(q_ptr, b * stride_qb + h * stride_qh + row * stride_qt, there, D, BLOCK_D)
    q = (q.to(tl.float32) * tl.where(scale < 0, -1.0, 1.0)).to(q.dtype)
    end = tl.minimum(S, (split + 1) * split_keys)
    if RIGHT:
        end = tl.minimum(end, T + window_right)
    acc, total, peak = attend(
        tl.zeros((M, BLOCK_DV), tl.float32), tl.zeros((M,), tl.float32), tl.full((M,), float("-inf"), tl.float32),
        q, k_ptr + b * stride_kb + kv_head * stride_kh, v_ptr + b * stride_vb + kv_head * stride_vh,
        mask_ptr, row, mask_row, numbered, split * split_keys, end, stride_ks, stride_vs, stride_ms,
        T, S, tl.abs(scale), softcap, window_left, window_right, seed, threshold, dropout_scale,
        D, DV, BLOCK_D, BLOCK_DV, N, LEFT, RIGHT, SOFTCAP, DROPOUT, True,
    )  # fmt: skip
    UNIT: tl.constexpr = 1.0 if natural(mask_ptr) else LN2
    out = normalized(acc, total)
    spoilt = is_spoilt(out) if mask_ptr is not None or LEFT or RIGHT else False
    place = numbered * splits + split
    store_at(partial_ptr, out, place * DV, there, DV, BLOCK_DV)
    tl.store(peaks_ptr + place, peak * UNIT, there)
    tl.store(totals_ptr + place, total, there)
    if spoilt:
        ROWS: tl.constexpr = AGAIN_SINGLE_ROWS if q_ptr.dtype.element_ty == tl.float32 else AGAIN_ROWS
        split, first, b, kv_head = _split(program_again(), splits, row_tiles, H, group, M)
        end = tl.minimum(S, (split + 1) * split_keys)
        tl.debug_barrier()  # what the program's other threads stored is read
        for part in range(first, tl.minimum(first + M, group * T), ROWS):
            own_h, own, own_there, own_mask, own_number = _rows(
                part, b, kv_head, group, stride_mb, stride_mh, stride_mt, H, T, ROWS
            )
            own_place = own_number * splits + split
            own_total, own_peak, again = attend_again(
                q_ptr, b * stride_qb + own_h * stride_qh + own * stride_qt, partial_ptr, own_place * DV, own_there,
                k_ptr + b * stride_kb + kv_head * stride_kh, v_ptr + b * stride_vb + kv_head * stride_vh,
                mask_ptr, own, own_mask, own_number, split * split_keys, end, stride_ks, stride_vs, stride_ms,
                T, S, scale, softcap, window_left, window_right, seed, threshold, dropout_scale,
                D, DV, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP, DROPOUT,
            )  # fmt: skip
            tl.store(peaks_ptr + own_place, own_peak * UNIT, again)
            tl.store(totals_ptr + own_place, own_total, again)


@triton.jit(do_not_specialize=["H", "T", "splits"])
def _attention_combine_kernel(
    partial_ptr,  # (B, H, T, splits, DV) fp32
    peaks_ptr,  # (B, H, T, splits) fp32
    totals_ptr,  # (B, H, T, splits) fp32
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
    """out = sum of partial totals exp(peaks - lse) over the splits, in order."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    total = 0.0
    peak = float("-inf")
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        place = row * splits + split
        peaks = tl.load(peaks_ptr + place, split < splits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2((peaks - pivot) * LOG2E) * tl.load(totals_ptr + place, split < splits, 0.0)
        inside = (split < splits)[:, None] & (d < DV)[None, :]
        partial = tl.load(partial_ptr + place[:, None] * DV + d[None, :], inside, 0.0)
        alpha = tl.exp2((peak - pivot) * LOG2E)
        total = total * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(partial * weight[:, None], 0)
        peak = new_peak
    acc = tl.where(total != 0, acc / tl.where(total != 0, total, 1.0), 0.0)
    b, h, t = row // (H * T), row // T % H, row % T
    tl.store(out_ptr + ((b * T + t) * H + h) * DV + d, acc.to(out_ptr.dtype.element_ty), d < DV)
    store_lse(lse_ptr, rest_ptr, total, peak, row, None, True)


def splits_keys(size: Geometry) -> bool:
    """Whether the keys of a call are worth splitting."""
    return size.T <= MOST_QUERIES and size.S >= LEAST_KEYS


def decode(
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
    blocks = blocks_for(table, architecture(q.device), q.dtype, max(size.head[2:]), False)
    split_keys = max(SPLIT_KEYS, triton.next_power_of_2(triton.cdiv(size.S, MOST_SPLITS)))
    splits, row_tiles = triton.cdiv(size.S, split_keys), triton.cdiv(rows, blocks.M)
    partial = q.new_empty(q.shape[0], size.H, size.T, splits, size.head[1], dtype=torch.float32)
    peaks, totals = (q.new_empty(partial.shape[:4], dtype=torch.float32) for _ in range(2))
    strides = (0, 0, 0, 0) if mask is None else broadcast_strides(mask)
    with on_device_of(q):
        _attention_decode_kernel[(splits * row_tiles * q.shape[0] * k.shape[1],)](
            q, k, v, mask, partial, peaks, totals, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides,
            *size[1:5], splits, row_tiles, split_keys, float(scale), softcap, size.window_left, size.window_right,
            *dropout_arguments(dropout_p, seed), *size.head, blocks.M, blocks.N, *size.features, softcap > 0,
            dropout_p > 0, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        _attention_combine_kernel[(q.shape[0] * size.H * size.T,)](
            partial, peaks, totals, out, lse, rest, size.H, size.T, splits, size.head[1], size.head[3],
            COMBINED_SPLITS, num_warps=2,
        )  # fmt: skip
