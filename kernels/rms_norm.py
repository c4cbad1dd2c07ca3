"""RMS normalization, alone and fused with the residual addition before it.

Forward, a row: z = x + residual; rstd = 1 / sqrt(mean(z^2) + eps); y = z rstd w.
Backward, a row, with g = dy w and xhat = z rstd:   dz = rstd (g - xhat mean(g xhat)) + dz_in,   dw = sum dy xhat.

Rows up to ONE_BLOCK columns stay in registers: one read of each input, one write of each output. Backward runs as
persistent programs, each over its own rows, that keep dw in registers and write one partial. Wider rows go block by
block, and are read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, multiprocessors, on_device_of, persistent, sum_partials
from ._norm import backward_plan, forward_plan


@triton.jit
def _residual_stream(x_ptr, residual_ptr, z_ptr, offsets, mask):
    """What is normalized, in fp32: x, or z = x + residual as its own dtype stores it."""
    z = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask, 0.0).to(tl.float32)
        stored = z.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + offsets, stored, mask)
        z = stored.to(tl.float32)
    return z


@triton.jit(do_not_specialize=["M"])
def _rms_norm_fwd_kernel(
    x_ptr,  # (M, N)
    residual_ptr,  # (M, N) or None
    w_ptr,  # (N) or None
    z_ptr,  # (M, N), with residual
    y_ptr,  # (M, N)
    rstd_ptr,  # (M) fp32 or None
    M: tl.int64,
    N,
    eps,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_N)
    offsets = row[:, None] * N + col[None, :]
    mask = (row < M)[:, None] & (col < N)[None, :]
    z = _residual_stream(x_ptr, residual_ptr, z_ptr, offsets, mask)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(z * z, 1) / N + eps)
    y = z * rstd[:, None]
    if w_ptr is not None:
        y *= tl.load(w_ptr + col, col < N, 0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, row < M)


@triton.jit
def _store_gradients(dz, dz_in_ptr, dz_ptr, dx_ptr, offsets, mask):
    if dz_in_ptr is not None:
        dz += tl.load(dz_in_ptr + offsets, mask, 0.0).to(tl.float32)
    tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask)
    if dx_ptr is not None:
        tl.store(dx_ptr + offsets, dz.to(dx_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M", "rows_each"])
def _rms_norm_bwd_kernel(
    dy_ptr,  # (M, N)
    z_ptr,  # (M, N), what was normalized
    w_ptr,  # (N) or None
    rstd_ptr,  # (M) fp32
    dz_in_ptr,  # (M, N) or None: added to dz
    dz_ptr,  # (M, N)
    dx_ptr,  # (M, N) or None: dz in x's dtype
    partial_ptr,  # (programs, N) fp32 or None
    M: tl.int64,
    rows_each: tl.int64,
    N,
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
    first = program * rows_each
    for start in tl.range(first, tl.minimum(first + rows_each, M), ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        offsets = row[:, None] * N + col[None, :]
        mask = (row < M)[:, None] & in_row[None, :]
        dy = tl.load(dy_ptr + offsets, mask, 0.0).to(tl.float32)
        z = tl.load(z_ptr + offsets, mask, 0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, row < M, 0.0)
        xhat = z * rstd[:, None]
        c = tl.sum(dy * w * xhat, 1) / N
        dz = (dy * w - xhat * c[:, None]) * rstd[:, None]
        _store_gradients(dz, dz_in_ptr, dz_ptr, dx_ptr, offsets, mask)
        if partial_ptr is not None:
            dw += dy * xhat
    if partial_ptr is not None:
        tl.store(partial_ptr + program * N + col, tl.sum(dw, 0), in_row)


@triton.jit(do_not_specialize=["S"])
def _rms_norm_split_kernel(
    x_ptr,  # (M, N): forward's x, or dy with `other`
    other_ptr,  # (M, N): forward's residual or None; backward's z
    w_ptr,  # (N) or None: backward's weight
    z_ptr,  # (M, N): where forward stores x + residual, with it
    sums_ptr,  # (M, S) fp32: of each block, the sum of z^2, or backward's sum of dy w z
    N,
    S,
    BACKWARD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    col = program % S * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = program // S * N + col
    if BACKWARD:
        z = tl.load(other_ptr + offsets, col < N, 0.0).to(tl.float32)
        g = tl.load(x_ptr + offsets, col < N, 0.0).to(tl.float32)
        if w_ptr is not None:
            g *= tl.load(w_ptr + col, col < N, 0.0).to(tl.float32)
    else:
        z = _residual_stream(x_ptr, other_ptr, z_ptr, offsets, col < N)
        g = z
    tl.store(sums_ptr + program, tl.sum(g * z))


@triton.jit(do_not_specialize=["S"])
def _rms_norm_fwd_join_kernel(
    z_ptr,  # (M, N)
    w_ptr,  # (N) or None
    sums_ptr,  # (M, S) fp32
    y_ptr,  # (M, N)
    rstd_ptr,  # (M) fp32 or None
    N,
    S,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // S
    s = tl.arange(0, BLOCK_S)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.load(sums_ptr + row * S + s, s < S, 0.0)) / N + eps)
    col = program % S * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(z_ptr + row * N + col, col < N, 0.0).to(tl.float32) * rstd
    if w_ptr is not None:
        y *= tl.load(w_ptr + col, col < N, 0.0).to(tl.float32)
    tl.store(y_ptr + row * N + col, y.to(y_ptr.dtype.element_ty), col < N)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, program % S == 0)


@triton.jit(do_not_specialize=["M", "rows_each", "S"])
def _rms_norm_bwd_join_kernel(
    dy_ptr,  # (M, N)
    z_ptr,  # (M, N)
    w_ptr,  # (N) or None
    rstd_ptr,  # (M) fp32
    dz_in_ptr,  # (M, N) or None
    sums_ptr,  # (M, S) fp32
    dz_ptr,  # (M, N)
    dx_ptr,  # (M, N) or None
    partial_ptr,  # (programs / S, N) fp32 or None
    M: tl.int64,
    rows_each: tl.int64,
    N,
    S,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of columns over a share of the rows."""
    program = tl.program_id(0).to(tl.int64)
    share = program // S
    col = program % S * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    in_row = col < N
    w = tl.full((BLOCK_N,), 1.0, tl.float32)
    if w_ptr is not None:
        w = tl.load(w_ptr + col, in_row, 0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_N,), tl.float32)
    first = share * rows_each
    for row in tl.range(first, tl.minimum(first + rows_each, M), 1, num_stages=STAGES):
        offsets = row * N + col
        dy = tl.load(dy_ptr + offsets, in_row, 0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = tl.load(z_ptr + offsets, in_row, 0.0).to(tl.float32) * rstd
        c = tl.sum(tl.load(sums_ptr + row * S + s, s < S, 0.0)) * rstd / N
        dz = (dy * w - xhat * c) * rstd
        _store_gradients(dz, dz_in_ptr, dz_ptr, dx_ptr, offsets, in_row)
        if partial_ptr is not None:
            dw += dy * xhat
    if partial_ptr is not None:
        tl.store(partial_ptr + share * N + col, dw, in_row)


def rms_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    N: int,
    eps: float,
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As fastlm.backends.cpu.rms_norm.rms_norm_fwd."""
    M = x.numel() // N if N else 0
    stream = x if residual is None else residual
    y = torch.empty_like(x, dtype=out_dtype or stream.dtype)
    z = None if residual is None else torch.empty_like(residual)
    rstd = x.new_empty(M, dtype=torch.float32) if statistics else None
    if M == 0:
        return y, z, rstd
    rows, block, warps = forward_plan(N, architecture(x.device))
    with on_device_of(x):
        if block >= N:
            _rms_norm_fwd_kernel[(triton.cdiv(M, rows),)](
                x, residual, weight, z, y, rstd, M, N, eps, rows, block, num_warps=warps
            )
        else:
            S = triton.cdiv(N, block)
            sums = x.new_empty(M, S, dtype=torch.float32)
            _rms_norm_split_kernel[(M * S,)](x, residual, None, z, sums, N, S, False, block, num_warps=warps)
            _rms_norm_fwd_join_kernel[(M * S,)](
                x if z is None else z, weight, sums, y, rstd, N, S, eps,
                block, triton.next_power_of_2(S), num_warps=warps,
            )  # fmt: skip
    return y, z, rstd


def rms_norm_bwd(
    dy: Tensor,
    z: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    N: int,
    dz_in: Tensor | None = None,
    x_dtype: torch.dtype | None = None,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As fastlm.backends.cpu.rms_norm.rms_norm_bwd."""
    M = z.numel() // N if N else 0
    dz = torch.empty_like(z)
    dx = torch.empty_like(z, dtype=x_dtype) if x_dtype not in (None, z.dtype) else None
    tile, rows, block, S = backward_plan(N, dx is not None, architecture(z.device))
    shares, rows_each = persistent(M, rows, triton.cdiv(tile.programs * multiprocessors(z.device), S))
    partial = z.new_empty(shares, N, dtype=torch.float32) if weight_grad else None
    with on_device_of(z):
        if M and S == 1:
            _rms_norm_bwd_kernel[(shares,)](
                dy, z, weight, rstd, dz_in, dz, dx, partial, M, rows_each, N,
                rows, block, tile.stages, num_warps=tile.warps,
            )  # fmt: skip
        elif M:
            sums = z.new_empty(M, S, dtype=torch.float32)
            _rms_norm_split_kernel[(M * S,)](dy, z, weight, None, sums, N, S, True, block, num_warps=tile.warps)
            _rms_norm_bwd_join_kernel[(shares * S,)](
                dy, z, weight, rstd, dz_in, sums, dz, dx, partial, M, rows_each, N, S,
                block, triton.next_power_of_2(S), tile.stages, num_warps=tile.warps,
            )  # fmt: skip
        dw = sum_partials(partial) if partial is not None else None
    return dz, dz if dx is None else dx, dw
