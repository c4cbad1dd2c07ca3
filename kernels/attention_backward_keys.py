"""The pass of attention's backward that goes over the queries for each tile of keys: dk and dv."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import dropout_factors
from .attention_tables import Blocking, Blockings, Blocks
from .attention_tiles import (
    AGAIN_KEYS,
    AGAIN_ROWS,
    AGAIN_SINGLE_ROWS,
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

# M queries by N keys: of the pass over queries, and of the pass over keys. From the same source as the forward pass's
# table where that does not spill (Hopper to head size 64 and the pass over keys to 128), else by registers alone: the
# largest that do not spill. Nothing here has been measured yet.
KEYS = Blockings(
    {
        80: Blocking(
            {64: Blocks(64, 64, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 1)},
            {64: Blocks(32, 32, 8, 1), 128: Blocks(16, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {64: Blocks(32, 32, 8, 2), 128: Blocks(32, 32, 8, 1), 256: Blocks(16, 32, 8, 1)},
        ),
        90: Blocking(
            {64: Blocks(64, 128, 8, 3), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 1)},
            {64: Blocks(32, 32, 8, 1), 128: Blocks(16, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {64: Blocks(32, 64, 8, 2), 128: Blocks(32, 64, 8, 2), 256: Blocks(16, 32, 8, 1)},
        ),
        100: Blocking(
            {64: Blocks(64, 128, 8, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(32, 32, 8, 1)},
            {64: Blocks(32, 32, 8, 1), 128: Blocks(16, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {64: Blocks(32, 64, 4, 2), 128: Blocks(32, 64, 8, 2), 256: Blocks(16, 32, 8, 1)},
        ),
    }
)


@triton.jit
def _over_queries(
    dk,  # [N, BLOCK_D] fp32
    dv,  # [N, BLOCK_DV] fp32
    k,  # [N, BLOCK_D]
    v,  # [N, BLOCK_DV]
    q_ptr,  # this and what follows at the tile's batch and first query head
    dout_ptr,
    lse_ptr,
    rest_ptr,
    delta_ptr,
    mask_ptr,
    first_numbered,  # number of the first head's first row in the dropout mask
    first_key,
    start,
    end,
    group,
    all_rows,  # of a head in lse and delta
    stride_qh,
    stride_qt,
    stride_gh,
    stride_gt,
    stride_mh,
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
    M: tl.constexpr,
    N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    BOUNDS: tl.constexpr,
    AGAIN: tl.constexpr = False,
):
    """Add what the queries from `start` to `end` of each head of the group give; tiles are [keys, queries].

    AGAIN: what is not finite reaches only the keys that it attends to, as NaN; with BOUNDS. Of q it need not: a row's
    own weights are NaN where it attends to anything.
    """
    CUT: tl.constexpr = BOUNDS or mask_ptr is not None
    STAGES: tl.constexpr = 1 if AGAIN else None
    col = first_key + tl.arange(0, N)
    count = tl.maximum(tl.cdiv(end - start, M), 0)
    # One loop, since registers spill in a loop inside a loop over heads.
    for i in tl.range(0, group * count, num_stages=STAGES):
        h = (i // count).to(tl.int64)
        row = start + i % count * M + tl.arange(0, M)
        q = load_rows(q_ptr + h * stride_qh, row, T, stride_qt, D, BLOCK_D)
        if AGAIN:
            q, _ = finite(q)
        rests = rest_ptr
        if rest_ptr is not None:
            rests = rest_ptr + h * all_rows
        lse, rest, delta = row_statistics(
            lse_ptr + h * all_rows, rests, delta_ptr + h * all_rows, row, T, natural(mask_ptr)
        )
        if rest_ptr is not None:
            rest = rest[None, :]
        mask = mask_ptr
        if mask_ptr is not None:
            mask = mask_ptr + h * stride_mh
        s, capped = scores(
            dot(k, tl.trans(q), tl.zeros((N, M), tl.float32)), row[None, :], col[:, None],
            mask, row.to(tl.int64)[None, :] * stride_mt, stride_ms, T, S, scale, softcap,
            window_left, window_right, LEFT, RIGHT, SOFTCAP, BOUNDS,
        )  # fmt: skip
        if AGAIN:
            s = tl.where(row[None, :] < T, s, float("-inf"))  # a NaN key's score would not be, beyond the last query
        p = weights(s, lse[None, :], rest, mask_ptr, CUT)
        dout = load_rows(dout_ptr + h * stride_gh, row, T, stride_gt, DV, BLOCK_DV)
        dp = dot(v, tl.trans(dout), tl.zeros((N, M), tl.float32))
        if AGAIN:
            dout, not_finite = finite(dout)
            reached = dot(tl.where(p != 0, 1.0, 0.0).to(dout.dtype), not_finite, tl.zeros_like(dv))
            dv = tl.where(reached != 0, float("nan"), dv)
        if DROPOUT:
            numbered = first_numbered + h * all_rows + row
            factors = tl.trans(dropout_factors(numbered, first_key, seed, threshold, dropout_scale, N))
            dv = dot((p * factors).to(dout.dtype), dout, dv)
            dp *= factors
        else:
            dv = dot(p.to(dout.dtype), dout, dv)
        ds = weighted(p, dp - delta[None, :], CUT)
        if SOFTCAP:
            ds = weighted(ds, 1 - capped * capped, CUT)
        dk = dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def _key_gradients(
    program, part, q_ptr, k_ptr, v_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, dout_ptr, lse_ptr, rest_ptr, delta_ptr, dk_ptr,
    dv_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_mt, stride_ms, stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dks,
    stride_dvb, stride_dvh, stride_dvs, B, H, T, S, group, tiles, heads, together, scale, softcap, window_left,
    window_right, seed, threshold, dropout_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of KEYS of a program's keys, from `part` on, and tell whether they have to be made again."""
    # under a causal mask the first keys have the most queries
    tile, head = tile_and_head(program, tiles, heads, together, False)
    all_rows, all_keys = T, S
    tile, b, kv_head, q_start, k_start, T, S = place(tile, head, cu_k_ptr, cu_q_ptr, cu_k_ptr, B, H // group, T, S, N)
    batch = b if cu_q_ptr is None else b * 0
    first = tile * N + part
    key = first + tl.arange(0, KEYS)
    k_ptr += batch * stride_kb + kv_head * stride_kh + k_start * stride_ks
    k = load_rows(k_ptr, key, S, stride_ks, D, BLOCK_D)
    v_ptr += batch * stride_vb + kv_head * stride_vh + k_start * stride_vs
    v = load_rows(v_ptr, key, S, stride_vs, DV, BLOCK_DV)
    dk = tl.zeros((KEYS, BLOCK_D), tl.float32)
    dv = tl.zeros((KEYS, BLOCK_DV), tl.float32)
    start, whole, whole_end, end = span(first, T, window_right, window_left, KEYS, QUERIES, RIGHT, LEFT, False)
    end = tl.where(first < S, end, start)
    h = kv_head * group
    q_ptr += batch * stride_qb + h * stride_qh + q_start * stride_qt
    dout_ptr += batch * stride_gb + h * stride_gh + q_start * stride_gt
    numbered = (batch * H + h).to(tl.int64) * all_rows + q_start
    mask = mask_ptr
    if mask_ptr is not None:
        mask = mask_ptr + b * stride_mb + h * stride_mh
    rests = rest_ptr
    if rest_ptr is not None:
        rests = rest_ptr + numbered
    for phase in tl.static_range(3):
        if phase == 1 or (not AGAIN and (RIGHT if phase == 0 else LEFT)):
            dk, dv = _over_queries(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr + numbered, rests, delta_ptr + numbered, mask, numbered,
                first,
                start if phase == 0 or AGAIN else whole if phase == 1 else whole_end,
                tl.minimum(end, whole if phase == 0 else whole_end if phase == 1 and not AGAIN else end),
                group, all_rows, stride_qh, stride_qt, stride_gh, stride_gt, stride_mh, stride_mt, stride_ms,
                T, S, scale, softcap, window_left, window_right, seed, threshold, dropout_scale,
                D, DV, BLOCK_D, BLOCK_DV, QUERIES, KEYS, LEFT, RIGHT, SOFTCAP, DROPOUT, phase != 1 or AGAIN, AGAIN,
            )  # fmt: skip
    limit = owned(cu_k_ptr, b, B, S, all_keys)
    dk_ptr += batch * stride_dkb + kv_head * stride_dkh + k_start * stride_dks
    store_rows(dk_ptr, dk * scale, key, limit, stride_dks, D, BLOCK_D)
    dv_ptr += batch * stride_dvb + kv_head * stride_dvh + k_start * stride_dvs
    store_rows(dv_ptr, dv, key, limit, stride_dvs, DV, BLOCK_DV)
    return is_spoilt(dk) | is_spoilt(dv) if mask_ptr is not None or LEFT or RIGHT else False


@triton.jit(
    do_not_specialize=[
        "B", "H", "T", "S", "group", "tiles", "heads", "together", "scale", "softcap", "window_left", "window_right",
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
    spoilt = _key_gradients(
        tl.program_id(0), 0, q_ptr, k_ptr, v_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, dout_ptr, lse_ptr, rest_ptr, delta_ptr,
        dk_ptr, dv_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh,
        stride_vs, stride_mb, stride_mh, stride_mt, stride_ms, stride_gb, stride_gh, stride_gt, stride_dkb,
        stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, B, H, T, S, group, tiles, heads, together, scale,
        softcap, window_left, window_right, seed, threshold, dropout_scale, D, DV, BLOCK_D, BLOCK_DV, M, N, LEFT,
        RIGHT, SOFTCAP, DROPOUT, N, M, False,
    )  # fmt: skip
    if spoilt:
        PART: tl.constexpr = AGAIN_SINGLE_ROWS if q_ptr.dtype.element_ty == tl.float32 else AGAIN_ROWS
        for part in range(0, N, PART):
            _key_gradients(
                program_again(), part, q_ptr, k_ptr, v_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, dout_ptr, lse_ptr, rest_ptr,
                delta_ptr, dk_ptr, dv_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
                stride_vb, stride_vh, stride_vs, stride_mb, stride_mh, stride_mt, stride_ms, stride_gb, stride_gh,
                stride_gt, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, B, H, T, S, group,
                tiles, heads, together, scale, softcap, window_left, window_right, seed, threshold, dropout_scale, D,
                DV, BLOCK_D, BLOCK_DV, M, N, LEFT, RIGHT, SOFTCAP, DROPOUT, PART, AGAIN_KEYS, True,
            )  # fmt: skip
