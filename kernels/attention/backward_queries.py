"""The pass of attention's backward that goes over the keys for each tile of queries: dq.

It also writes the gradient of a mask that broadcasts over nothing, which is the scores' own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlm._core.architecture import GFX942, GFX1100, SM80, SM90

from .._common import Dropout, dropout_factors, kernel
from .arguments import Args, Mask, Packing, Scoring, Sizes, View, Window, at
from .mask import MaskRows, scores
from .seqlen import (
    Schedule,
    n_block_range,
    phase_of,
    scheduled_tile,
    seqlen_info,
    store_limit,
)
from .softmax import Rows, Statistics, row_statistics, weighted, weights
from .tables import Blocking, Blockings, Blocks
from .tiles import (
    dot,
    finite,
    has_non_finite,
    load_rows,
    program_id_again,
    store_rows,
)

# M queries by N keys; see backward_keys.py.
QUERIES = Blockings(
    {
        SM80: Blocking(
            {64: Blocks(64, 64, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(64, 32, 8, 1)},
            {64: Blocks(32, 16, 8, 1), 128: Blocks(32, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {64: Blocks(64, 32, 8, 2), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
        ),
        SM90: Blocking(
            {64: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 32, 8, 2)},
            {64: Blocks(32, 16, 8, 1), 128: Blocks(32, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {64: Blocks(128, 32, 8, 2), 128: Blocks(128, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
            {128: Blocks(128, 16, 8, 2), 256: Blocks(32, 32, 8, 1)},
        ),
        GFX942: Blocking(
            {64: Blocks(64, 64, 4, 1), 256: Blocks(64, 32, 4, 1)},
            {128: Blocks(32, 32, 4, 1), 256: Blocks(32, 16, 4, 1)},
            {128: Blocks(64, 32, 4, 1), 256: Blocks(32, 32, 4, 1)},
        ),
        GFX1100: Blocking(
            {64: Blocks(64, 32, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {256: Blocks(16, 16, 8, 1)},
            {64: Blocks(32, 32, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {128: Blocks(32, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
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
    k_view,  # views of the sequence's keys and values
    v_view,
    mask,  # MaskRows of [M, 1]
    rows,  # Rows
    dmask_ptr,  # (B, H, T, S) or None
    start,
    end,
    seqlen,
    scoring,
    dropout,
    config: tl.constexpr,
    BOUNDS: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    """Add what the keys from `start` to `end` give; tiles are [queries, keys].

    RECOMPUTE: of keys the finite elements alone, since the weights of a row that attends to others are NaN.
    """
    CUT: tl.constexpr = BOUNDS or mask.ptr is not None
    STAGES: tl.constexpr = 1 if RECOMPUTE else None
    M: tl.constexpr = config.M
    N: tl.constexpr = config.N
    S = seqlen.seqlen_k
    for first in tl.range(start, end, N, num_stages=STAGES):
        first = tl.multiple_of(first, N)
        col = first + tl.arange(0, N)
        k = load_rows(k_view, col, S, config.D, config.BLOCK_D, BOUNDS)
        v = load_rows(v_view, col, S, config.DV, config.BLOCK_DV, BOUNDS)
        s, capped = scores(
            dot(q, tl.trans(k), tl.zeros((M, N), tl.float32)), rows.query[:, None], col[None, :],
            mask, seqlen, scoring, config, BOUNDS,
        )  # fmt: skip
        p = weights(s, lse[:, None], rest, mask.ptr, CUT, config.NATURAL)
        dp = dot(dout, tl.trans(v), tl.zeros((M, N), tl.float32))
        if config.DROPOUT:
            dp *= dropout_factors(rows.index, first, *dropout, N)
        ds = weighted(p, dp - delta[:, None], CUT)
        if dmask_ptr is not None:
            there = (rows.query < seqlen.seqlen_q)[:, None]
            if BOUNDS:
                there = there & (col < S)[None, :]
            store = dmask_ptr + rows.index[:, None] * S + col[None, :]
            tl.store(store, ds.to(dmask_ptr.dtype.element_ty), there)
        if config.SOFTCAP:
            ds = weighted(ds, 1 - capped * capped, CUT)
        if RECOMPUTE:
            k, _ = finite(k)
        dq = dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit
def _query_gradients(
    program, args, schedule, dout, statistics, dq_view, dmask_ptr, config: tl.constexpr, RECOMPUTE: tl.constexpr
):
    """Write dq of a program's queries, and tell whether it has to be recomputed."""
    M: tl.constexpr = config.M
    BLOCK_D: tl.constexpr = config.BLOCK_D
    tile, head = scheduled_tile(program, schedule, True)
    tile, h, seqlen = seqlen_info(tile, head, args.packing.cu_q, args.packing, args.sizes, args.sizes.H, M)
    T = seqlen.seqlen_q
    kv_head = h // args.sizes.group
    first = tile * M
    row = first + tl.arange(0, M)
    index = head.to(tl.int64) * args.sizes.T + seqlen.offset_q
    q = at(args.q, seqlen.batch, h, seqlen.offset_q)
    q = load_rows(q, row, T, config.D, BLOCK_D)
    dout = at(dout, seqlen.batch, h, seqlen.offset_q)
    dout = load_rows(dout, row, T, config.DV, config.BLOCK_DV)
    lse, rest, delta = row_statistics(statistics, index, row, T, config.NATURAL)
    if statistics.rest is not None:
        rest = rest[:, None]
    k = at(args.k, seqlen.batch, kv_head, seqlen.offset_k)
    v = at(args.v, seqlen.batch, kv_head, seqlen.offset_k)
    mask = MaskRows(args.mask.ptr, row.to(tl.int64)[:, None] * args.mask.row, args.mask.column)
    if args.mask.ptr is not None:
        mask_ptr = args.mask.ptr + seqlen.sequence * args.mask.batch + h * args.mask.head
        mask = MaskRows(mask_ptr, mask.row, mask.column)
    dq = tl.zeros((M, BLOCK_D), tl.float32)
    blocks = n_block_range(first, seqlen, args.scoring.window, config)
    for phase in tl.static_range(3):
        if phase == 1 or (not RECOMPUTE and (phase == 2 or config.LEFT)):
            start, end = phase_of(blocks, phase, RECOMPUTE)
            dq = _over_keys(
                dq, q, dout, lse, rest, delta, k, v, mask, Rows(row, index + row), dmask_ptr, start, end, seqlen,
                args.scoring, args.dropout, config, phase != 1 or RECOMPUTE, RECOMPUTE,
            )  # fmt: skip
    dq_view = at(dq_view, seqlen.batch, h, seqlen.offset_q)
    limit = store_limit(args.packing.cu_q, seqlen.sequence, args.sizes.B, T, args.sizes.T)
    store_rows(dq_view, dq * args.scoring.scale, row, limit, config.D, BLOCK_D)
    return has_non_finite(dq) if args.mask.ptr is not None or config.LEFT or config.RIGHT else False


@kernel(
    do_not_specialize=[
        "B", "H", "T", "S", "group", "tiles", "heads", "swizzle", "scale", "softcap", "window_left", "window_right",
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
    swizzle,
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
        Packing(cu_q_ptr, cu_k_ptr), Sizes(B, H, T, S, group),
        Scoring(scale, softcap, Window(window_left, window_right)), Dropout(seed, threshold, dropout_scale),
    )  # fmt: skip
    schedule = Schedule(tiles, heads, swizzle)
    dout = View(dout_ptr, stride_gb, stride_gh, stride_gt)
    statistics = Statistics(lse_ptr, rest_ptr, delta_ptr)
    dq = View(dq_ptr, stride_dqb, stride_dqh, stride_dqt)
    non_finite = _query_gradients(tl.program_id(0), args, schedule, dout, statistics, dq, dmask_ptr, config, False)
    if non_finite:
        _query_gradients(program_id_again(config.AMD), args, schedule, dout, statistics, dq, dmask_ptr, config, True)
