"""SwiGLU (Shazeer 2020): y = silu(gate) up, with silu(a) = a s and s = 1 / (1 + e^-a).

  dgate = dy up s (1 + a (1 - s)),   dup = dy a s.
Rows of gate and up may lie apart (halves of one projection); the outputs are contiguous.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from fastlm._core.architecture import SM80, Architecture

from ._common import Table, Tile, architecture, kernel, on_device_of, tile_for

# Not measured on any GPU yet: 16 elements a thread forward, 8 backward.
FORWARD: Table = {SM80: (Tile(1024, 2048, 4),)}
BACKWARD: Table = {SM80: (Tile(1024, 1024, 4),)}


@triton.jit
def _tile(M, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, columns, mask) of this program."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_N)
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    col = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    return row[:, None], col[None, :], (row < M)[:, None] & (col < N)[None, :]


@kernel(do_not_specialize=["M"])
def _swiglu_fwd_kernel(
    gate_ptr,  # M rows of N, a stride apart
    up_ptr,  # M rows of N, a stride apart
    y_ptr,  # (M, N)
    M: tl.int64,
    N,
    stride_gate,
    stride_up,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, col, mask = _tile(M, N, ROWS, BLOCK_N)
    gate = tl.load(gate_ptr + row * stride_gate + col, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + col, mask, 0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * N + col, y.to(y_ptr.dtype.element_ty), mask)


@kernel(do_not_specialize=["M"])
def _swiglu_bwd_kernel(
    dy_ptr,  # (M, N)
    gate_ptr,  # M rows of N, a stride apart
    up_ptr,  # M rows of N, a stride apart
    dgate_ptr,  # (M, N)
    dup_ptr,  # (M, N)
    M: tl.int64,
    N,
    stride_gate,
    stride_up,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, col, mask = _tile(M, N, ROWS, BLOCK_N)
    dy = tl.load(dy_ptr + row * N + col, mask, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + col, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + col, mask, 0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dgate_ptr + row * N + col, dgate.to(dgate_ptr.dtype.element_ty), mask)
    tl.store(dup_ptr + row * N + col, (dy * gate * s).to(dup_ptr.dtype.element_ty), mask)


@functools.lru_cache(maxsize=1024)
def _plan(N: int, backward: bool, arch: Architecture) -> tuple[int, int, int]:
    """(rows and columns of a tile, warps)."""
    tile = tile_for(BACKWARD if backward else FORWARD, arch, N)
    block = min(tile.block, max(16, triton.next_power_of_2(N)))
    return tile.rows(block), block, tile.warps


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """As fastlm.backends.cpu.swiglu.swiglu_fwd."""
    M, N = gate.shape
    y = gate.new_empty(M, N)
    if M * N:
        rows, block, warps = _plan(N, False, architecture(gate.device))
        with on_device_of(gate):
            _swiglu_fwd_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, block),)](
                gate, up, y, M, N, gate.stride(0), up.stride(0), rows, block, num_warps=warps
            )
    return y


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As fastlm.backends.cpu.swiglu.swiglu_bwd."""
    M, N = gate.shape
    dgate, dup = gate.new_empty(M, N), gate.new_empty(M, N)
    if M * N:
        rows, block, warps = _plan(N, True, architecture(gate.device))
        with on_device_of(gate):
            _swiglu_bwd_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, block),)](
                dy, gate, up, dgate, dup, M, N, gate.stride(0), up.stride(0), rows, block, num_warps=warps
            )
    return dgate, dup
