"""LayerNorm and RMSNorm: their kernels, alone and fused with the residual addition (and dropout) before them.

Forward, a row: z = residual + dropout(x); LayerNorm (CENTRED) takes the mean off, then the mean of squares is the
variance; y = (z - mean) rstd w + b. RMSNorm is the same with mean and b 0.
Backward, a row, with g = dy w and xhat = (z - mean) rstd:
  dz = rstd (g - mean(g) - xhat mean(g xhat)) + dz_in,   dw = sum dy xhat,   db = sum dy.
RMSNorm has no mean(g).

Rows up to ONE_BLOCK columns stay in registers: one read of each input, one write of each output. Backward runs as
persistent programs, each over its own rows, that keep dw and db in registers and write one partial. Wider rows are
split into blocks of columns: a first kernel reduces each block, a second one combines a row's blocks in order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._core.architecture import SM80, Architecture

from ._common import (
    Table,
    Tile,
    architecture,
    block_of,
    dropout_arguments,
    dropout_factors,
    kernel,
    multiprocessors,
    on_device_of,
    persistent,
    sum_partials,
    tile_for,
)

# Not measured on any GPU yet: 16 or 32 elements a thread, by registers and occupancy alone.
FORWARD: Table = {
    SM80: (Tile(2048, 2048, 4), Tile(4096, 4096, 8), Tile(8192, 8192, 16), Tile(16384, 16384, 16)),
}
# Five fp32 values an element live in registers here: x, dy, w and layer_norm's two sums.
BACKWARD: Table = {
    SM80: (
        Tile(1024, 1024, 4, programs=4, stages=2),
        Tile(2048, 2048, 4, programs=2, stages=2),
        Tile(4096, 4096, 8, programs=2, stages=2),
        Tile(8192, 8192, 16, programs=1, stages=2),
    ),
}
ONE_BLOCK_FORWARD, ONE_BLOCK_BACKWARD = 16384, 8192  # the last row of each table
ONE_BLOCK_UNALIGNED = 8192  # forward without 16-byte loads
ONE_BLOCK_EXTRAS = 4096  # backward with a dx beside dz, or without 16-byte loads: beyond, registers spill
SPLIT = Tile(2048, 2048, 8, programs=2, stages=2)  # a block of a wider row


@functools.cache
def forward_plan(N: int, arch: Architecture) -> tuple[int, int, int]:
    """(rows and columns of a tile, warps); blocks of SPLIT where a row does not fit into one."""
    if (ONE_BLOCK_UNALIGNED if N % 16 else ONE_BLOCK_FORWARD) < N:
        return 1, SPLIT.block, SPLIT.warps
    block = block_of(N)
    tile = tile_for(FORWARD, arch, block)
    return tile.rows(block), block, tile.warps


@functools.cache
def backward_plan(N: int, with_dx: bool, arch: Architecture) -> tuple[Tile, int, int, int]:
    """(configuration, rows and columns of a tile, blocks a row)."""
    if (ONE_BLOCK_EXTRAS if with_dx or N % 16 else ONE_BLOCK_BACKWARD) < N:
        return SPLIT, 1, SPLIT.block, triton.cdiv(N, SPLIT.block)
    block = block_of(N)
    tile = tile_for(BACKWARD, arch, block)
    return tile, tile.rows(block), block, 1


@triton.jit
def _residual_stream(
    x_ptr, residual_ptr, z_ptr, row, first_column, offsets, mask, seed, threshold, scale, DROPOUT: tl.constexpr
):
    """What is normalized, in fp32: x, or z = residual + dropout(x) as its own dtype stores it."""
    z = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
    if residual_ptr is not None:
        if DROPOUT:
            z *= dropout_factors(row, first_column, seed, threshold, scale, offsets.shape[1])
        z += tl.load(residual_ptr + offsets, mask, 0.0).to(tl.float32)
        stored = z.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + offsets, stored, mask)
        z = stored.to(tl.float32)
    return z


@triton.jit
def _scaled(xhat, w_ptr, b_ptr, col, in_row):
    """xhat w + b."""
    if w_ptr is not None:
        xhat *= tl.load(w_ptr + col, in_row, 0.0).to(tl.float32)[None, :]
    if b_ptr is not None:
        xhat += tl.load(b_ptr + col, in_row, 0.0).to(tl.float32)[None, :]
    return xhat


@kernel(do_not_specialize=["M", "seed", "threshold"])
def _norm_fwd_kernel(
    x_ptr,  # (M, N)
    residual_ptr,  # (M, N) or None
    w_ptr,  # (N) or None
    b_ptr,  # (N) or None
    z_ptr,  # (M, N), with residual
    y_ptr,  # (M, N)
    mean_ptr,  # (M) fp32 or None
    rstd_ptr,  # (M) fp32 or None
    M: tl.int64,
    N,
    eps,
    seed: tl.int64,
    threshold: tl.uint32,
    scale,
    CENTRED: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_N)
    offsets = row[:, None] * N + col[None, :]
    mask = (row < M)[:, None] & (col < N)[None, :]
    z = _residual_stream(x_ptr, residual_ptr, z_ptr, row, 0, offsets, mask, seed, threshold, scale, DROPOUT)
    if CENTRED:  # a one-pass variance would lose everything to a large mean
        mean = tl.sum(z, 1) / N
        mean += tl.sum(tl.where(mask, z - mean[:, None], 0.0), 1) / N  # the mean of equal numbers is that number
        z = tl.where(mask, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(z * z, 1) / N + eps)
    y = _scaled(z * rstd[:, None], w_ptr, b_ptr, col, col < N)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)
    if CENTRED and mean_ptr is not None:
        tl.store(mean_ptr + row, mean, row < M)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, row < M)


@triton.jit
def _norm_bwd_row(dy, xhat, w, c1, c2, rstd, dz_in_ptr, offsets, mask, CENTRED: tl.constexpr):
    if CENTRED:
        dz = (dy * w - c1[:, None] - xhat * c2[:, None]) * rstd[:, None]
    else:
        dz = (dy * w - xhat * c2[:, None]) * rstd[:, None]
    if dz_in_ptr is not None:
        dz += tl.load(dz_in_ptr + offsets, mask, 0.0).to(tl.float32)
    return dz


@triton.jit
def _store_gradients(
    dz, dz_ptr, dx_ptr, row, first_column, offsets, mask, seed, threshold, scale, DROPOUT: tl.constexpr
):
    tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask)
    if dx_ptr is not None:
        if DROPOUT:
            dz *= dropout_factors(row, first_column, seed, threshold, scale, offsets.shape[1])
        tl.store(dx_ptr + offsets, dz.to(dx_ptr.dtype.element_ty), mask)


@kernel(do_not_specialize=["M", "rows_each", "seed", "threshold"])
def _norm_bwd_kernel(
    dy_ptr,  # (M, N)
    z_ptr,  # (M, N), what was normalized
    w_ptr,  # (N) or None
    mean_ptr,  # (M) fp32, where CENTRED
    rstd_ptr,  # (M) fp32
    dz_in_ptr,  # (M, N) or None: added to dz
    dz_ptr,  # (M, N)
    dx_ptr,  # (M, N) or None: dropout mask * dz
    partial_ptr,  # (programs, 2 if CENTRED else 1, N) fp32 or None: dw, db
    M: tl.int64,
    rows_each: tl.int64,
    N,
    seed: tl.int64,
    threshold: tl.uint32,
    scale,
    CENTRED: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_N)
    in_row = col < N
    w = tl.full((1, BLOCK_N), 1.0, tl.float32)
    if w_ptr is not None:
        w = tl.load(w_ptr + col, in_row, 0.0).to(tl.float32)[None, :]
    dw = tl.zeros((ROWS, BLOCK_N), tl.float32)
    db = tl.zeros((ROWS, BLOCK_N), tl.float32)
    PARTS: tl.constexpr = 2 if CENTRED else 1
    first = program * rows_each
    for start in tl.range(first, tl.minimum(first + rows_each, M), ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        offsets = row[:, None] * N + col[None, :]
        mask = (row < M)[:, None] & in_row[None, :]
        dy = tl.load(dy_ptr + offsets, mask, 0.0).to(tl.float32)
        z = tl.load(z_ptr + offsets, mask, 0.0).to(tl.float32)
        if CENTRED:
            z -= tl.load(mean_ptr + row, row < M, 0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, row < M, 0.0)
        xhat = z * rstd[:, None]
        g = dy * w
        c1 = tl.sum(g, 1) / N if CENTRED else 0.0
        c2 = tl.sum(g * xhat, 1) / N
        dz = _norm_bwd_row(dy, xhat, w, c1, c2, rstd, dz_in_ptr, offsets, mask, CENTRED)
        _store_gradients(dz, dz_ptr, dx_ptr, row, 0, offsets, mask, seed, threshold, scale, DROPOUT)
        if partial_ptr is not None:
            dw += dy * xhat
            if CENTRED:
                db += dy
    if partial_ptr is not None:
        tl.store(partial_ptr + program * PARTS * N + col, tl.sum(dw, 0), in_row)
        if CENTRED:
            tl.store(partial_ptr + program * PARTS * N + N + col, tl.sum(db, 0), in_row)


@kernel(do_not_specialize=["S", "seed", "threshold"])
def _norm_fwd_split_kernel(
    x_ptr,  # (M, N)
    residual_ptr,  # (M, N) or None
    z_ptr,  # (M, N), with residual
    partial_ptr,  # (M, S, 2) fp32: mean and squared deviation of each block; not CENTRED: (M, S), sum of squares
    N,
    S,
    seed: tl.int64,
    threshold: tl.uint32,
    scale,
    CENTRED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // S + tl.arange(0, 1)
    first_column = (program % S) * BLOCK_N
    col = first_column + tl.arange(0, BLOCK_N)
    offsets = row[:, None] * N + col[None, :]
    mask = (col < N)[None, :]
    z = _residual_stream(x_ptr, residual_ptr, z_ptr, row, first_column, offsets, mask, seed, threshold, scale, DROPOUT)
    if CENTRED:
        count = tl.minimum(N - first_column, BLOCK_N)
        mean = tl.sum(z) / count
        mean += tl.sum(tl.where(mask, z - mean, 0.0)) / count
        centred = tl.where(mask, z - mean, 0.0)
        tl.store(partial_ptr + program * 2, mean)
        tl.store(partial_ptr + program * 2 + 1, tl.sum(centred * centred))
    else:
        tl.store(partial_ptr + program, tl.sum(z * z))


@kernel(do_not_specialize=["S"])
def _norm_fwd_join_kernel(
    z_ptr,  # (M, N)
    w_ptr,  # (N) or None
    b_ptr,  # (N) or None
    partial_ptr,  # (M, S, 2) or (M, S) fp32
    y_ptr,  # (M, N)
    mean_ptr,  # (M) fp32 or None
    rstd_ptr,  # (M) fp32 or None
    N,
    S,
    eps,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Statistics of the row from those of its blocks (Chan et al. 1979), then y for one block."""
    program = tl.program_id(0).to(tl.int64)
    row = program // S
    s = tl.arange(0, BLOCK_S)
    if CENTRED:
        partial = partial_ptr + (row * S + s) * 2
        count = tl.where(s < S, tl.minimum(N - s.to(tl.int64) * BLOCK_N, BLOCK_N), 0).to(tl.float32)
        means = tl.load(partial, s < S, 0.0)
        mean = tl.sum(means * count) / N
        mean += tl.sum((means - mean) * count) / N
        squares = tl.load(partial + 1, s < S, 0.0) + count * (means - mean) * (means - mean)
    else:
        squares = tl.load(partial_ptr + row * S + s, s < S, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares) / N + eps)
    first_column = (program % S) * BLOCK_N
    col = first_column + tl.arange(0, BLOCK_N)
    z = tl.load(z_ptr + row * N + col, col < N, 0.0).to(tl.float32)
    if CENTRED:
        z -= mean
    y = _scaled((z * rstd)[None, :], w_ptr, b_ptr, col, col < N)
    tl.store(y_ptr + row * N + col[None, :], y.to(y_ptr.dtype.element_ty), (col < N)[None, :])
    if CENTRED and mean_ptr is not None:
        tl.store(mean_ptr + row, mean, program % S == 0)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, program % S == 0)


