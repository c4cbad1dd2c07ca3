"""Rotary position embedding (Su et al. 2021): pairs of the first 2 R elements of a head turn by their position's angle.

  y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin;   the pair is (i, i + R), or (2 i, 2 i + 1) where interleaved.
The inverse, with -sin, is also the gradient. Elements beyond 2 R are copied.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlm.backends.cpu import heads_like

from ._common import kernel, on_device_of

ELEMENTS, WARPS = 2048, 4  # pairs a program; not measured on any GPU yet


@kernel(do_not_specialize=["rows", "H", "L"])
def _rotary_kernel(
    x_ptr,  # (B, H, L, D) with strides
    cos_ptr,  # (L, R), or (B, L, R)
    sin_ptr,  # like cos
    y_ptr,  # (B, H, L, D) with strides
    rows: tl.int64,  # B H L
    H: tl.int64,
    L: tl.int64,
    R,
    rest,  # D - 2 R
    stride_xb,
    stride_xh,
    stride_xl,
    stride_yb,
    stride_yh,
    stride_yl,
    stride_table,
    sign,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b, h, t = row // (H * L), row // L % H, row % L
    x_row = x_ptr + (b * stride_xb + h * stride_xh + t * stride_xl)[:, None]
    y_row = y_ptr + (b * stride_yb + h * stride_yh + t * stride_yl)[:, None]
    i = tl.arange(0, BLOCK_R)
    mask = (row < rows)[:, None] & (i < R)[None, :]
    table = (b * stride_table + t * R)[:, None] + i[None, :]
    cos = tl.load(cos_ptr + table, mask, 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask, 0.0).to(tl.float32) * sign
    if INTERLEAVED:  # a tile of 2 R neighbours, so that loads and stores stay whole
        j = tl.arange(0, 2 * BLOCK_R)[None, :]
        both = (row < rows)[:, None] & (j < 2 * R)
        x1, x2 = tl.split(tl.reshape(tl.load(x_row + j, both, 0.0).to(tl.float32), (ROWS, BLOCK_R, 2)))
        y = tl.reshape(tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin), (ROWS, 2 * BLOCK_R))
        tl.store(y_row + j, y.to(y_ptr.dtype.element_ty), both)
    else:
        x1 = tl.load(x_row + i[None, :], mask, 0.0).to(tl.float32)
        x2 = tl.load(x_row + R + i[None, :], mask, 0.0).to(tl.float32)
        tl.store(y_row + i[None, :], (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask)
        tl.store(y_row + R + i[None, :], (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty), mask)
    if BLOCK_REST > 0:
        k = tl.arange(0, BLOCK_REST)
        kept = (row < rows)[:, None] & (k < rest)[None, :]
        tl.store(y_row + 2 * R + k[None, :], tl.load(x_row + 2 * R + k[None, :], kept, 0.0), kept)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """As fastlm.backends.cpu.rotary.rotary."""
    B, H, L, D = x.shape
    R = cos.shape[-1]
    y = heads_like(x)
    if x.numel() == 0:
        return y
    block = max(16, triton.next_power_of_2(R))
    rest = triton.next_power_of_2(D - 2 * R) if D > 2 * R else 0
    tile_rows = max(1, ELEMENTS // max(block, rest))
    with on_device_of(x):
        _rotary_kernel[(triton.cdiv(B * H * L, tile_rows),)](
            x, cos, sin, y, B * H * L, H, L, R, D - 2 * R, *x.stride()[:3], *y.stride()[:3],
            L * R if cos.dim() == 3 else 0, -1.0 if inverse else 1.0,
            interleaved, tile_rows, block, rest, num_warps=WARPS,
        )  # fmt: skip
    return y
