"""What a program works on: the tile scheduler, its sequence, and the blocks that its loops go over."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Schedule(NamedTuple):
    """The programs of a grid."""

    tiles: tl.tensor  # of a head
    heads: tl.tensor  # in all batches
    swizzle: tl.tensor  # heads of an L2 swizzle group


@triton.jit
def scheduled_tile(program, schedule, REVERSED: tl.constexpr):
    """The tile scheduler: a program's (tile, head).

    L2 swizzle groups go in order; inside one, the same tile of all its heads in turn, so that their keys and values
    stay in L2. REVERSED starts with the last tiles, which are the longest under a causal mask: no long one is left for
    the end.
    """
    group = program // (schedule.tiles * schedule.swizzle)
    first = group * schedule.swizzle
    inner = program - first * schedule.tiles
    size = tl.minimum(schedule.swizzle, schedule.heads - first)
    tile = inner // size
    return tl.where(REVERSED, schedule.tiles - 1 - tile, tile), first + inner % size


class SeqlenInfo(NamedTuple):
    """One sequence, in all that is packed or alone."""

    sequence: tl.tensor  # which one
    batch: tl.tensor  # where the tensors have it: 0 where sequences are packed
    offset_q: tl.tensor  # int64: its first query among the packed ones
    offset_k: tl.tensor
    seqlen_q: tl.tensor
    seqlen_k: tl.tensor


@triton.jit
def _find_sequence(cu_ptr, tile, B, BLOCK: tl.constexpr):
    """Which packed sequence a tile belongs to; sequence b owns the tiles from cu[b] // BLOCK + b on.

    So cdiv(total, BLOCK) + B tiles cover every sequence, wherever the boundaries are: the host need not know them.
    """
    low = tile * 0
    high = low + B
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_ptr + middle) // BLOCK + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, tile - (tl.load(cu_ptr + low) // BLOCK + low)


@triton.jit
def seqlen_info(tile, head, cu_ptr, packing, sizes, H, BLOCK: tl.constexpr):
    """(tile of its sequence, head of its batch, SeqlenInfo) of a scheduled tile.

    cu_ptr: packing's cu_q or cu_k, whichever the tiles go over; H: heads of what they go over.
    """
    if cu_ptr is None:
        b = head // H
        zero = b.to(tl.int64) * 0
        return tile, head % H, SeqlenInfo(b, b, zero, zero, sizes.T, sizes.S)
    else:
        b, tile = _find_sequence(cu_ptr, tile, sizes.B, BLOCK)
        q_start = tl.load(packing.cu_q + b)
        k_start = tl.load(packing.cu_k + b)
        T = tl.minimum(tl.load(packing.cu_q + b + 1), sizes.T) - q_start  # offsets are not checked on a GPU
        S = tl.minimum(tl.load(packing.cu_k + b + 1), sizes.S) - k_start
        return tile, head, SeqlenInfo(b, b * 0, q_start.to(tl.int64), k_start.to(tl.int64), T, S)


@triton.jit
def store_limit(cu_ptr, sequence, B, own, total):
    """Rows that a sequence's programs write: its own, and for the last one what follows the last boundary too."""
    if cu_ptr is None:
        return own
    else:
        return tl.where(sequence == B - 1, total - tl.load(cu_ptr + sequence), own)


class BlockRange(NamedTuple):
    """Where a tile's loop begins and ends; between the two others nothing of a block is outside of the window."""

    start: tl.tensor
    unmasked: tl.tensor
    unmasked_end: tl.tensor
    end: tl.tensor


@triton.jit
def _block_range(
    first,
    own,
    other,
    before,
    after,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Blocks of OTHER, of `other` rows, that a tile of OWN meets from `first` on, of `own` rows.

    Everything meets from `before` ahead of itself to `after` behind itself, where BEFORE and AFTER say that there
    are such bounds. TAIL: a block over the end is not unmasked.
    """
    start = first * 0
    unmasked = start
    end = start + other
    unmasked_end = end
    if AFTER:
        end = tl.minimum(other, first + OWN + after)
        unmasked_end = tl.minimum(other, first + after + 1)
    if BEFORE:
        start = tl.maximum(0, first - before) // OTHER * OTHER
        unmasked = tl.cdiv(tl.maximum(0, first + OWN - 1 - before), OTHER) * OTHER
        unmasked = tl.maximum(start, tl.minimum(unmasked, tl.cdiv(end, OTHER) * OTHER))
    if AFTER or TAIL:
        unmasked_end = unmasked_end // OTHER * OTHER
    unmasked_end = tl.maximum(unmasked, unmasked_end)
    end = tl.where(first < own, end, start)  # nothing for rows after the last sequence
    return BlockRange(start, unmasked, unmasked_end, end)


@triton.jit
def n_block_range(first, seqlen, window, config: tl.constexpr):
    """Blocks of keys for a tile of queries."""
    return _block_range(
        first, seqlen.seqlen_q, seqlen.seqlen_k, window.left, window.right,
        config.M, config.N, config.LEFT, config.RIGHT, True,
    )  # fmt: skip


@triton.jit
def m_block_range(first, seqlen, window, config: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Blocks of M queries for a tile of N keys."""
    return _block_range(
        first, seqlen.seqlen_k, seqlen.seqlen_q, window.right, window.left, N, M, config.RIGHT, config.LEFT, False
    )


@triton.jit
def phase_of(blocks, PHASE: tl.constexpr, WHOLE: tl.constexpr = False):
    """(start, end) of the loop before the unmasked blocks (0), over them (1) or after them (2); WHOLE: of all."""
    if WHOLE:
        return blocks.start, blocks.end
    else:
        start = blocks.start if PHASE == 0 else blocks.unmasked if PHASE == 1 else blocks.unmasked_end
        end = blocks.unmasked if PHASE == 0 else blocks.unmasked_end if PHASE == 1 else blocks.end
        return start, tl.minimum(blocks.end, end)
