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
from typing import NamedTuple

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
    in_pairs,
    kernel,
    multiprocessors,
    on_device_of,
    persistent,
    sum_partials,
    tile_for,
    widened,
)

# Not measured on any GPU yet. 32 elements a thread, so that few threads share a row's sums: forward, rows of up to 1024
# need no other warp at all; backward, which keeps weights and their gradients in registers too, of several rows. There
# another program a multiprocessor would hide more latency, and write another partial sum of the weights' gradients.
FORWARD: Table = {
    SM80: (Tile(1024, 1024, 1), Tile(2048, 2048, 2), Tile(4096, 4096, 4), Tile(8192, 8192, 8), Tile(16384, 16384, 16)),
}
BACKWARD: Table = {
    SM80: (
        Tile(256, 1024, 2, programs=4),
        Tile(1024, 4096, 4, programs=2),
        Tile(2048, 8192, 8, programs=1),
        Tile(4096, 8192, 8, programs=1),
        Tile(8192, 8192, 8, programs=1),
    ),
}
ONE_BLOCK_FORWARD, ONE_BLOCK_BACKWARD = 16384, 8192  # the last row of each table
ONE_BLOCK_UNALIGNED = 8192  # forward without 16-byte loads
ONE_BLOCK_EXTRAS = 4096  # backward with a dx beside dz, or without 16-byte loads: beyond, registers spill
SPLIT = Tile(2048, 2048, 8, programs=2, stages=2)  # a block of a wider row


class Columns(NamedTuple):
    """A program's tile: ROWS rows of BLOCK_N columns, and whether rows have as many. PAIRS: as in `widened`.

    Sums over rows are kept for SUMS of them: for one where a thread has all of a column's rows.
    """

    ROWS: int
    SUMS: int
    BLOCK_N: int
    WHOLE: bool
    PAIRS: bool


def _columns(N: int, block: int, rows: int, warps: int, arch: Architecture) -> Columns:
    in_thread = block >= warps * arch.wavefront * 8
    return Columns(rows, 1 if in_thread else rows, block, block == N, in_pairs(arch))


@functools.cache
def forward_plan(N: int, arch: Architecture) -> tuple[Columns, int]:
    """(a program's tile, warps); blocks of SPLIT where a row does not fit into one."""
    if (ONE_BLOCK_UNALIGNED if N % 16 else ONE_BLOCK_FORWARD) < N:
        return _columns(N, SPLIT.block, 1, SPLIT.warps, arch), SPLIT.warps
    block = block_of(N)
    tile = tile_for(FORWARD, arch, block)
    return _columns(N, block, tile.rows(block), tile.warps, arch), tile.warps


@functools.cache
def backward_plan(N: int, with_dx: bool, arch: Architecture) -> tuple[Tile, Columns, int]:
    """(configuration, a program's tile, blocks a row)."""
    if (ONE_BLOCK_EXTRAS if with_dx or N % 16 else ONE_BLOCK_BACKWARD) < N:
        return SPLIT, _columns(N, SPLIT.block, 1, SPLIT.warps, arch), triton.cdiv(N, SPLIT.block)
    block = block_of(N)
    tile = tile_for(BACKWARD, arch, block)
    rows = tile.rows(block) if N % 16 == 0 or block < 1024 else 1  # an address for each element takes registers
    return tile, _columns(N, block, rows, tile.warps, arch), 1


@triton.jit
def _loaded(ptr, mask, PAIRS: tl.constexpr):
    """In fp32; with a mask of None all of it is there, with another 0 where it says no."""
    x = tl.load(ptr) if mask is None else tl.load(ptr, mask, 0.0)
    return widened(x, PAIRS)


