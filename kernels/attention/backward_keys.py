"""The pass of attention's backward that goes over the queries for each tile of keys: dk and dv."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlm._core.architecture import GFX942, GFX1100, SM80, SM90, SM100

from .._common import Dropout, dropout_factors, kernel
from .arguments import Args, Mask, Packing, Scoring, Sizes, View, Window, at
from .mask import MaskRows, scores
from .seqlen import (
    Schedule,
    m_block_range,
    phase_of,
    scheduled_tile,
    seqlen_info,
    store_limit,
)
from .softmax import Statistics, row_statistics, weighted, weights
from .tables import Blocking, Blockings, Blocks
from .tiles import (
    RECOMPUTE_KEYS,
    RECOMPUTE_ROWS,
    RECOMPUTE_SINGLE_ROWS,
    dot,
    finite,
    has_non_finite,
    load_rows,
    program_id_again,
    store_rows,
)

# M queries by N keys: of the pass over queries, and of the pass over keys. From the same source as the forward pass's
# table where that does not spill (Hopper to head size 64 and the pass over keys to 128), else by registers alone: the
# largest that do not spill. Nothing here has been measured yet.
KEYS = Blockings(
    {
        SM80: Blocking(
            {64: Blocks(64, 64, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 1)},
            {64: Blocks(32, 32, 8, 1), 128: Blocks(16, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {64: Blocks(32, 32, 8, 2), 128: Blocks(32, 32, 8, 1), 256: Blocks(16, 32, 8, 1)},
        ),
        SM90: Blocking(
            {64: Blocks(64, 128, 8, 3), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 1)},
            {64: Blocks(32, 32, 8, 1), 128: Blocks(16, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {64: Blocks(32, 64, 8, 2), 128: Blocks(32, 64, 8, 2), 256: Blocks(16, 32, 8, 1)},
        ),
        SM100: Blocking(
            {64: Blocks(64, 128, 8, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(32, 32, 8, 1)},
            {64: Blocks(32, 32, 8, 1), 128: Blocks(16, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {64: Blocks(32, 64, 4, 2), 128: Blocks(32, 64, 8, 2), 256: Blocks(16, 32, 8, 1)},
        ),
        GFX942: Blocking(
            {64: Blocks(64, 64, 4, 1), 128: Blocks(32, 64, 4, 1), 256: Blocks(32, 32, 4, 1)},
            {64: Blocks(32, 32, 4, 1), 256: Blocks(16, 32, 4, 1)},
            {128: Blocks(32, 32, 4, 1), 256: Blocks(16, 32, 4, 1)},
        ),
        GFX1100: Blocking(
            {64: Blocks(32, 32, 8, 1), 128: Blocks(16, 32, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {256: Blocks(16, 16, 8, 1)},
            {256: Blocks(16, 16, 8, 1)},
        ),
    }
)


@triton.jit
def _over_queries(
    dk,  # [N, BLOCK_D] fp32
    dv,  # [N, BLOCK_DV] fp32
    k,  # [N, BLOCK_D]
    v,  # [N, BLOCK_DV]
    q,  # views from the sequence and first query head on
    dout,
    mask,  # of the sequence and first query head
    index,  # of its first row, in lse and in the dropout mask
    first_key,
    start,
    end,
    seqlen,
    args,
    statistics,
    config: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BOUNDS: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    """Add what the queries from `start` to `end` of each head of the group give; tiles are [keys, queries].

    RECOMPUTE: what is not finite reaches only the keys that it attends to, as NaN; with BOUNDS. Of q it need not: a
    row's own weights are NaN where it attends to anything.
    """
    CUT: tl.constexpr = BOUNDS or mask.ptr is not None
    STAGES: tl.constexpr = 1 if RECOMPUTE else None
    T = seqlen.seqlen_q
    col = first_key + tl.arange(0, N)
    count = tl.maximum(tl.cdiv(end - start, M), 0)
    # One loop, since registers spill in a loop inside a loop over heads.
    for i in tl.range(0, args.sizes.group * count, num_stages=STAGES):
        h = (i // count).to(tl.int64)
        row = start + i % count * M + tl.arange(0, M)
        queries = load_rows(at(q, 0, h, 0), row, T, config.D, config.BLOCK_D)
        if RECOMPUTE:
            queries, _ = finite(queries)
        head_index = index + h * args.sizes.T
        lse, rest, delta = row_statistics(statistics, head_index, row, T, config.NATURAL)
        if statistics.rest is not None:
            rest = rest[None, :]
        mask_ptr = mask.ptr
        if mask_ptr is not None:
            mask_ptr = mask_ptr + h * mask.head
        s, capped = scores(
            dot(k, tl.trans(queries), tl.zeros((N, M), tl.float32)), row[None, :], col[:, None],
            MaskRows(mask_ptr, row.to(tl.int64)[None, :] * mask.row, mask.column),
            seqlen, args.scoring, config, BOUNDS,
        )  # fmt: skip
        if RECOMPUTE:
            s = tl.where(row[None, :] < T, s, float("-inf"))  # a NaN key's score would not be, beyond the last query
        p = weights(s, lse[None, :], rest, mask_ptr, CUT, config.NATURAL)
        gradients = load_rows(at(dout, 0, h, 0), row, T, config.DV, config.BLOCK_DV)
        dp = dot(v, tl.trans(gradients), tl.zeros((N, M), tl.float32))
        if RECOMPUTE:
            gradients, not_finite = finite(gradients)
            reached = dot(tl.where(p != 0, 1.0, 0.0).to(gradients.dtype), not_finite, tl.zeros_like(dv))
            dv = tl.where(reached != 0, float("nan"), dv)
        if config.DROPOUT:
            factors = tl.trans(dropout_factors(head_index + row, first_key, *args.dropout, N))
            dv = dot((p * factors).to(gradients.dtype), gradients, dv)
            dp *= factors
        else:
            dv = dot(p.to(gradients.dtype), gradients, dv)
        ds = weighted(p, dp - delta[None, :], CUT)
        if config.SOFTCAP:
            ds = weighted(ds, 1 - capped * capped, CUT)
        dk = dot(ds.to(queries.dtype), queries, dk)
    return dk, dv


@triton.jit
def _key_gradients(
    program,
    part,
    args,
    schedule,
    dout,
    statistics,
    dk_view,
    dv_view,
    config: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    """Write dk and dv of KEYS of a program's keys, from `part` on, and tell whether they have to be recomputed."""
    BLOCK_D: tl.constexpr = config.BLOCK_D
    BLOCK_DV: tl.constexpr = config.BLOCK_DV
    H, group = args.sizes.H, args.sizes.group
    # under a causal mask the first keys have the most queries
    tile, head = scheduled_tile(program, schedule, False)
    tile, kv_head, seqlen = seqlen_info(tile, head, args.packing.cu_k, args.packing, args.sizes, H // group, config.N)
    first = tile * config.N + part
    key = first + tl.arange(0, KEYS)
    k = at(args.k, seqlen.batch, kv_head, seqlen.offset_k)
    k = load_rows(k, key, seqlen.seqlen_k, config.D, BLOCK_D)
    v = at(args.v, seqlen.batch, kv_head, seqlen.offset_k)
    v = load_rows(v, key, seqlen.seqlen_k, config.DV, BLOCK_DV)
    dk = tl.zeros((KEYS, BLOCK_D), tl.float32)
    dv = tl.zeros((KEYS, BLOCK_DV), tl.float32)
    blocks = m_block_range(first, seqlen, args.scoring.window, config, QUERIES, KEYS)
    h = kv_head * group
    q = at(args.q, seqlen.batch, h, seqlen.offset_q)
    dout = at(dout, seqlen.batch, h, seqlen.offset_q)
    index = (seqlen.batch * H + h).to(tl.int64) * args.sizes.T + seqlen.offset_q
    mask = args.mask
    if mask.ptr is not None:
        mask_ptr = mask.ptr + seqlen.sequence * mask.batch + h * mask.head
        mask = Mask(mask_ptr, mask.batch, mask.head, mask.row, mask.column)
    for phase in tl.static_range(3):
        if phase == 1 or (not RECOMPUTE and (config.RIGHT if phase == 0 else config.LEFT)):
            start, end = phase_of(blocks, phase, RECOMPUTE)
            dk, dv = _over_queries(
                dk, dv, k, v, q, dout, mask, index, first, start, end, seqlen, args, statistics, config,
                QUERIES, KEYS, phase != 1 or RECOMPUTE, RECOMPUTE,
            )  # fmt: skip
    limit = store_limit(args.packing.cu_k, seqlen.sequence, args.sizes.B, seqlen.seqlen_k, args.sizes.S)
    dk_view = at(dk_view, seqlen.batch, kv_head, seqlen.offset_k)
    store_rows(dk_view, dk * args.scoring.scale, key, limit, config.D, BLOCK_D)
    dv_view = at(dv_view, seqlen.batch, kv_head, seqlen.offset_k)
    store_rows(dv_view, dv, key, limit, config.DV, BLOCK_DV)
    if args.mask.ptr is not None or config.LEFT or config.RIGHT:
        return has_non_finite(dk) | has_non_finite(dv)
    else:
        return False


@kernel(
    do_not_specialize=[
        "B", "H", "T", "S", "group", "tiles", "heads", "swizzle", "scale", "softcap", "window_left", "window_right",
        "seed", "threshold", "dropout_scale",
    ]
)  # fmt: skip
def attention_bwd_keys_kernel(
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
    dk_ptr,  # like k
    dv_ptr,  # like v
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
    stride_dkb: tl.int64,
    stride_dkh: tl.int64,
    stride_dks: tl.int64,
    stride_dvb: tl.int64,
    stride_dvh: tl.int64,
    stride_dvs: tl.int64,
    B,
    H,
    T,
    S,
    group,
    tiles,
    heads,  # of keys, in all batches
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
    dk = View(dk_ptr, stride_dkb, stride_dkh, stride_dks)
    dv = View(dv_ptr, stride_dvb, stride_dvh, stride_dvs)
    non_finite = _key_gradients(
        tl.program_id(0), 0, args, schedule, dout, statistics, dk, dv, config, config.N, config.M, False
    )
    if non_finite:
        PART: tl.constexpr = (
            RECOMPUTE_SINGLE_ROWS if q_ptr.dtype.element_ty == tl.float32 and not config.SINGLE else RECOMPUTE_ROWS
        )
        for part in range(0, config.N, PART):
            _key_gradients(
                program_id_again(config.AMD), part, args, schedule, dout, statistics, dk, dv, config, PART,
                RECOMPUTE_KEYS, True,
            )  # fmt: skip
