"""Gradient of attention's additive mask: the scores' gradients, summed over what the mask broadcasts over.

A program has a tile of the mask's queries and keys and sums over the batches and heads that share it, in order. Where
the mask has one row for all queries, or one column for all keys, each tile writes a partial sum, and the partial sums
are added in order. The scores are made once more here: a matrix of their gradients would be the largest tensor of all.
Where the mask is that large itself, because it broadcasts over nothing, the pass over the keys writes it instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._core.architecture import GFX942, GFX1100, SM80

from .._common import Dropout, dropout_factors, kernel, sum_partials
from .arguments import Config, Mask, Scoring, View, Window, at
from .mask import MaskRows, scores
from .seqlen import SeqlenInfo
from .softmax import Statistics, row_statistics, weighted, weights
from .tables import Blocking, Blockings, Blocks, Geometry
from .tiles import dot, load_rows

# By registers alone: not measured yet.
MASK = Blockings(
    {
        SM80: Blocking(
            {128: Blocks(64, 32, 8, 2), 256: Blocks(32, 16, 8, 1)},
            {64: Blocks(32, 32, 8, 2), 128: Blocks(32, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
        ),
        GFX942: Blocking({256: Blocks(64, 32, 4, 1)}, {256: Blocks(64, 32, 4, 1)}),
        GFX1100: Blocking(
            {64: Blocks(32, 32, 8, 1), 128: Blocks(32, 16, 8, 1), 256: Blocks(16, 16, 8, 1)},
            {64: Blocks(32, 32, 8, 1), 256: Blocks(16, 16, 8, 1)},
        ),
    }
)


@kernel(
    do_not_specialize=[
        "H", "T", "S", "group", "batches", "heads", "tiles_t", "tiles_s", "mask_heads", "scale", "softcap",
        "window_left", "window_right", "seed", "threshold", "dropout_scale",
    ]
)  # fmt: skip
def _attention_bwd_mask_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, Hkv, S, D)
    v_ptr,  # (B, Hkv, S, DV)
    mask_ptr,  # broadcast over (B, H, T, S) by strides
    dout_ptr,  # (B, H, T, DV)
    lse_ptr,  # (B, H, T) fp32
    rest_ptr,  # the same, or None
    delta_ptr,  # (B, H, T) fp32
    dmask_ptr,  # (tiles_t or 1, tiles_s or 1, *mask.shape) fp32: the first two where the mask has size 1 instead
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
    H,
    T,
    S,
    group,
    batches,  # that share an element of the mask
    heads,  # that share one
    mask_heads,  # mask.shape[1]
    tiles_t,
    tiles_s,
    scale,
    softcap,
    window_left,
    window_right,
    seed: tl.int64,
    threshold: tl.uint32,
    dropout_scale,
    config: tl.constexpr,
    ONE_ROW: tl.constexpr,  # mask.shape[2] == 1
    ONE_COLUMN: tl.constexpr,  # mask.shape[3] == 1
):
    q = View(q_ptr, stride_qb, stride_qh, stride_qt)
    k = View(k_ptr, stride_kb, stride_kh, stride_ks)
    v = View(v_ptr, stride_vb, stride_vh, stride_vs)
    dout = View(dout_ptr, stride_gb, stride_gh, stride_gt)
    mask = Mask(mask_ptr, stride_mb, stride_mh, stride_mt, stride_ms)
    statistics = Statistics(lse_ptr, rest_ptr, delta_ptr)
    scoring = Scoring(scale, softcap, Window(window_left, window_right))
    dropout = Dropout(seed, threshold, dropout_scale)
    seqlen = SeqlenInfo(0, 0, 0, 0, T, S)
    program = tl.program_id(0).to(tl.int64)
    tile_s, tiles = program % tiles_s, program // tiles_s
    tile_t, matrix = tiles % tiles_t, tiles // tiles_t  # matrix: which (batch, head) of the mask
    M: tl.constexpr = config.M
    N: tl.constexpr = config.N
    row = tile_t * M + tl.arange(0, M)
    col = tile_s * N + tl.arange(0, N)
    inside = (row < T)[:, None] & (col < S)[None, :]
    dmask = tl.zeros((M, N), tl.float32)
    for shared in range(batches * heads):
        b = matrix // mask_heads + shared // heads
        h = matrix % mask_heads + shared % heads
        queries = load_rows(at(q, b, h, 0), row, T, config.D, config.BLOCK_D)
        keys = load_rows(at(k, b, h // group, 0), col, S, config.D, config.BLOCK_D)
        s, _ = scores(
            dot(queries, tl.trans(keys), tl.zeros((M, N), tl.float32)), row[:, None], col[None, :],
            MaskRows(mask.ptr + b * mask.batch + h * mask.head, row[:, None] * mask.row, mask.column),
            seqlen, scoring, config, True,
        )  # fmt: skip
        index = (b * H + h) * T
        lse, rest, delta = row_statistics(statistics, index, row, T, config.NATURAL)
        gradients = load_rows(at(dout, b, h, 0), row, T, config.DV, config.BLOCK_DV)
        values = load_rows(at(v, b, h // group, 0), col, S, config.DV, config.BLOCK_DV)
        dp = dot(gradients, tl.trans(values), tl.zeros((M, N), tl.float32))
        if config.DROPOUT:
            dp *= dropout_factors(index + row, tile_s * N, *dropout, N)
        if rest_ptr is not None:
            rest = rest[:, None]
        p = weights(s, lse[:, None], rest, mask.ptr, True, config.NATURAL)
        ds = weighted(p, dp - delta[:, None], True)
        dmask += tl.where(inside, ds, 0.0)
    # where this program's partial sums go in dmask
    rows = 1 if ONE_ROW else T
    columns = 1 if ONE_COLUMN else S
    partial = tile_t * (tiles_s if ONE_COLUMN else 1) * ONE_ROW + tile_s * ONE_COLUMN
    matrices = tl.num_programs(0) // (tiles_t * tiles_s)
    dmask_ptr += (partial * matrices + matrix) * rows * columns
    if ONE_ROW and ONE_COLUMN:
        tl.store(dmask_ptr, tl.sum(dmask))
    elif ONE_ROW:
        tl.store(dmask_ptr + col, tl.sum(dmask, 0), col < S)
    elif ONE_COLUMN:
        tl.store(dmask_ptr + row, tl.sum(dmask, 1), row < T)
    else:
        tl.store(dmask_ptr + row[:, None] * columns + col[None, :], dmask, inside)


def mask_gradient(
    mask: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    rest: Tensor | None,
    delta: Tensor,
    strides: tuple[int, ...],
    size: Geometry,
    scalars: tuple,
    blocks: Blocks,
    config: Config,
) -> Tensor:
    """In mask's shape, fp32; `strides` and `scalars` as the other gradients' kernels take them."""
    mask_B, mask_H, mask_T, mask_S = mask.shape
    tiles_t, tiles_s = triton.cdiv(size.T, blocks.M), triton.cdiv(size.S, blocks.N)
    partials = (tiles_t if mask_T == 1 else 1) * (tiles_s if mask_S == 1 else 1)
    dmask = q.new_empty(partials, *mask.shape, dtype=torch.float32)
    programs = tiles_t * tiles_s * mask_B * mask_H
    if dmask.numel() == 0 or programs == 0 or q.shape[0] * size.H == 0:
        return q.new_zeros(mask.shape, dtype=torch.float32)
    _attention_bwd_mask_kernel[(programs,)](
        q, k, v, mask, dout, lse, rest, delta, dmask, *strides, *size[1:5],
        q.shape[0] // mask_B, size.H // mask_H, mask_H, tiles_t, tiles_s, *scalars, config, mask_T == 1, mask_S == 1,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return sum_partials(dmask)