@triton.jit
def _mask(first_row, M, col, N, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Of a tile of rows; None where all of it is there: of one row always, with WHOLE blocks."""
    if ROWS > 1:
        mask = (first_row + tl.arange(0, ROWS) < M)[:, None]
        return mask if WHOLE else mask & (col < N)[None, :]
    else:
        return None if WHOLE else (col < N)[None, :]


@triton.jit
def _inner(N, col, ROWS: tl.constexpr):
    """[ROWS, BLOCK_N] int32: where a tile's elements are, from its first one on."""
    inner = col[None, :]
    if ROWS > 1:
        inner += tl.arange(0, ROWS)[:, None] * N
    return inner


@triton.jit
def _two_sums(a, b):
    """Sums of two tiles along rows, in one pass through shared memory."""
    return tl.split(tl.sum(tl.join(a, b), 1))


@triton.jit
def _residual_stream(
    x_ptr, residual_ptr, z_ptr, row, first_column, offsets, mask, seed, threshold, scale, DROPOUT: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """What is normalized, in fp32: x, or z = residual + dropout(x) as its own dtype stores it."""
    z = _loaded(x_ptr + offsets, mask, PAIRS)
    if residual_ptr is not None:
        if DROPOUT:
            z *= dropout_factors(row, first_column, seed, threshold, scale, offsets.shape[1])
        z += _loaded(residual_ptr + offsets, mask, PAIRS)
        stored = z.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + offsets, stored, mask)
        z = stored.to(tl.float32)
    return z


@triton.jit
def _scaled(xhat, w_ptr, b_ptr, col, in_row, PAIRS: tl.constexpr):
    """xhat w + b."""
    if w_ptr is not None:
        xhat *= _loaded(w_ptr + col, in_row, PAIRS)[None, :]
    if b_ptr is not None:
        xhat += _loaded(b_ptr + col, in_row, PAIRS)[None, :]
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
    inv_n,
    eps,
    seed: tl.int64,
    threshold: tl.uint32,
    scale,
    CENTRED: tl.constexpr,
    DROPOUT: tl.constexpr,
    tile: tl.constexpr,
):
    ROWS: tl.constexpr = tile.ROWS
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    col = tl.arange(0, tile.BLOCK_N)
    width = tile.BLOCK_N if tile.WHOLE else N
    start = first_row * width
    inner = _inner(width, col, ROWS)
    mask = _mask(first_row, M, col, N, ROWS, tile.WHOLE)
    in_row = None if tile.WHOLE else col < N
    z = _residual_stream(
        x_ptr + start, residual_ptr if residual_ptr is None else residual_ptr + start,
        z_ptr if z_ptr is None else z_ptr + start, row, 0, inner, mask, seed, threshold, scale, DROPOUT, tile.PAIRS,
    )  # fmt: skip
    if CENTRED:  # in two passes, since one would lose everything to a large mean; the second finds the first's rounding
        mean = tl.sum(z, 1) * inv_n
        z -= mean[:, None]
        if not tile.WHOLE:
            z = tl.where((col < N)[None, :], z, 0.0)
        total, squares = _two_sums(z, z * z)
        shift = total * inv_n
        rstd = tl.rsqrt(tl.maximum(squares * inv_n - shift * shift, 0.0, tl.PropagateNan.ALL) + eps)
        xhat = z * rstd[:, None] - (shift * rstd)[:, None]
        mean += shift
    else:
        rstd = tl.rsqrt(tl.sum(z * z, 1) * inv_n + eps)
        xhat = z * rstd[:, None]
    y = _scaled(xhat, w_ptr, b_ptr, col, in_row, tile.PAIRS)
    tl.store(y_ptr + start + inner, y.to(y_ptr.dtype.element_ty), mask)
    if CENTRED and mean_ptr is not None:
        tl.store(mean_ptr + row, mean, row < M)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, row < M)


@triton.jit
def _norm_bwd_row(dy, z, w, c1, c2, dz_in_ptr, offsets, mask, CENTRED: tl.constexpr, PAIRS: tl.constexpr):
    """dz of dy rstd and z - mean; c1 is mean(g) rstd, c2 mean(g xhat) rstd^2."""
    dz = z * -c2[:, None]
    if CENTRED:
        dz -= c1[:, None]
    dz += dy * w
    if dz_in_ptr is not None:
        dz += _loaded(dz_in_ptr + offsets, mask, PAIRS)
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


class _Rows(NamedTuple):
    """What backward takes and gives row by row; see _norm_bwd_kernel."""

    dy: tl.tensor
    z: tl.tensor
    mean: tl.tensor | None
    rstd: tl.tensor
    dz_in: tl.tensor | None
    dz: tl.tensor
    dx: tl.tensor | None
    M: tl.tensor
    N: tl.tensor
    inv_n: tl.tensor


