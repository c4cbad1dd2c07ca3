"""The pass of attention's backward that goes over the keys for each tile of queries: dq.

It also writes the gradient of a mask that broadcasts over nothing, which is the scores' own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import dropout_factors
from .attention_tables import Blocking, Blockings, Blocks
from .attention_tiles import (
    dot,
    finite,
    is_spoilt,
    load_rows,
    natural,
    owned,
    place,
    program_again,
    row_statistics,
    scores,
    span,
    store_rows,
    tile_and_head,
    weighted,
    weights,
)

# M queries by N keys; see attention_backward_keys.py.
QUERIES = Blockings(
    {
        80: Blocking(
            {64: Blocks(64, 64, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(64, 32, 8, 1)},
            {64: Blocks(32, 16, 8, 1), 128: Blocks(32, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {64: Blocks(64, 32, 8, 2), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
        ),
        90: Blocking(
            {64: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 32, 8, 2)},
            {64: Blocks(32, 16, 8, 1), 128: Blocks(32, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {64: Blocks(128, 32, 8, 2), 128: Blocks(128, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
            {128: Blocks(128, 16, 8, 2), 256: Blocks(32, 32, 8, 1)},
        ),
    }
)


@triton.jit
def _over_keys(
    dq,  # [M, BLOCK_D] fp32
    q,  # [M, BLOCK_D]
    dout,  # [M, BLOCK_DV]
    lse,  # [M], in the scores' units
    rest,  # [M, 1], or 0
    delta,  # [M]
    k_ptr,  # this and what follows at the tile's batch and head
    v_ptr,
    mask_ptr,
    dmask_ptr,  # (B, H, T, S) or None
    row,  # [M]
    numbered,  # [M] int64: the rows' numbers in the dropout mask
    start,
    end,
    stride_ks,
    stride_vs,
    stride_mt,
    stride_ms,
    T,
    S,
    scale,
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
    """Add what the keys from `start` to `end` give; tiles are [queries, keys].

    AGAIN: of keys the finite elements alone, since the weights of a row that attends to others are NaN.
    """
    CUT: tl.constexpr = BOUNDS or mask_ptr is not None
    STAGES: tl.constexpr = 1 if AGAIN else None
    M: tl.constexpr = q.shape[0]
    for first in tl.range(start, end, N, num_stages=STAGES):
        first = tl.multiple_of(first, N)
        col = first + tl.arange(0, N)
        k = load_rows(k_ptr, col, S, stride_ks, D, BLOCK_D, BOUNDS)
        v = load_rows(v_ptr, col, S, stride_vs, DV, BLOCK_DV, BOUNDS)
        s, capped = scores(
            dot(q, tl.trans(k), tl.zeros((M, N), tl.float32)), row[:, None], col[None, :],
            mask_ptr, row.to(tl.int64)[:, None] * stride_mt, stride_ms, T, S, scale, softcap,
            window_left, window_right, LEFT, RIGHT, SOFTCAP, BOUNDS,
        )  # fmt: skip
        p = weights(s, lse[:, None], rest, mask_ptr, CUT)
        dp = dot(dout, tl.trans(v), tl.zeros((M, N), tl.float32))
        if DROPOUT:
            dp *= dropout_factors(numbered, first, seed, threshold, dropout_scale, N)
        ds = weighted(p, dp - delta[:, None], CUT)
        if dmask_ptr is not None:
            there = (row < T)[:, None]
            if BOUNDS:
                there = there & (col < S)[None, :]
            store = dmask_ptr + numbered[:, None] * S + col[None, :]
            tl.store(store, ds.to(dmask_ptr.dtype.element_ty), there)
        if SOFTCAP:
            ds = weighted(ds, 1 - capped * capped, CUT)
        if AGAIN:
            k, _ = finite(k)
        dq = dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit
def _query_gradients(
    program, q_ptr, k_ptr, v_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, dout_ptr, lse_ptr, rest_ptr, delta_ptr, dq_ptr,
    dmask_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_mt, stride_ms, stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    B, H, T, S, group, tiles, heads, together, scale, softcap, window_left, window_right, seed, threshold,
    dropout_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """Write dq of a program's queries, and tell whether it has to be made again."""
    tile, head = tile_and_head(program, tiles, heads, together, True)
    all_rows = T
    tile, b, h, q_start, k_start, T, S = place(tile, head, cu_q_ptr, cu_q_ptr, cu_k_ptr, B, H, T, S, M)
    batch = b if cu_q_ptr is None else b * 0
    kv_head = h // group
    row = tile * M + tl.arange(0, M)
    first_numbered = head.to(tl.int64) * all_rows + q_start
    q = load_rows(q_ptr + batch * stride_qb + h * stride_qh + q_start * stride_qt, row, T, stride_qt, D, BLOCK_D)
    dout_ptr += batch * stride_gb + h * stride_gh + q_start * stride_gt
    dout = load_rows(dout_ptr, row, T, stride_gt, DV, BLOCK_DV)
    rests = rest_ptr
    if rest_ptr is not None:
        rests = rest_ptr + first_numbered
    lse, rest, delta = row_statistics(
        lse_ptr + first_numbered, rests, delta_ptr + first_numbered, row, T, natural(mask_ptr)
    )
    if rest_ptr is not None:
        rest = rest[:, None]
    k_ptr += batch * stride_kb + kv_head * stride_kh + k_start * stride_ks
    v_ptr += batch * stride_vb + kv_head * stride_vh + k_start * stride_vs
    mask = mask_ptr
    if mask_ptr is not None:
        mask = mask_ptr + b * stride_mb + h * stride_mh
    dq = tl.zeros((M, BLOCK_D), tl.float32)
    start, whole, whole_end, end = span(tile * M, S, window_left, window_right, M, N, LEFT, RIGHT, True)
    end = tl.where(tile * M < T, end, start)
    for phase in tl.static_range(3):
        if phase == 1 or (not AGAIN and (phase == 2 or LEFT)):
            dq = _over_keys(
                dq, q, dout, lse, rest, delta, k_ptr, v_ptr, mask, dmask_ptr, row, first_numbered + row,
                start if phase == 0 or AGAIN else whole if phase == 1 else whole_end,
                tl.minimum(end, whole if phase == 0 else whole_end if phase == 1 and not AGAIN else end),
                stride_ks, stride_vs, stride_mt, stride_ms, T, S, scale, softcap, window_left, window_right,
                seed, threshold, dropout_scale, D, DV, BLOCK_D, BLOCK_DV, N, LEFT, RIGHT, SOFTCAP, DROPOUT,
                phase != 1 or AGAIN, AGAIN,
            )  # fmt: skip
    dq_ptr += batch * stride_dqb + h * stride_dqh + q_start * stride_dqt
    limit = owned(cu_q_ptr, b, B, T, all_rows)
    store_rows(dq_ptr, dq * scale, row, limit, stride_dqt, D, BLOCK_D)
    return is_spoilt(dq) if mask_ptr is not None or LEFT or RIGHT else False


