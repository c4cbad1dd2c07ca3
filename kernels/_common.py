"""What the Triton kernels share: tables by architecture, dropout, the ordered sum of partial gradients.

Kernels follow these rules. Program ids and row numbers are int64 before they multiply a stride; every dimension is
masked; loads widen to fp32 and stores narrow once. A reduction that reaches a result is two-stage and ordered, never
atomic. Optional pointers are None, which Triton compiles away. Row counts are never specialized on, so that one
compiled kernel serves every batch; row lengths are, on divisibility by 16, which is what vector loads need. A mask is
made of comparisons of blocks: where a comparison of scalars is spread to a block, Triton's interpreter gives it their
type, which that of triton 3.9 takes for no mask. What is launched is marked `kernel`, what it calls `triton.jit`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm._core import architecture as _architecture
from fastlm._core.architecture import SM90, Architecture, newest
from fastlm._core.dropout import DeviceSeed
from fastlm.errors import BackendError

from ._tuned import tuned

INTERPRETING = triton.knobs.runtime.interpret

# What stands in for a GPU where there is none: under the interpreter, and to compile ahead of time.
ASSUMED_ARCHITECTURE, ASSUMED_MULTIPROCESSORS = SM90, 132


def architecture(device: torch.device) -> Architecture:
    """The device's; ROCm's devices are of type cuda too."""
    return _architecture.architecture(device.index) if device.type == "cuda" else ASSUMED_ARCHITECTURE


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    return _multiprocessors(device.index) if device.type == "cuda" else ASSUMED_MULTIPROCESSORS


class _Kernel:
    """A compiled function that is launched: `kernel[grid](...)`."""

    def __init__(self, function: Any):
        self._function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        # Results depend on it to the bit, and Triton 3.9 says that 3.10 leaves it out unless asked.
        return functools.partial(self._function[grid], enable_fp_fusion=True)


def kernel(do_not_specialize: list[str]) -> Callable[[Callable[..., Any]], _Kernel]:
    """triton.jit for a function that is launched, with every option that results depend on and Triton may change.

    do_not_specialize: arguments of whose values no more than the type is compiled in.
    """
    return lambda function: _Kernel(triton.jit(do_not_specialize=do_not_specialize)(function))


class Tile(NamedTuple):
    """One row of a configuration table: blocks of up to `block` columns go `elements` a tile.

    `programs` is how many persistent programs a multiprocessor gets, `stages` how many tiles a loop has in flight.
    """

    block: int
    elements: int
    warps: int
    programs: int = 1
    stages: int = 1

    def rows(self, block: int) -> int:
        return max(1, self.elements // block)


Table = dict[Architecture, tuple[Tile, ...]]


def tiles(table: Table, arch: Architecture) -> tuple[Tile, ...]:
    """The rows for the newest architecture of arch's family that is no newer than it, or else the first rows."""
    return table[newest(table, arch)]


def tile_for(table: Table, arch: Architecture, block: int) -> Tile:
    """The first row whose blocks are wide enough, or the last."""
    rows = tiles(table, arch)
    return tuned(table, arch, next((tile for tile in rows if block <= tile.block), rows[-1]))


def block_of(N: int) -> int:
    """Power of two that holds a row of N, no less than two groups of vector loads."""
    return max(16, triton.next_power_of_2(N))


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes x's GPU the current one for a launch; costs nothing where it is."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def in_pairs(arch: Architecture) -> bool:
    """Whether a kernel takes PTX, which `widened` is made of."""
    return arch.vendor == "nvidia" and not INTERPRETING


@triton.jit
def widened(x, PAIRS: tl.constexpr):
    """x in fp32. With PAIRS a register of two bfloat16 takes two instructions, where the compiler makes three."""
    if PAIRS and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


class Dropout(NamedTuple):
    """A call's dropout as kernel arguments; see fastlm/ops/_dropout.py for what they mean."""

    seed: int
    threshold: int
    scale: float


def dropout_arguments(p: float, seed: int) -> Dropout:
    """The arguments of a call; a captured seed is refused: a variant that reads it could only load while capturing."""
    if isinstance(seed, DeviceSeed):
        raise BackendError(
            "the triton backend takes dropout's seed as a number, so that a CUDA graph would repeat one mask at every "
            "replay: capture with the cuda backend, or with dropout 0, or leave the step that drops out of the graph"
        )
    return Dropout(seed, min(round(p * 2**32), 2**32 - 1), 1.0 / (1.0 - p) if p < 1 else 0.0)


@triton.jit
def dropout_factors(row, first_column, seed, threshold, scale, BLOCK_N: tl.constexpr):
    """row: [R] int64 -> [R, BLOCK_N]: 0 where dropped, scale where kept. first_column is a multiple of 4.

    A Philox call gives the words of four neighbouring columns, so each is made once and interleaved.
    """
    group = (first_column // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)
    low, group = tl.broadcast(row.to(tl.uint32)[:, None], group[None, :])  # [R, BLOCK_N / 4]
    high = (row >> 32).to(tl.uint32)[:, None] + tl.zeros_like(group)
    word0, word1, word2, word3 = tl.philox(seed, group, low, high, tl.zeros_like(group))
    word = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # [R, BLOCK_N / 4, 2, 2]
    word = tl.reshape(word, (row.shape[0], BLOCK_N))
    return tl.where(word >= threshold.to(tl.uint32), scale, 0.0)


@kernel(do_not_specialize=["P"])
def _sum_partials_kernel(
    partial_ptr,  # (P, K) fp32
    out_ptr,  # (K) fp32
    P,
    K,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = sum over P, in an order that depends on P alone."""
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        total += tl.load(partial_ptr + p[:, None] * K + k[None, :], (p < P)[:, None] & (k < K)[None, :], 0.0)
    tl.store(out_ptr + k, tl.sum(total, 0), k < K)


# Blocks of the ordered sum: 128 bytes of each partial a program, so that even a narrow sum fills the GPU. The
# interpreter spends its time on programs, not on elements.
SUM_BLOCK_P, SUM_BLOCK_K = 64, 2048 if INTERPRETING else 32


def sum_partials(partial: Tensor) -> Tensor:
    """(P, ...) fp32 -> (...), summed over P in order."""
    if partial.shape[0] < 2:
        return partial[0] if partial.shape[0] else partial.new_zeros(partial.shape[1:])
    out = partial.new_empty(partial.shape[1:])
    K = out.numel()
    _sum_partials_kernel[(triton.cdiv(K, SUM_BLOCK_K),)](
        partial, out, partial.shape[0], K, SUM_BLOCK_P, SUM_BLOCK_K, num_warps=4
    )
    return out


def persistent(M: int, rows: int, programs: int) -> tuple[int, int]:
    """(programs, rows a program): M rows shared out in whole tiles of `rows`, to at most `programs` programs."""
    count = triton.cdiv(M, rows)
    each = triton.cdiv(count, max(1, min(count, programs)))
    return triton.cdiv(count, max(1, each)), each * rows