@triton.jit
def _norm_bwd_tile(
    rows, w, dw, db, start, seed, threshold, scale,
    CENTRED: tl.constexpr, DROPOUT: tl.constexpr, tile: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS rows from `start` on, and dw and db with theirs. Without MASKED there are as many."""
    ROWS: tl.constexpr = tile.ROWS
    col = tl.arange(0, tile.BLOCK_N)
    row = start + tl.arange(0, ROWS)
    there = row < rows.M if MASKED else None
    mask = None if tile.WHOLE else (col < rows.N)[None, :]
    if MASKED:
        mask = _mask(start, rows.M, col, rows.N, ROWS, tile.WHOLE)
    N = tile.BLOCK_N if tile.WHOLE else rows.N
    begin, inner = start * N, _inner(N, col, ROWS)
    dy = _loaded(rows.dy + begin + inner, mask, tile.PAIRS)
    z = _loaded(rows.z + begin + inner, mask, tile.PAIRS)
    if CENTRED:
        z -= _loaded(rows.mean + row, there, False)[:, None]
        db += tl.sum(dy, 0, keep_dims=True) if tile.SUMS == 1 else dy
    rstd = _loaded(rows.rstd + row, there, False)
    dy *= rstd[:, None]
    product = dy * z
    dw += tl.sum(product, 0, keep_dims=True) if tile.SUMS == 1 else product
    if CENTRED:
        c1, c2 = _two_sums(dy * w, product * w)
        c1 *= rows.inv_n
    else:
        c1, c2 = 0.0, tl.sum(product * w, 1)
    c2 *= rows.inv_n * rstd * rstd
    dz_in = rows.dz_in if rows.dz_in is None else rows.dz_in + begin
    dz = _norm_bwd_row(dy, z, w, c1, c2, dz_in, inner, mask, CENTRED, tile.PAIRS)
    dx = rows.dx if rows.dx is None else rows.dx + begin
    _store_gradients(dz, rows.dz + begin, dx, row, 0, inner, mask, seed, threshold, scale, DROPOUT)
    return dw, db


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
    inv_n,
    seed: tl.int64,
    threshold: tl.uint32,
    scale,
    CENTRED: tl.constexpr,
    DROPOUT: tl.constexpr,
    tile: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = tile.ROWS
    BLOCK_N: tl.constexpr = tile.BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_N)
    in_row = None if tile.WHOLE else col < N
    w = tl.full((1, BLOCK_N), 1.0, tl.float32)
    if w_ptr is not None:
        w = _loaded(w_ptr + col, in_row, tile.PAIRS)[None, :]
    SUMS: tl.constexpr = tile.SUMS
    dw = tl.zeros((SUMS, BLOCK_N), tl.float32)
    db = tl.zeros((SUMS, BLOCK_N), tl.float32)
    PARTS: tl.constexpr = 2 if CENTRED else 1
    rows = _Rows(dy_ptr, z_ptr, mean_ptr, rstd_ptr, dz_in_ptr, dz_ptr, dx_ptr, M, N, inv_n)
    first = program * rows_each
    end = tl.minimum(first + rows_each, M)
    whole_end = first + tl.maximum(end - first, 0) // ROWS * ROWS
    for start in tl.range(first, whole_end, ROWS, num_stages=STAGES):
        dw, db = _norm_bwd_tile(rows, w, dw, db, start, seed, threshold, scale, CENTRED, DROPOUT, tile, False)
    if ROWS > 1:
        for start in tl.range(whole_end, end, ROWS):
            dw, db = _norm_bwd_tile(rows, w, dw, db, start, seed, threshold, scale, CENTRED, DROPOUT, tile, True)
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
    z = _residual_stream(
        x_ptr, residual_ptr, z_ptr, row, first_column, offsets, mask, seed, threshold, scale, DROPOUT, False
    )
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
    y = _scaled((z * rstd)[None, :], w_ptr, b_ptr, col, col < N, False)
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
        if partial_ptr is not None and CENTRED:
            db += dy
        dy *= rstd[:, None]
        if partial_ptr is not None:
            dw += dy * z
        sums = sums_ptr + (row[:, None] * S + s[None, :]) * PARTS
        c1 = tl.sum(tl.load(sums, (s < S)[None, :], 0.0), 1)
        if CENTRED:
            c1 = c1 / N * rstd
            c2 = tl.sum(tl.load(sums + 1, (s < S)[None, :], 0.0), 1) / N
        else:
            c2 = c1 * rstd / N
        dz = _norm_bwd_row(dy, z, w, c1, c2 * rstd * rstd, dz_in_ptr, offsets, mask, CENTRED, False)
        _store_gradients(dz, dz_ptr, dx_ptr, row, first_column, offsets, mask, seed, threshold, scale, DROPOUT)
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
        tile, warps = forward_plan(N, architecture(x.device))
        if tile.BLOCK_N >= N:
            _norm_fwd_kernel[(triton.cdiv(M, tile.ROWS),)](
                x, residual, weight, bias, z, y, mean, rstd, M, N, 1.0 / N, eps, *dropout,
                centred, dropout_p > 0, tile, num_warps=warps,
            )  # fmt: skip
        else:
            block, S = tile.BLOCK_N, triton.cdiv(N, tile.BLOCK_N)
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
    tile, columns, S = backward_plan(N, dx is not None, architecture(z.device))
    parts, rows_each = persistent(M, columns.ROWS, triton.cdiv(tile.programs * multiprocessors(z.device), S))
    partial = z.new_empty(parts, 1 + centred, N, dtype=torch.float32) if weight_grads else None
    with on_device_of(z):
        if M and S == 1:
            _norm_bwd_kernel[(parts,)](
                dy, z, weight, mean, rstd, dz_in, dz, dx, partial, M, rows_each, N, 1.0 / N, *dropout,
                centred, dropout_p > 0, columns, tile.stages, num_warps=tile.warps,
            )  # fmt: skip
        elif M:
            sums = z.new_empty(M, S, 1 + centred, dtype=torch.float32)
            _norm_bwd_split_kernel[(M * S,)](
                dy, z, weight, mean, rstd, sums, N, S, centred, columns.BLOCK_N, num_warps=tile.warps
            )
            _norm_bwd_join_kernel[(parts * S,)](
                dy, z, weight, mean, rstd, dz_in, sums, dz, dx, partial, M, rows_each, N, S, *dropout,
                centred, dropout_p > 0, columns.BLOCK_N, triton.next_power_of_2(S), tile.stages, num_warps=tile.warps,
            )  # fmt: skip
        grads = sum_partials(partial) if partial is not None else None
    return dz, dz if dx is None else dx, grads
