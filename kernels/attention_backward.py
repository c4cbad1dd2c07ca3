"""Gradients of attention, without atomics: each is summed by the one program that writes it.

With weights p_ij = exp(s_ij - lse_i), their dropout factors f_ij and delta_i = dout_i . out_i - dlse_i:
  dv_j = sum_i f_ij p_ij dout_i,   ds_ij = p_ij (f_ij dout_i . v_j - delta_i),
  dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i   (a softcap c multiplies ds by 1 - (s / c)^2).
A first kernel makes delta. One pass goes over the queries for each tile of keys (dk, dv), another over the keys for
each tile of queries (dq): the scores are made twice, and nothing is added across programs. The query heads that share
a key head are summed inside its program in order: partial sums would write and read two fp32 matrices a head, and
splitting them only where few programs run would make a row's bits depend on the batch around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, dropout_arguments, dropout_factors, on_device_of
from .attention_mask import mask_gradient
from .attention_tiles import (
    Blocking,
    Blockings,
    Blocks,
    Geometry,
    blocks_for,
    broadcast_strides,
    dot,
    heads_together,
    load_rows,
    owned,
    place,
    row_statistics,
    scores,
    span,
    store_rows,
    tile_and_head,
    weights,
)

# M queries by N keys: of the pass over queries, and of the pass over keys. From the same source as the forward pass's
# table where that does not spill (Hopper to head size 64 and the pass over keys to 128), else by registers alone: the
# largest that do not spill. Nothing here has been measured yet.
KEYS: Blockings = {
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
QUERIES: Blockings = {
    80: Blocking(
        {64: Blocks(64, 64, 4, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(64, 32, 8, 1)},
        {64: Blocks(32, 16, 8, 1), 128: Blocks(32, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
        {64: Blocks(64, 32, 8, 2), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
    ),
    90: Blocking(
        {64: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 32, 8, 2)},
        {64: Blocks(32, 16, 8, 1), 128: Blocks(32, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
        {64: Blocks(128, 32, 8, 2), 128: Blocks(128, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
    ),
}
DELTA_ROWS = 64


@triton.jit(do_not_specialize=["H", "T", "tiles"])
def _attention_bwd_delta_kernel(
    out_ptr,  # (B, H, T, DV)
    dout_ptr,  # (B, H, T, DV)
    dlse_ptr,  # (B, H, T) fp32 or None
    delta_ptr,  # (B, H, T) fp32
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_ot: tl.int64,
    stride_gb: tl.int64,
    stride_gh: tl.int64,
    stride_gt: tl.int64,
    H,
    T,
    tiles,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
):
    """delta = sum over DV of dout out - dlse."""
    program = tl.program_id(0)
    head = program // tiles
    b, h = head // H, head % H
    row = program % tiles * M + tl.arange(0, M)
    out = load_rows(out_ptr + b * stride_ob + h * stride_oh, row, T, stride_ot, DV, BLOCK_DV).to(tl.float32)
    dout = load_rows(dout_ptr + b * stride_gb + h * stride_gh, row, T, stride_gt, DV, BLOCK_DV).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    numbered = head.to(tl.int64) * T + row
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + numbered, row < T, 0.0)
    tl.store(delta_ptr + numbered, delta, row < T)


@triton.jit
def _over_queries(
    dk,  # [N, BLOCK_D] fp32
    dv,  # [N, BLOCK_DV] fp32
    k,  # [N, BLOCK_D]
    v,  # [N, BLOCK_DV]
    q_ptr,  # this and what follows at the tile's batch and first query head
    dout_ptr,
    lse_ptr,
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
):
    """Add what the queries from `start` to `end` of each head of the group give; tiles are [keys, queries]."""
    col = first_key + tl.arange(0, N)
    count = tl.maximum(tl.cdiv(end - start, M), 0)
    for i in tl.range(0, group * count):  # one loop, since registers spill in a loop inside a loop over heads
        h = (i // count).to(tl.int64)
        row = start + i % count * M + tl.arange(0, M)
        q = load_rows(q_ptr + h * stride_qh, row, T, stride_qt, D, BLOCK_D)
        lse, delta = row_statistics(lse_ptr + h * all_rows, delta_ptr + h * all_rows, row, T)
        mask = mask_ptr
        if mask_ptr is not None:
            mask = mask_ptr + h * stride_mh
        s, capped = scores(
            dot(k, tl.trans(q), tl.zeros((N, M), tl.float32)), row[None, :], col[:, None],
            mask, row.to(tl.int64)[None, :] * stride_mt, stride_ms, T, S, scale, softcap,
            window_left, window_right, LEFT, RIGHT, SOFTCAP, BOUNDS,
        )  # fmt: skip
        p = weights(s, lse[None, :], mask_ptr)
        dout = load_rows(dout_ptr + h * stride_gh, row, T, stride_gt, DV, BLOCK_DV)
        dp = dot(v, tl.trans(dout), tl.zeros((N, M), tl.float32))
        if DROPOUT:
            numbered = first_numbered + h * all_rows + row
            factors = tl.trans(dropout_factors(numbered, first_key, seed, threshold, dropout_scale, N))
            dv = dot((p * factors).to(dout.dtype), dout, dv)
            dp *= factors
        else:
            dv = dot(p.to(dout.dtype), dout, dv)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds *= 1 - capped * capped
        dk = dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "B", "H", "T", "S", "group", "tiles", "heads", "together", "scale", "softcap", "window_left", "window_right",
        "seed", "threshold", "dropout_scale",
    ]
)  # fmt: skip
def _attention_bwd_keys_kernel(
    q_ptr,  # (B, H, T, D), or packed: (1, H, Tq, D)
    k_ptr,  # (B, Hkv, S, D)
    v_ptr,  # (B, Hkv, S, DV)
    mask_ptr,  # broadcast over (B, H, T, S) by strides, or None
    cu_q_ptr,  # (B + 1) int32 where sequences are packed, or None
    cu_k_ptr,
    dout_ptr,  # (B, H, T, DV)
    lse_ptr,  # (B, H, T) fp32
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
    # under a causal mask the first keys have the most queries
    tile, head = tile_and_head(tl.program_id(0), tiles, heads, together, False)
    all_rows, all_keys = T, S
    tile, b, kv_head, q_start, k_start, T, S = place(tile, head, cu_k_ptr, cu_q_ptr, cu_k_ptr, B, H // group, T, S, N)
    batch = b if cu_q_ptr is None else b * 0
    key = tile * N + tl.arange(0, N)
    k_ptr += batch * stride_kb + kv_head * stride_kh + k_start * stride_ks
    k = load_rows(k_ptr, key, S, stride_ks, D, BLOCK_D)
    v_ptr += batch * stride_vb + kv_head * stride_vh + k_start * stride_vs
    v = load_rows(v_ptr, key, S, stride_vs, DV, BLOCK_DV)
    dk = tl.zeros((N, BLOCK_D), tl.float32)
    dv = tl.zeros((N, BLOCK_DV), tl.float32)
    start, whole, whole_end, end = span(tile * N, T, window_right, window_left, N, M, RIGHT, LEFT, False)
    end = tl.where(tile * N < S, end, start)
    h = kv_head * group
    q_ptr += batch * stride_qb + h * stride_qh + q_start * stride_qt
    dout_ptr += batch * stride_gb + h * stride_gh + q_start * stride_gt
    numbered = (batch * H + h).to(tl.int64) * all_rows + q_start
    mask = mask_ptr
    if mask_ptr is not None:
        mask = mask_ptr + b * stride_mb + h * stride_mh
    for phase in tl.static_range(3):
        if phase == 1 or (RIGHT if phase == 0 else LEFT):
            dk, dv = _over_queries(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr + numbered, delta_ptr + numbered, mask, numbered, tile * N,
                start if phase == 0 else whole if phase == 1 else whole_end,
                tl.minimum(end, whole if phase == 0 else whole_end if phase == 1 else end),
                group, all_rows, stride_qh, stride_qt, stride_gh, stride_gt, stride_mh, stride_mt, stride_ms,
                T, S, scale, softcap, window_left, window_right, seed, threshold, dropout_scale,
                D, DV, BLOCK_D, BLOCK_DV, M, N, LEFT, RIGHT, SOFTCAP, DROPOUT, phase != 1,
            )  # fmt: skip
    limit = owned(cu_k_ptr, b, B, S, all_keys)
    dk_ptr += batch * stride_dkb + kv_head * stride_dkh + k_start * stride_dks
    store_rows(dk_ptr, dk * scale, key, limit, stride_dks, D, BLOCK_D)
    dv_ptr += batch * stride_dvb + kv_head * stride_dvh + k_start * stride_dvs
    store_rows(dv_ptr, dv, key, limit, stride_dvs, DV, BLOCK_DV)


@triton.jit
def _over_keys(
    dq,  # [M, BLOCK_D] fp32
    q,  # [M, BLOCK_D]
    dout,  # [M, BLOCK_DV]
    lse,  # [M], in log2 units
    delta,  # [M]
    k_ptr,  # this and what follows at the tile's batch and head
    v_ptr,
    mask_ptr,
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
):
    """Add what the keys from `start` to `end` give; tiles are [queries, keys]."""
    M: tl.constexpr = q.shape[0]
    for first in tl.range(start, end, N):
        first = tl.multiple_of(first, N)
        col = first + tl.arange(0, N)
        k = load_rows(k_ptr, col, S, stride_ks, D, BLOCK_D, BOUNDS)
        v = load_rows(v_ptr, col, S, stride_vs, DV, BLOCK_DV, BOUNDS)
        s, capped = scores(
            dot(q, tl.trans(k), tl.zeros((M, N), tl.float32)), row[:, None], col[None, :],
            mask_ptr, row.to(tl.int64)[:, None] * stride_mt, stride_ms, T, S, scale, softcap,
            window_left, window_right, LEFT, RIGHT, SOFTCAP, BOUNDS,
        )  # fmt: skip
        p = weights(s, lse[:, None], mask_ptr)
        dp = dot(dout, tl.trans(v), tl.zeros((M, N), tl.float32))
        if DROPOUT:
            dp *= dropout_factors(numbered, first, seed, threshold, dropout_scale, N)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds *= 1 - capped * capped
        dq = dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(
    do_not_specialize=[
        "B", "H", "T", "S", "group", "tiles", "heads", "together", "scale", "softcap", "window_left", "window_right",
        "seed", "threshold", "dropout_scale",
    ]
)  # fmt: skip
def _attention_bwd_queries_kernel(
    q_ptr,  # (B, H, T, D), or packed: (1, H, Tq, D)
    k_ptr,  # (B, Hkv, S, D)
    v_ptr,  # (B, Hkv, S, DV)
    mask_ptr,  # broadcast over (B, H, T, S) by strides, or None
    cu_q_ptr,  # (B + 1) int32 where sequences are packed, or None
    cu_k_ptr,
    dout_ptr,  # (B, H, T, DV)
    lse_ptr,  # (B, H, T) fp32
    delta_ptr,  # (B, H, T) fp32
    dq_ptr,  # like q
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
    tile, head = tile_and_head(tl.program_id(0), tiles, heads, together, True)
    all_rows = T
    tile, b, h, q_start, k_start, T, S = place(tile, head, cu_q_ptr, cu_q_ptr, cu_k_ptr, B, H, T, S, M)
    batch = b if cu_q_ptr is None else b * 0
    kv_head = h // group
    row = tile * M + tl.arange(0, M)
    first_numbered = head.to(tl.int64) * all_rows + q_start
    q = load_rows(q_ptr + batch * stride_qb + h * stride_qh + q_start * stride_qt, row, T, stride_qt, D, BLOCK_D)
    dout_ptr += batch * stride_gb + h * stride_gh + q_start * stride_gt
    dout = load_rows(dout_ptr, row, T, stride_gt, DV, BLOCK_DV)
    lse, delta = row_statistics(lse_ptr + first_numbered, delta_ptr + first_numbered, row, T)
    k_ptr += batch * stride_kb + kv_head * stride_kh + k_start * stride_ks
    v_ptr += batch * stride_vb + kv_head * stride_vh + k_start * stride_vs
    mask = mask_ptr
    if mask_ptr is not None:
        mask = mask_ptr + b * stride_mb + h * stride_mh
    dq = tl.zeros((M, BLOCK_D), tl.float32)
    start, whole, whole_end, end = span(tile * M, S, window_left, window_right, M, N, LEFT, RIGHT, True)
    end = tl.where(tile * M < T, end, start)
    for phase in tl.static_range(3):
        if phase != 0 or LEFT:
            dq = _over_keys(
                dq, q, dout, lse, delta, k_ptr, v_ptr, mask, row, first_numbered + row,
                start if phase == 0 else whole if phase == 1 else whole_end,
                tl.minimum(end, whole if phase == 0 else whole_end if phase == 1 else end),
                stride_ks, stride_vs, stride_mt, stride_ms, T, S, scale, softcap, window_left, window_right,
                seed, threshold, dropout_scale, D, DV, BLOCK_D, BLOCK_DV, N, LEFT, RIGHT, SOFTCAP, DROPOUT, phase != 1,
            )  # fmt: skip
    dq_ptr += batch * stride_dqb + h * stride_dqh + q_start * stride_dqt
    limit = owned(cu_q_ptr, b, B, T, all_rows)
    store_rows(dq_ptr, dq * scale, row, limit, stride_dqt, D, BLOCK_D)


def _delta(out: Tensor, dout: Tensor, dlse: Tensor | None, size: Geometry) -> Tensor:
    """(B, H, T) fp32."""
    delta = out.new_empty(out.shape[:3], dtype=torch.float32)
    tiles = triton.cdiv(size.T, DELTA_ROWS)
    if tiles * out.shape[0] * size.H:
        _attention_bwd_delta_kernel[(tiles * out.shape[0] * size.H,)](
            out, dout, dlse, delta, *out.stride()[:3], *dout.stride()[:3], size.H, size.T, tiles,
            size.head[1], size.head[3], DELTA_ROWS, num_warps=4,
        )  # fmt: skip
    return delta


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    size: Geometry,
    options: tuple,
    grads: tuple[Tensor, Tensor, Tensor] | None,
    mask_grad: bool,
) -> Tensor | None:
    """Write dq, dk and dv into `grads`, and return the mask's gradient if it is asked for.

    Tensors are (B, H, T, D) and so on; packed sequences are one batch.
    """
    _, scale, dropout_p, seed, _, _, softcap = options
    batch, Hkv, packed = q.shape[0], k.shape[1], cu_q is not None
    arch, head, masked = architecture(q.device), max(size.head[2:]), mask is not None or dropout_p > 0
    head_bytes = (size.head[0] + size.head[1]) * q.element_size()
    strides = (0, 0, 0, 0) if mask is None else broadcast_strides(mask)
    inputs = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides, *dout.stride()[:3]
    scalars = (
        float(scale), softcap, size.window_left, size.window_right, *dropout_arguments(dropout_p, seed), *size.head,
    )  # fmt: skip
    flags = *size.features, softcap > 0, dropout_p > 0
    with on_device_of(q):
        delta = _delta(out, dout, dlse, size)
        if grads is not None:
            dq, dk, dv = grads
            blocks = blocks_for(KEYS, arch, q.dtype, head, masked)
            tiles = triton.cdiv(size.S, blocks.N) + packed * size.B
            if tiles * batch * Hkv * size.S:
                together = min(batch * Hkv, heads_together(size.T, head_bytes * size.group, 1))
                _attention_bwd_keys_kernel[(tiles * batch * Hkv,)](
                    q, k, v, mask, cu_q, cu_k, dout, lse, delta, dk, dv, *inputs, *dk.stride()[:3], *dv.stride()[:3],
                    *size[:5], tiles, batch * Hkv, together, *scalars, blocks.M, blocks.N, *flags,
                    num_warps=blocks.warps, num_stages=blocks.stages,
                )  # fmt: skip
            blocks = blocks_for(QUERIES, arch, q.dtype, head, masked)
            tiles = triton.cdiv(size.T, blocks.M) + packed * size.B
            if tiles * batch * size.H * size.T:
                together = min(batch * size.H, heads_together(size.S, head_bytes, size.group))
                _attention_bwd_queries_kernel[(tiles * batch * size.H,)](
                    q, k, v, mask, cu_q, cu_k, dout, lse, delta, dq, *inputs, *dq.stride()[:3],
                    *size[:5], tiles, batch * size.H, together, *scalars, blocks.M, blocks.N, *flags,
                    num_warps=blocks.warps, num_stages=blocks.stages,
                )  # fmt: skip
        if mask is None or not mask_grad:
            return None
        return mask_gradient(mask, q, k, v, dout, lse, delta, inputs, size, scalars, flags)
