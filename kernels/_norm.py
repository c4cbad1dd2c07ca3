"""How both norms share their rows out: the configuration tables and the plans made from them."""

from __future__ import annotations

import functools

import triton

from ._common import Table, Tile, block_of, tile_for

# Not measured on any GPU yet: 16 or 32 elements a thread, by registers and occupancy alone.
FORWARD: Table = {
    80: (Tile(2048, 2048, 4), Tile(4096, 4096, 8), Tile(8192, 8192, 16), Tile(16384, 16384, 16)),
}
# Five fp32 values an element live in registers here: x, dy, w and layer_norm's two sums.
BACKWARD: Table = {
    80: (
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
def forward_plan(N: int, arch: int) -> tuple[int, int, int]:
    """(rows and columns of a tile, warps); blocks of SPLIT where a row does not fit into one."""
    if (ONE_BLOCK_UNALIGNED if N % 16 else ONE_BLOCK_FORWARD) < N:
        return 1, SPLIT.block, SPLIT.warps
    block = block_of(N)
    tile = tile_for(FORWARD, arch, block)
    return tile.rows(block), block, tile.warps


@functools.cache
def backward_plan(N: int, with_dx: bool, arch: int) -> tuple[Tile, int, int, int]:
    """(configuration, rows and columns of a tile, blocks a row)."""
    if (ONE_BLOCK_EXTRAS if with_dx or N % 16 else ONE_BLOCK_BACKWARD) < N:
        return SPLIT, 1, SPLIT.block, triton.cdiv(N, SPLIT.block)
    block = block_of(N)
    tile = tile_for(BACKWARD, arch, block)
    return tile, tile.rows(block), block, 1
