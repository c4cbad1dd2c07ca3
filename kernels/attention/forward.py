"""The forward pass of attention by an online softmax (Dao et al. 2022).

A row i with scores s_j = scale q_i k_j (softcap, mask): out = sum_j dropout(exp(s_j - lse)) v_j and
lse = log sum_j exp(s_j). A program has a tile of queries of one head and goes over the keys in three loops: blocks
that the window's left edge cuts, unmasked blocks, blocks that the right edge or the last key cuts. Only the first and
the last loop compare indices; blocks outside the window are never read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastlm._core.architecture import GFX942, GFX1100, SM80, SM90, SM100

from .._common import Dropout, architecture, dropout_arguments, kernel, on_device_of
from .arguments import Args, Mask, Packing, Scoring, Sizes, View, Window, at
from .decode import launch_decode, splits_keys
from .mask import MaskRows
from .seqlen import (
    Schedule,
    SeqlenInfo,
    n_block_range,
    phase_of,
    scheduled_tile,
    seqlen_info,
    store_limit,
)
from .softmax import Rows, epilogue, mainloop, online_softmax, recompute_rows, store_lse
from .tables import (
    Blocking,
    Blockings,
    Blocks,
    blocks_for,
    compiled_for,
    geometry,
    mask_strides,
    swizzle_heads,
)
from .tiles import (
    RECOMPUTE_ROWS,
    RECOMPUTE_SINGLE_ROWS,
    has_non_finite,
    load_rows,
    program_id_again,
    store_rows,
)

# 2-byte inputs begin with the tables of PyTorch's FlexAttention templates, which were tuned for Triton kernels of this
# shape (torch/_inductor/template_heuristics/triton.py); where those spill in this kernel, and for float32 and masks,
# the largest tiles that do not, with two warp groups for wgmma from sm_90 on. GPUs with 99 KB of shared memory take
# sm_80's. AMD's are the largest tiles tried that spill nothing, or on RDNA spill the least: its matrix instructions
# hold an operand's rows twice, and none takes float32. Nothing here has been measured yet.
FORWARD = Blockings(
    {
        SM80: Blocking(
            {64: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 32, 8, 2)},
            {64: Blocks(64, 32, 8, 2), 128: Blocks(32, 16, 8, 1), 256: Blocks(32, 16, 8, 1)},
            {64: Blocks(64, 32, 8, 2), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
        ),
        SM90: Blocking(
            {64: Blocks(128, 128, 8, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 64, 8, 2)},
            {64: Blocks(64, 32, 8, 2), 128: Blocks(32, 16, 8, 1), 256: Blocks(32, 16, 8, 1)},
            {64: Blocks(128, 64, 8, 3), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
        ),
        SM100: Blocking(
            {64: Blocks(128, 128, 8, 3), 128: Blocks(128, 32, 8, 3), 256: Blocks(64, 64, 8, 2)},
            {64: Blocks(64, 32, 8, 2), 128: Blocks(32, 16, 8, 1), 256: Blocks(32, 16, 8, 1)},
            {64: Blocks(128, 64, 8, 3), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
        ),
        GFX942: Blocking(
            {256: Blocks(128, 64, 4, 1)},
            {128: Blocks(64, 32, 4, 1), 256: Blocks(64, 32, 4, 1)},
            {128: Blocks(64, 64, 4, 1), 256: Blocks(64, 32, 4, 1)},
        ),
        GFX1100: Blocking(
            {64: Blocks(128, 64, 8, 1), 128: Blocks(64, 32, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {256: Blocks(16, 16, 8, 1)},
            {64: Blocks(32, 32, 8, 1), 256: Blocks(32, 16, 8, 1)},
        ),
    }
)


class _Tile(NamedTuple):
    """What a program works on; views begin at its sequence and head."""

    first: tl.tensor  # query
    seqlen: SeqlenInfo
    q: View
    k: View
    v: View
    mask_start: tl.tensor
    index: tl.tensor  # of its sequence's first row, in lse and in the dropout mask
    out: View
    limit: tl.tensor  # rows to write


@triton.jit
def _tile(program, args, schedule, out_ptr, config: tl.constexpr):
    H, T = args.sizes.H, args.sizes.T
    tile, head = scheduled_tile(program, schedule, True)
    tile, h, seqlen = seqlen_info(tile, head, args.packing.cu_q, args.packing, args.sizes, H, config.M)
    kv_head = h // args.sizes.group
    return _Tile(
        tile * config.M,
        seqlen,
        at(args.q, seqlen.batch, h, seqlen.offset_q),
        at(args.k, seqlen.batch, kv_head, seqlen.offset_k),
        at(args.v, seqlen.batch, kv_head, seqlen.offset_k),
        seqlen.sequence * args.mask.batch + h * args.mask.head,
        head.to(tl.int64) * T + seqlen.offset_q,
        View(
            out_ptr + ((seqlen.batch * T.to(tl.int64) + seqlen.offset_q) * H + h) * config.DV,
            0, 0, (H * config.DV).to(tl.int64),
        ),
        store_limit(args.packing.cu_q, seqlen.sequence, args.sizes.B, seqlen.seqlen_q, T),
    )  # fmt: skip


@triton.jit
def _recompute(args, schedule, out_ptr, lse_ptr, rest_ptr, config: tl.constexpr):
    """Compute those of a program's rows again that it stored as not finite."""
    ROWS: tl.constexpr = (
        RECOMPUTE_SINGLE_ROWS if args.q.ptr.dtype.element_ty == tl.float32 and not config.SINGLE else RECOMPUTE_ROWS
    )
    tile = _tile(program_id_again(config.AMD), args, schedule, out_ptr, config)
    blocks = n_block_range(tile.first, tile.seqlen, args.scoring.window, config)
    tl.debug_barrier()  # what the program's other threads stored is read
    for part in range(tile.first, tl.minimum(tile.first + config.M, tile.seqlen.seqlen_q), ROWS):
        row = part + tl.arange(0, ROWS)
        row_sum, row_max, again = recompute_rows(
            tile.q.ptr, row * tile.q.row, tile.out.ptr, row * tile.out.row, row < tile.seqlen.seqlen_q, tile.k, tile.v,
            MaskRows(args.mask.ptr, tile.mask_start + row * args.mask.row, args.mask.column),
            Rows(row, tile.index + row), blocks.start, blocks.end, tile.seqlen, args.scoring, args.dropout, config,
        )  # fmt: skip
        store_lse(lse_ptr, rest_ptr, row_sum, row_max, tile.index + row, again, config.NATURAL)


