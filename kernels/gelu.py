"""GELU (Hendrycks & Gimpel 2016), exact and tanh form, with the bias addition before it and dropout after it.

  none: x Phi(x),  Phi from erfc of |x| / sqrt 2, so the left tail keeps its relative accuracy;
        derivative Phi(x) + x phi(x), whose e^(-x^2 / 2) the erfc has already computed.
  tanh: x s with s = sigmoid(2 u) = 1 / (1 + e), e = e^(-2u), u = sqrt(2/pi) (x + 0.044715 x^3);
        derivative s + 2 x s (1 - s) u'.
Forward reads x and writes y; backward reads dy and x and writes dx. With a bias, backward programs go down a block
of columns and keep its sum in registers; partial sums of fixed parts of the rows are added in order.
"""

from __future__ import annotations

import functools
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._core.architecture import SM80, Architecture

from ._common import (
    Table,
    Tile,
    architecture,
    dropout_arguments,
    dropout_factors,
    kernel,
    multiprocessors,
    on_device_of,
    persistent,
    sum_partials,
    tile_for,
)

# Not measured on any GPU yet: 16 elements a thread forward, 8 backward, where 16 spilled without 16-byte loads.
FORWARD: Table = {SM80: (Tile(1024, 2048, 4),)}
BACKWARD: Table = {SM80: (Tile(1024, 1024, 4, programs=8, stages=2),)}

SQRT_HALF = tl.constexpr(0.70710678118654752440)
INV_SQRT_2PI = tl.constexpr(0.39894228040143267794)
MINUS_2_SQRT_2_OVER_PI = tl.constexpr(-1.59576912160573071176)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _erfc_positive(x):
    """(erfc x, e^(-x^2)) for x >= 0: e^(-x^2) t S(t) with t = 1 / (1 + 0.35 x), S to 7.2e-9, as in csrc/cpu/vec.h.

    The rounding error of x^2 is carried along, or it alone would cost x^2 ULP.
    """
    square = x * x
    gauss = tl.exp(-square)
    gauss = gauss - tl.fma(x, x, -square) * gauss
    t = 1.0 / (1.0 + 0.35 * x)
    s = t * 3.854594753e-2 - 1.597394754e-1
    s = s * t + 1.834336031e-1
    s = s * t - 3.043471073e-2
    s = s * t + 8.938261805e-2
    s = s * t + 1.447152936e-1
    s = s * t + 1.516680224e-1
    s = s * t + 1.877934294e-1
    s = s * t + 1.971522634e-1
    s = s * t + 1.974830158e-1
    return gauss * t * s, gauss


