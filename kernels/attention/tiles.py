"""Tiles of the attention kernels: loads, stores and products, and what is not finite in them."""

from __future__ import annotations

import triton
import triton.language as tl

from .._common import INTERPRETING

# A tile of rows that are computed again, fewer of float32 where no matrix instruction takes these: little for
# registers, nothing for tensor memory.
RECOMPUTE_ROWS, RECOMPUTE_SINGLE_ROWS = tl.constexpr(16), tl.constexpr(4)
RECOMPUTE_KEYS = tl.constexpr(64 if INTERPRETING else 16)
INTERPRETED = tl.constexpr(INTERPRETING)


@triton.jit
def load_at(ptr, offset, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] from int64 offsets of rows with unit stride along D; 0 for those not there (None: all are)."""
    d = tl.arange(0, BLOCK_D)
    x_ptr = ptr + offset[:, None] + d[None, :]
    if there is None:
        if D == BLOCK_D:
            return tl.load(x_ptr)
        else:
            return tl.load(x_ptr, (d < D)[None, :], 0.0)
    else:
        mask = there[:, None]
        if D != BLOCK_D:
            mask = mask & (d < D)[None, :]
        return tl.load(x_ptr, mask, 0.0)


@triton.jit
def load_rows(x, row, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDS: tl.constexpr = True):
    """[rows, BLOCK_D] of a view, 0 from row `limit` on; without BOUNDS all rows are there."""
    if BOUNDS:
        return load_at(x.ptr, row.to(tl.int64) * x.row, row < limit, D, BLOCK_D)
    else:
        return load_at(x.ptr, row.to(tl.int64) * x.row, None, D, BLOCK_D)


@triton.jit
def load_block(x, first, N: tl.constexpr, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDS: tl.constexpr):
    """As `load_rows` the N rows from `first` on; where they are in the block is the same in each turn of a loop."""
    row = tl.arange(0, N)
    there = first + row < limit if BOUNDS else None
    return load_at(x.ptr + first.to(tl.int64) * x.row, row.to(tl.int64) * x.row, there, D, BLOCK_D)


@triton.jit
def store_at(ptr, x, offset, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if D != BLOCK_D:
        mask = mask & (d < D)[None, :]
    tl.store(ptr + offset[:, None] + d[None, :], x.to(ptr.dtype.element_ty), mask)


@triton.jit
def store_rows(view, x, row, limit, D: tl.constexpr, BLOCK_D: tl.constexpr):
    store_at(view.ptr, x, row.to(tl.int64) * view.row, row < limit, D, BLOCK_D)


@triton.jit
def dot(a, b, acc):
    """a @ b + acc in fp32; fp32 inputs are multiplied in full precision."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def has_non_finite(x):
    """Whether any of x is NaN or infinite."""
    return tl.sum(x * 0.0) != 0


@triton.jit
def finite(x):
    """(x with 0 in the place of what is not finite, 1 there and 0 elsewhere in x's dtype)."""
    kept = tl.abs(x.to(tl.float32)) < float("inf")
    return tl.where(kept, x, 0.0).to(x.dtype), tl.where(kept, 0.0, 1.0).to(x.dtype)


@triton.jit
def program_id_again(AMD: tl.constexpr):
    """The program's id, made anew: what follows from it takes no registers in the loops before."""
    if INTERPRETED:
        return tl.program_id(0)
    elif AMD:  # where the id lies depends on the GPU; a copy that the compiler does not see through costs a scalar one
        return tl.inline_asm_elementwise(
            "s_mov_b32 $0, $1", "=s,s", [tl.program_id(0)], tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], tl.int32, is_pure=False, pack=1)