@kernel(
    do_not_specialize=[
        "B", "H", "T", "S", "group", "tiles", "heads", "swizzle", "scale", "softcap", "window_left", "window_right",
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
    tile = _tile(tl.program_id(0), args, schedule, out_ptr, config)
    row = tile.first + tl.arange(0, config.M)
    q = load_rows(tile.q, row, tile.seqlen.seqlen_q, config.D, config.BLOCK_D)
    acc, row_sum, row_max = online_softmax(config.M, config.BLOCK_DV)
    blocks = n_block_range(tile.first, tile.seqlen, args.scoring.window, config)
    for phase in tl.static_range(3):
        if phase != 0 or config.LEFT:
            start, end = phase_of(blocks, phase)
            acc, row_sum, row_max = mainloop(
                acc, row_sum, row_max, q, tile.k, tile.v,
                MaskRows(mask_ptr, tile.mask_start + row * stride_mt, stride_ms), Rows(row, tile.index + row),
                start, end, tile.seqlen, args.scoring, args.dropout, config, config.N, phase != 1,
            )  # fmt: skip
    row_sum = tl.where(row < tile.seqlen.seqlen_q, row_sum, 0.0)
    out = epilogue(acc, row_sum)
    non_finite = has_non_finite(out) if mask_ptr is not None or config.LEFT or config.RIGHT else False
    store_rows(tile.out, out, row, tile.limit, config.DV, config.BLOCK_DV)
    store_lse(lse_ptr, rest_ptr, row_sum, row_max, tile.index + row, row < tile.limit, config.NATURAL)
    if non_finite:
        _recompute(args, schedule, out_ptr, lse_ptr, rest_ptr, config)


def launch_forward(q, k, v, mask, cu_q, cu_k, B, options, lse, rest=None):
    """q (B, H, T, D), or packed sequences as (1, H, Tq, D) -> (out (B, T, H, Dv), lse (B, H, T) or None)."""
    _, scale, dropout_p, seed, window_left, window_right, softcap = options
    size = geometry(q, k, v, B, window_left, window_right)
    batch = q.shape[0]
    out = q.new_empty(batch, size.T, size.H, size.head[1])
    sums = q.new_empty(batch, size.H, size.T, dtype=torch.float32) if lse else None
    if (sums is None and out.numel() == 0) or size.T * size.H * batch == 0:
        return out, sums
    if cu_q is None and splits_keys(size):
        launch_decode(q, k, v, mask, out, sums, rest, size, options)
        return out, sums
    if scale < 0:  # the main loop's is none; a copy of q here keeps it out of the program's registers there
        q, scale = -q, -scale
    masked = mask is not None or dropout_p > 0
    arch = architecture(q.device)
    blocks = blocks_for(FORWARD, arch, q.dtype, max(size.head[2:]), masked)
    tiles = triton.cdiv(size.T, blocks.M) + (0 if cu_q is None else B)
    heads = batch * size.H
    swizzle = swizzle_heads(size.S, (size.head[0] + size.head[1]) * q.element_size(), size.group)
    with on_device_of(q):
        _attention_fwd_kernel[(tiles * heads,)](
            q, k, v, mask, cu_q, cu_k, out, sums, rest, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *mask_strides(mask), *size[:5], tiles, heads, min(swizzle, heads), float(scale), softcap,
            size.window_left, size.window_right, *dropout_arguments(dropout_p, seed),
            compiled_for(size, blocks, mask, softcap, dropout_p, arch),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out, sums