@triton.jit
def _between(x, low, high):
    """x clamped, NaN let through."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _cdf(x):
    """(Phi(x), phi(x))."""
    tail, gauss = _erfc_positive(_between(tl.abs(x) * SQRT_HALF, 0.0, 40.0))
    return tl.where(x > 0, 1.0 - 0.5 * tail, 0.5 * tail), gauss * INV_SQRT_2PI


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    if TANH:
        e = tl.exp(x * (MINUS_2_SQRT_2_OVER_PI + MINUS_2_SQRT_2_OVER_PI * CUBIC * x * x))
        return x / (1.0 + e)
    else:
        phi, _ = _cdf(x)
        return x * phi


@triton.jit
def _gelu_derivative(x, TANH: tl.constexpr):
    if TANH:
        x = _between(x, -10.0, 10.0)  # beyond, s (1 - s) < 1e-37, and e would overflow
        e = tl.exp(x * (MINUS_2_SQRT_2_OVER_PI + MINUS_2_SQRT_2_OVER_PI * CUBIC * x * x))
        s = 1.0 / (1.0 + e)
        slope = -MINUS_2_SQRT_2_OVER_PI - 3 * MINUS_2_SQRT_2_OVER_PI * CUBIC * x * x
        return s + x * slope * (s * (e * s))  # 1 - s = e s: a difference would lose it near 1
    else:
        phi, density = _cdf(x)
        return phi + _between(x, -40.0, 40.0) * density


@kernel(do_not_specialize=["M", "seed", "threshold"])
def _gelu_fwd_kernel(
    x_ptr,  # (M, N)
    bias_ptr,  # (N) or None
    y_ptr,  # (M, N)
    M: tl.int64,
    N,
    seed: tl.int64,
    threshold: tl.uint32,
    scale,
    TANH: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    first_column = program % blocks * BLOCK_N
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    col = first_column + tl.arange(0, BLOCK_N)
    offsets = row[:, None] * N + col[None, :]
    mask = (row < M)[:, None] & (col < N)[None, :]
    x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + col, col < N, 0.0).to(tl.float32)[None, :]
    y = _gelu(x, TANH)
    if DROPOUT:
        y *= dropout_factors(row, first_column, seed, threshold, scale, BLOCK_N)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)


@kernel(do_not_specialize=["M", "rows_each", "seed", "threshold"])
def _gelu_bwd_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, N)
    bias_ptr,  # (N) or None
    dx_ptr,  # (M, N)
    partial_ptr,  # (parts of the rows, N) fp32, with bias
    M: tl.int64,
    rows_each: tl.int64,
    N,
    seed: tl.int64,
    threshold: tl.uint32,
    scale,
    TANH: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of columns over a part of the rows."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    part = program // blocks
    first_column = program % blocks * BLOCK_N
    col = first_column + tl.arange(0, BLOCK_N)
    in_row = col < N
    bias = tl.zeros((1, BLOCK_N), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, in_row, 0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    first = part * rows_each
    for start in tl.range(first, tl.minimum(first + rows_each, M), ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        offsets = row[:, None] * N + col[None, :]
        mask = (row < M)[:, None] & in_row[None, :]
        dy = tl.load(dy_ptr + offsets, mask, 0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32) + bias
        if DROPOUT:
            dy *= dropout_factors(row, first_column, seed, threshold, scale, BLOCK_N)
        dx = dy * _gelu_derivative(x, TANH)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask)
        total += dx
    if partial_ptr is not None:
        tl.store(partial_ptr + part * N + col, tl.sum(total, 0), in_row)


def _rows(x: Tensor, bias: Tensor | None, dropout_p: float) -> tuple[int, int]:
    """(M, N) as the kernels see x: one long row where the last dimension does not matter."""
    if bias is None and dropout_p == 0:
        return 1, x.numel()
    N = x.shape[-1] if x.dim() else 1
    return (x.numel() // N if N else 0), N


@functools.lru_cache(maxsize=1024)
def _plan(N: int, flat: bool, backward: bool, arch: Architecture) -> tuple[Tile, int, int]:
    """(configuration, rows and columns of a tile); a flat call has no rows to share a tile."""
    table = BACKWARD if backward else FORWARD
    if flat:
        tile = tile_for(table, arch, sys.maxsize)  # the last row
        return tile, 1, tile.elements
    tile = tile_for(table, arch, N)
    block = min(tile.block, max(16, triton.next_power_of_2(N)))
    return tile, tile.rows(block), block


def gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """As fastlm.backends.cpu.gelu.gelu_fwd."""
    y = torch.empty_like(x)
    M, N = _rows(x, bias, dropout_p)
    if M * N == 0:
        return y
    tile, rows, block = _plan(N if M > 1 else 0, M == 1, False, architecture(x.device))
    with on_device_of(x):
        _gelu_fwd_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, block),)](
            x, bias, y, M, N, *dropout_arguments(dropout_p, seed),
            tanh, dropout_p > 0, rows, block, num_warps=tile.warps,
        )  # fmt: skip
    return y


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, dropout_p: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """As fastlm.backends.cpu.gelu.gelu_bwd."""
    dx = torch.empty_like(x)
    M, N = _rows(x, bias, dropout_p)
    if M * N == 0:
        return dx, None if bias is None else bias.new_zeros(N, dtype=torch.float32)
    tile, rows, block = _plan(N if M > 1 else 0, M == 1, True, architecture(x.device))
    blocks = triton.cdiv(N, block)
    parts, rows_each = persistent(M, rows, triton.cdiv(tile.programs * multiprocessors(x.device), blocks))
    partial = None if bias is None else x.new_empty(parts, N, dtype=torch.float32)
    with on_device_of(x):
        _gelu_bwd_kernel[(parts * blocks,)](
            dy, x, bias, dx, partial, M, rows_each, N, *dropout_arguments(dropout_p, seed),
            tanh, dropout_p > 0, rows, block, tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        return dx, None if partial is None else sum_partials(partial)