@kernel(do_not_specialize=["S"])
def _norm_bwd_split_kernel(
    dy_ptr,  # (M, N)
    z_ptr,  # (M, N)
    w_ptr,  # (N) or None
    mean_ptr,  # (M) fp32, where CENTRED
    rstd_ptr,
    sums_ptr,  # (M, S, 2) fp32: sums of g and g xhat over each block; not CENTRED: (M, S), sum of g z
    N,
    S,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // S
    first_column = (program % S) * BLOCK_N
    col = first_column + tl.arange(0, BLOCK_N)
    g = tl.load(dy_ptr + row * N + col, col < N, 0.0).to(tl.float32)
    if w_ptr is not None:
        g *= tl.load(w_ptr + col, col < N, 0.0).to(tl.float32)
    z = tl.load(z_ptr + row * N + col, col < N, 0.0).to(tl.float32)
    if CENTRED:
        xhat = (z - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row)
        tl.store(sums_ptr + program * 2, tl.sum(g))
        tl.store(sums_ptr + program * 2 + 1, tl.sum(g * xhat))
    else:
        tl.store(sums_ptr + program, tl.sum(g * z))


@kernel(do_not_specialize=["M", "rows_each", "S", "seed", "threshold"])
def _norm_bwd_join_kernel(
    dy_ptr,  # (M, N)
    z_ptr,  # (M, N)
    w_ptr,  # (N) or None
    mean_ptr,  # (M) fp32, where CENTRED
    rstd_ptr,  # (M) fp32
    dz_in_ptr,  # (M, N) or None
    sums_ptr,  # (M, S, 2) or (M, S) fp32
    dz_ptr,  # (M, N)
    dx_ptr,  # (M, N) or None
    partial_ptr,  # (programs / S, 2 if CENTRED else 1, N) fp32 or None
    M: tl.int64,
    rows_each: tl.int64,
    N,
    S,
    seed: tl.int64,
    threshold: tl.uint32,
    scale,
    CENTRED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of columns over a part of the rows."""
    program = tl.program_id(0).to(tl.int64)
    part = program // S
    first_column = (program % S) * BLOCK_N
    col = first_column + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    in_row = col < N
    w = tl.full((1, BLOCK_N), 1.0, tl.float32)
    if w_ptr is not None:
        w = tl.load(w_ptr + col, in_row, 0.0).to(tl.float32)[None, :]
    dw = tl.zeros((1, BLOCK_N), tl.float32)
    db = tl.zeros((1, BLOCK_N), tl.float32)
    PARTS: tl.constexpr = 2 if CENTRED else 1
    first = part * rows_each
    for start in tl.range(first, tl.minimum(first + rows_each, M), 1, num_stages=STAGES):
        row = start + tl.arange(0, 1)
        offsets = row[:, None] * N + col[None, :]
        mask = in_row[None, :]
        dy = tl.load(dy_ptr + offsets, mask, 0.0).to(tl.float32)
        z = tl.load(z_ptr + offsets, mask, 0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if CENTRED:
            z -= tl.load(mean_ptr + row)[:, None]
        xhat = z * rstd[:, None]
        sums = sums_ptr + (row[:, None] * S + s[None, :]) * PARTS
        c1 = tl.sum(tl.load(sums, (s < S)[None, :], 0.0), 1)
        if CENTRED:
            c1 = c1 / N
            c2 = tl.sum(tl.load(sums + 1, (s < S)[None, :], 0.0), 1) / N
        else:
            c2 = c1 * rstd / N
        dz = _norm_bwd_row(dy, xhat, w, c1, c2, rstd, dz_in_ptr, offsets, mask, CENTRED)
        _store_gradients(dz, dz_ptr, dx_ptr, row, first_column, offsets, mask, seed, threshold, scale, DROPOUT)
        if partial_ptr is not None:
            dw += dy * xhat
            if CENTRED:
                db += dy
    if partial_ptr is not None:
        tl.store(partial_ptr + part * PARTS * N + col, tl.sum(dw, 0), in_row)
        if CENTRED:
            tl.store(partial_ptr + part * PARTS * N + N + col, tl.sum(db, 0), in_row)


def norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    N: int,
    eps: float,
    dropout_p: float,
    seed: int,
    out_dtype: torch.dtype | None,
    statistics: bool,
    centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(y, z, mean, rstd); mean is None where the norm is not centred."""
    M = x.numel() // N if N else 0
    stream = x if residual is None else residual
    y = torch.empty_like(x, dtype=out_dtype or stream.dtype)
    z = None if residual is None else torch.empty_like(residual)
    mean = x.new_empty(M, dtype=torch.float32) if statistics and centred else None
    rstd = x.new_empty(M, dtype=torch.float32) if statistics else None
    if M == 0:
        return y, z, mean, rstd
    dropout = dropout_arguments(dropout_p, seed)
    with on_device_of(x):
        rows, block, warps = forward_plan(N, architecture(x.device))
        if block >= N:
            _norm_fwd_kernel[(triton.cdiv(M, rows),)](
                x, residual, weight, bias, z, y, mean, rstd, M, N, eps, *dropout,
                centred, dropout_p > 0, rows, block, num_warps=warps,
            )  # fmt: skip
        else:
            S = triton.cdiv(N, block)
            partial = x.new_empty(M, S, 1 + centred, dtype=torch.float32)
            _norm_fwd_split_kernel[(M * S,)](
                x, residual, z, partial, N, S, *dropout, centred, dropout_p > 0, block, num_warps=warps
            )
            _norm_fwd_join_kernel[(M * S,)](
                x if z is None else z, weight, bias, partial, y, mean, rstd, N, S, eps,
                centred, block, triton.next_power_of_2(S), num_warps=warps,
            )  # fmt: skip
    return y, z, mean, rstd


def norm_bwd(
    dy: Tensor,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    N: int,
    dz_in: Tensor | None,
    dropout_p: float,
    seed: int,
    x_dtype: torch.dtype | None,
    weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dz, dx, the weights' gradients: (2, N) fp32 dw and db, or (1, N) dw alone without a mean)."""
    M, centred = z.numel() // N if N else 0, mean is not None
    x_dtype = x_dtype or z.dtype
    dz = torch.empty_like(z)
    dx = torch.empty_like(z, dtype=x_dtype) if dropout_p > 0 or x_dtype != z.dtype else None
    dropout = dropout_arguments(dropout_p, seed)
    tile, rows, block, S = backward_plan(N, dx is not None, architecture(z.device))
    parts, rows_each = persistent(M, rows, triton.cdiv(tile.programs * multiprocessors(z.device), S))
    partial = z.new_empty(parts, 1 + centred, N, dtype=torch.float32) if weight_grads else None
    with on_device_of(z):
        if M and S == 1:
            _norm_bwd_kernel[(parts,)](
                dy, z, weight, mean, rstd, dz_in, dz, dx, partial, M, rows_each, N, *dropout,
                centred, dropout_p > 0, rows, block, tile.stages, num_warps=tile.warps,
            )  # fmt: skip
        elif M:
            sums = z.new_empty(M, S, 1 + centred, dtype=torch.float32)
            _norm_bwd_split_kernel[(M * S,)](
                dy, z, weight, mean, rstd, sums, N, S, centred, block, num_warps=tile.warps
            )
            _norm_bwd_join_kernel[(parts * S,)](
                dy, z, weight, mean, rstd, dz_in, sums, dz, dx, partial, M, rows_each, N, S, *dropout,
                centred, dropout_p > 0, block, triton.next_power_of_2(S), tile.stages, num_warps=tile.warps,
            )  # fmt: skip
        grads = sum_partials(partial) if partial is not None else None
    return dz, dz if dx is None else dx, grads