@triton.jit(
    do_not_specialize=[
        "B", "H", "T", "S", "group", "tiles", "heads", "together", "scale", "softcap", "window_left", "window_right",
        "seed", "threshold", "dropout_scale",
    ]
)  # fmt: skip
def attention_bwd_queries_kernel(
    q_ptr,  # (B, H, T, D), or packed: (1, H, Tq, D)
    k_ptr,  # (B, Hkv, S, D)
    v_ptr,  # (B, Hkv, S, DV)
    mask_ptr,  # broadcast over (B, H, T, S) by strides, or None
    cu_q_ptr,  # (B + 1) int32 where sequences are packed, or None
    cu_k_ptr,
    dout_ptr,  # (B, H, T, DV)
    lse_ptr,  # (B, H, T) fp32
    rest_ptr,  # the same, or None
    delta_ptr,  # (B, H, T) fp32
    dq_ptr,  # like q
    dmask_ptr,  # (B, H, T, S) where the mask has that shape and needs its gradient; else None
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
    stride_gb: tl.int64,
    stride_gh: tl.int64,
    stride_gt: tl.int64,
    stride_dqb: tl.int64,
    stride_dqh: tl.int64,
    stride_dqt: tl.int64,
    B,
    H,
    T,
    S,
    group,
    tiles,
    heads,
    together,
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
    spoilt = _query_gradients(
        tl.program_id(0), q_ptr, k_ptr, v_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, dout_ptr, lse_ptr, rest_ptr, delta_ptr,
        dq_ptr, dmask_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh,
        stride_vs, stride_mb, stride_mh, stride_mt, stride_ms, stride_gb, stride_gh, stride_gt, stride_dqb,
        stride_dqh, stride_dqt, B, H, T, S, group, tiles, heads, together, scale, softcap, window_left, window_right,
        seed, threshold, dropout_scale, D, DV, BLOCK_D, BLOCK_DV, M, N, LEFT, RIGHT, SOFTCAP, DROPOUT, False,
    )  # fmt: skip
    if spoilt:
        _query_gradients(
            program_again(), q_ptr, k_ptr, v_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, dout_ptr, lse_ptr, rest_ptr, delta_ptr,
            dq_ptr, dmask_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh,
            stride_vs, stride_mb, stride_mh, stride_mt, stride_ms, stride_gb, stride_gh, stride_gt, stride_dqb,
            stride_dqh, stride_dqt, B, H, T, S, group, tiles, heads, together, scale, softcap, window_left,
            window_right, seed, threshold, dropout_scale, D, DV, BLOCK_D, BLOCK_DV, M, N, LEFT, RIGHT, SOFTCAP,
            DROPOUT, True,
        )  # fmt: skip
