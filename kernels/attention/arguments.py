"""What the attention kernels take, in objects.

A kernel's own parameters stay flat: Triton types and specializes only those one by one (strides are int64 however
small, sizes are never specialized on), and would compile again for other numbers inside of a tuple.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .._common import Dropout


class Config(NamedTuple):
    """What a kernel is compiled for, beside its arguments' types."""

    D: int
    DV: int
    BLOCK_D: int  # D and DV, padded
    BLOCK_DV: int
    M: int  # queries of a tile
    N: int  # keys of a tile
    LEFT: bool  # whether the window has a left edge
    RIGHT: bool
    SOFTCAP: bool
    DROPOUT: bool
    NATURAL: bool  # scores in natural units, not in log2 units
    AMD: bool  # whether it is for AMD's GPUs
    SINGLE: bool  # whether their matrix instructions take float32 whole


class View(NamedTuple):
    """A tensor (batch, heads, rows, D): where it begins, and its strides; that of D is 1."""

    ptr: tl.tensor
    batch: tl.tensor
    head: tl.tensor
    row: tl.tensor


class Mask(NamedTuple):
    """A mask (B, H, T, S), or None, and its strides: 0 where it broadcasts."""

    ptr: tl.tensor | None
    batch: tl.tensor
    head: tl.tensor
    row: tl.tensor
    column: tl.tensor


class Packing(NamedTuple):
    """Where packed sequences begin, (B + 1) int32; None where each batch is a sequence."""

    cu_q: tl.tensor | None
    cu_k: tl.tensor | None


class Sizes(NamedTuple):
    B: tl.tensor  # sequences
    H: tl.tensor
    T: tl.tensor  # queries: all of them, where sequences are packed
    S: tl.tensor  # keys
    group: tl.tensor  # query heads a key head


class Window(NamedTuple):
    left: tl.tensor
    right: tl.tensor


class Scoring(NamedTuple):
    scale: tl.tensor
    softcap: tl.tensor
    window: Window


class Args(NamedTuple):
    """What every pass over the scores needs."""

    q: View
    k: View
    v: View
    mask: Mask
    packing: Packing
    sizes: Sizes
    scoring: Scoring
    dropout: Dropout


@triton.jit
def at(x, batch, head, row):
    """The view from a row of a head on."""
    return View(x.ptr + (batch * x.batch + head * x.head + row * x.row), x.batch, x.head, x.row)
