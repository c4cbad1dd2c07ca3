"""Attention by an online softmax (Dao et al. 2022), for whole batches and for packed sequences.

Forward, a row i with scores s_j = scale q_i k_j (softcap, mask): out = sum_j dropout(exp(s_j - lse)) v_j and
lse = log sum_j exp(s_j). A program has a tile of queries of one head and goes over the keys in three loops: tiles
that the window's left edge cuts, whole tiles, tiles that the right edge or the last key cuts. Only the first and the
last loop compare indices; tiles outside the window are never read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.backends.cpu import heads_like

from ._common import architecture, dropout_arguments, on_device_of
from .attention_backward import backward
from .attention_decode import decode, splits_keys
from .attention_tables import (
    Blocking,
    Blockings,
    Blocks,
    blocks_for,
    broadcast_strides,
    geometry,
    heads_together,
)
from .attention_tiles import (
    AGAIN_ROWS,
    AGAIN_SINGLE_ROWS,
    attend,
    attend_again,
    is_spoilt,
    load_rows,
    natural,
    normalized,
    owned,
    place,
    program_again,
    span,
    store_at,
    store_lse,
    tile_and_head,
)

# 2-byte inputs begin with the tables of PyTorch's FlexAttention templates, which were tuned for Triton kernels of this
# shape (torch/_inductor/template_heuristics/triton.py); where those spill in this kernel, and for float32 and masks,
# the largest tiles that do not, with two warp groups for wgmma from sm_90 on. Nothing here has been measured yet.
FORWARD = Blockings(
    {
        80: Blocking(
            {64: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 32, 8, 2)},
            {64: Blocks(64, 32, 8, 2), 128: Blocks(32, 16, 8, 1), 256: Blocks(32, 16, 8, 1)},
            {64: Blocks(64, 32, 8, 2), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
        ),
        90: Blocking(
            {64: Blocks(128, 128, 8, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 64, 8, 2)},
            {64: Blocks(64, 32, 8, 2), 128: Blocks(32, 16, 8, 1), 256: Blocks(32, 16, 8, 1)},
            {64: Blocks(128, 64, 8, 3), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
        ),
        100: Blocking(
            {64: Blocks(128, 128, 8, 3), 128: Blocks(128, 32, 8, 3), 256: Blocks(64, 64, 8, 2)},
            {64: Blocks(64, 32, 8, 2), 128: Blocks(32, 16, 8, 1), 256: Blocks(32, 16, 8, 1)},
            {64: Blocks(128, 64, 8, 3), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
        ),
    }
)


@triton.jit
def _tile(
    program, q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, out_ptr, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_mb, stride_mh,
    B, H, T, S, group, tiles, heads, together, DV: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """A program's tile: its first query, T and S, where it begins in each tensor, rows to write."""
    tile, head = tile_and_head(program, tiles, heads, together, True)
    tile, b, h, q_start, k_start, T_own, S_own = place(tile, head, cu_q_ptr, cu_q_ptr, cu_k_ptr, B, H, T, S, M)
    batch = b if cu_q_ptr is None else b * 0
    kv_head = h // group
    return (
        tile * M, T_own, S_own,
        q_ptr + batch * stride_qb + h * stride_qh + q_start * stride_qt,
        k_ptr + batch * stride_kb + kv_head * stride_kh + k_start * stride_ks,
        v_ptr + batch * stride_vb + kv_head * stride_vh + k_start * stride_vs,
        b * stride_mb + h * stride_mh,
        head.to(tl.int64) * T + q_start,  # number of its sequence's first row, in lse and in the dropout mask
        out_ptr + ((batch * T.to(tl.int64) + q_start) * H + h) * DV,
        owned(cu_q_ptr, b, B, T_own, T),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "B", "H", "T", "S", "group", "tiles", "heads", "together", "scale", "softcap", "window_left", "window_right",
        "seed", "threshold", "dropout_scale",
    ]
)  # fmt: skip
def _attention_fwd_kernel(
    q_ptr,  # (B, H, T, D), or packed: (1, H, Tq, D)
    k_ptr,  # (B, Hkv, S, D)
    v_ptr,  # (B, Hkv, S, DV)
    mask_ptr,  # broadcast over (B, H, T, S) by strides, or None
    cu_q_ptr,  # (B + 1) int32 where sequences are packed, or None
    cu_k_ptr,
    out_ptr,  # (B, T, H, DV)
    lse_ptr,  # (B, H, T) fp32 or None
    rest_ptr,  # the same: what rounding takes from lse
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
    B,
    H,
    T,  # all packed queries, where sequences are packed
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
    first, T_own, S_own, q_own, k_own, v_own, mask_start, numbers, out_own, limit = _tile(
        tl.program_id(0), q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, out_ptr, stride_qb, stride_qh, stride_qt,
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_mb, stride_mh,
        B, H, T, S, group, tiles, heads, together, DV, M,
    )  # fmt: skip
    row = first + tl.arange(0, M)
    q = load_rows(q_own, row, T_own, stride_qt, D, BLOCK_D)
    q = (q.to(tl.float32) * tl.where(scale < 0, -1.0, 1.0)).to(q.dtype)
    acc = tl.zeros((M, BLOCK_DV), tl.float32)
    total = tl.zeros((M,), tl.float32)
    peak = tl.full((M,), float("-inf"), tl.float32)
    start, whole, whole_end, end = span(first, S_own, window_left, window_right, M, N, LEFT, RIGHT, True)
    end = tl.where(first < T_own, end, start)  # nothing for rows after the last sequence
    for phase in tl.static_range(3):
        if phase != 0 or LEFT:
            acc, total, peak = attend(
                acc, total, peak, q, k_own, v_own, mask_ptr, row, mask_start + row * stride_mt,
                numbers + row,
                start if phase == 0 else whole if phase == 1 else whole_end,
                tl.minimum(end, whole if phase == 0 else whole_end if phase == 1 else end),
                stride_ks, stride_vs, stride_ms, T_own, S_own, tl.abs(scale), softcap,
                window_left, window_right, seed, threshold, dropout_scale, D, DV, BLOCK_D, BLOCK_DV, N,
                LEFT, RIGHT, SOFTCAP, DROPOUT, phase != 1,
            )  # fmt: skip
    total = tl.where(row < T_own, total, 0.0)
    out = normalized(acc, total)
    spoilt = is_spoilt(out) if mask_ptr is not None or LEFT or RIGHT else False
    stride_ot = (H * DV).to(tl.int64)
    store_at(out_own, out, row * stride_ot, row < limit, DV, BLOCK_DV)
    store_lse(lse_ptr, rest_ptr, total, peak, numbers + row, row < limit, natural(mask_ptr))
    if spoilt:
        ROWS: tl.constexpr = AGAIN_SINGLE_ROWS if q_ptr.dtype.element_ty == tl.float32 else AGAIN_ROWS
        first, T_own, S_own, q_own, k_own, v_own, mask_start, numbers, out_own, limit = _tile(
            program_again(), q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, out_ptr, stride_qb, stride_qh, stride_qt,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_mb, stride_mh,
            B, H, T, S, group, tiles, heads, together, DV, M,
        )  # fmt: skip
        start, whole, whole_end, end = span(first, S_own, window_left, window_right, M, N, LEFT, RIGHT, True)
        tl.debug_barrier()  # what the program's other threads stored is read
        for part in range(first, tl.minimum(first + M, T_own), ROWS):
            own = part + tl.arange(0, ROWS)
            own_total, own_peak, again = attend_again(
                q_own, own * stride_qt, out_own, own * stride_ot, own < T_own,
                k_own, v_own, mask_ptr, own, mask_start + own * stride_mt, numbers + own, start, end,
                stride_ks, stride_vs, stride_ms, T_own, S_own, scale, softcap,
                window_left, window_right, seed, threshold, dropout_scale,
                D, DV, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP, DROPOUT,
            )  # fmt: skip
            store_lse(lse_ptr, rest_ptr, own_total, own_peak, numbers + own, again, natural(mask_ptr))


def _forward(q, k, v, mask, cu_q, cu_k, B, options, lse, rest=None):
    """q (B, H, T, D), or packed sequences as (1, H, Tq, D) -> (out (B, T, H, Dv), lse (B, H, T) or None)."""
    _, scale, dropout_p, seed, window_left, window_right, softcap = options
    size = geometry(q, k, v, B, window_left, window_right)
    batch = q.shape[0]
    out = q.new_empty(batch, size.T, size.H, size.head[1])
    sums = q.new_empty(batch, size.H, size.T, dtype=torch.float32) if lse else None
    if (sums is None and out.numel() == 0) or size.T * size.H * batch == 0:
        return out, sums
    if cu_q is None and splits_keys(size):
        decode(q, k, v, mask, out, sums, rest, size, options)
        return out, sums
    masked = mask is not None or dropout_p > 0
    blocks = blocks_for(FORWARD, architecture(q.device), q.dtype, max(size.head[2:]), masked)
    tiles = triton.cdiv(size.T, blocks.M) + (0 if cu_q is None else B)
    heads = batch * size.H
    together = heads_together(size.S, (size.head[0] + size.head[1]) * q.element_size(), size.group)
    strides = (0, 0, 0, 0) if mask is None else broadcast_strides(mask)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides
    with on_device_of(q):
        _attention_fwd_kernel[(tiles * heads,)](
            q, k, v, mask, cu_q, cu_k, out, sums, rest, *strides,
            *size[:5], tiles, heads, min(together, heads), float(scale), softcap, size.window_left, size.window_right,
            *dropout_arguments(dropout_p, seed), *size.head, blocks.M, blocks.N, *size.features, softcap > 0,
            dropout_p > 0, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out, sums


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *options, lse: bool = True, rest: Tensor | None = None
):
    """As fastlm.backends.cpu.attention.attention_fwd."""
    out, sums = _forward(q, k, v, mask, None, None, q.shape[0], options, lse, rest)
    return out.transpose(1, 2), sums


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *options,
    inputs: bool = True,
    mask_grad: bool = False,
    rest: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As fastlm.backends.cpu.attention.attention_bwd."""
    size = geometry(q, k, v, q.shape[0], *options[4:6])
    grads = (heads_like(q), heads_like(k), heads_like(v)) if inputs else None
    dmask = backward(dout, dlse, q, k, v, mask, None, None, out, lse, size, options, grads, mask_grad, rest)
    return *(grads or (None, None, None)), dmask


def attention_varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *options, lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As fastlm.backends.cpu.attention.attention_varlen_fwd."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, sums = _forward(q, k, v, None, cu_q, cu_k, cu_q.shape[0] - 1, options, lse)
    return out[0], sums if sums is None else sums[0]


def attention_varlen_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    out: Tensor,
    lse: Tensor,
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    """As fastlm.backends.cpu.attention.attention_varlen_bwd."""
    grads = heads_like(q), heads_like(k), heads_like(v)
    dout, q, k, v, out, dq, dk, dv = (x.transpose(0, 1)[None] for x in (dout, q, k, v, out, *grads))
    size = geometry(q, k, v, cu_q.shape[0] - 1, *options[4:6])
    backward(dout, dlse, q, k, v, None, cu_q, cu_k, out, lse, size, options, (dq, dk, dv), False)
    return grads
