"""What the launchers of the attention kernels share: configuration tables, sizes and windows, masks' strides."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastlm._core.architecture import Architecture, newest

from .._common import INTERPRETING
from .._tuned import tuned
from .arguments import Config


class Blocks(NamedTuple):
    """A row of a configuration table: M queries by N keys a tile, `stages` tiles of the loop in flight."""

    M: int
    N: int
    warps: int
    stages: int


class Blocking(NamedTuple):
    """Configurations by the padded head size up to which they serve, for 2-byte and for 4-byte inputs.

    `half_masked` is for 2-byte inputs with a mask or dropout, whose factors need registers of their own; `half_busy`
    for those that have a softcap as well, or write the mask's gradient in the same pass.
    """

    half: dict[int, Blocks]
    single: dict[int, Blocks]
    half_masked: dict[int, Blocks] | None = None
    half_busy: dict[int, Blocks] | None = None


class Blockings(dict[Architecture, Blocking]):
    """Rows by the oldest architecture that they are for; hashed as an object, so that what is chosen can be kept."""

    __hash__ = object.__hash__  # type: ignore[assignment]


@functools.lru_cache(4096)
def blocks_for(
    table: Blockings, arch: Architecture, dtype: torch.dtype, head: int, masked: bool, busy: bool = False
) -> Blocks:
    """The row of the least head size that holds `head`, of the newest of arch's family that is no newer than it."""
    if INTERPRETING:  # which spends its time on programs, not on elements
        return Blocks(64, 128, 4, 1)
    rows = table[newest(table, arch)]
    if dtype == torch.float32:
        sizes = rows.single
    elif masked:
        sizes = (busy and rows.half_busy) or rows.half_masked or rows.half
    else:
        sizes = rows.half
    return tuned(table, arch, sizes[min(size for size in sizes if size >= head)])


def padded_head(D: int) -> int:
    """Columns of a tile: dots take powers of two from 16 on."""
    return max(16, triton.next_power_of_2(D))


class Geometry(NamedTuple):
    """What every kernel of a call gets: sizes as run-time arguments, features as compile-time ones."""

    B: int
    H: int
    T: int
    S: int
    group: int  # query heads a key head
    window_left: int
    window_right: int
    features: tuple[bool, bool]  # whether there is a bound to the left, to the right
    head: tuple[int, int, int, int]  # D, Dv, and both padded


def geometry(q: Tensor, k: Tensor, v: Tensor, B: int, window_left: int, window_right: int) -> Geometry:
    """For q (B, H, T, D), or (1, H, Tq, D) with B packed sequences in it."""
    return _geometry(B, *q.shape[1:], *v.shape[1:], window_left, window_right)


@functools.lru_cache(4096)
def _geometry(
    B: int, H: int, T: int, D: int, Hkv: int, S: int, Dv: int, window_left: int, window_right: int
) -> Geometry:
    limit = T + S  # a wider window is none, and 32 bits hold it
    left = window_left if 0 <= window_left < limit else -1
    right = window_right if 0 <= window_right < limit else -1
    return Geometry(
        B, H, T, S, H // max(Hkv, 1), left, right, (left >= 0, right >= 0),
        (D, Dv, padded_head(D), padded_head(Dv)),
    )  # fmt: skip


L2_BYTES = 24 * 2**20  # half of an H100's: what the keys and values of the heads in progress may take


@functools.lru_cache(4096)
def swizzle_heads(S: int, head_bytes: int, group: int) -> int:
    """How many query heads an L2 swizzle group has: their keys and values stay in L2."""
    return max(1, L2_BYTES // max(S * head_bytes, 1)) * group


def mask_strides(mask: Tensor | None) -> Sequence[int]:
    """A mask's strides, 0 where one element serves a whole dimension."""
    if mask is None:
        return 0, 0, 0, 0
    return [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]


def compiled_for(
    size: Geometry, blocks: Blocks, mask: Tensor | None, softcap: float, dropout_p: float, arch: Architecture
) -> Config:
    """What a call's kernel is compiled for."""
    natural = mask is not None and mask.dtype != torch.bool
    amd = arch.vendor == "amd"
    single = amd and arch.family == "cdna"
    return Config(*size.head, blocks.M, blocks.N, *size.features, softcap > 0, dropout_p > 0, natural, amd, single)
