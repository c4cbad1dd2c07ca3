"""The machine's limits, measured in the same process as the benchmarks: copy, read and matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastlm.ops._gemm import multiply

from .case import DTYPES, Counts
from .harness import Timing, clock

CPU_BYTES, CUDA_BYTES = 256 * 2**20, 2**30
CPU_GEMM, CUDA_GEMM = 1536, 8192
ROUNDS = 8


@dataclass(frozen=True)
class Roof:
    """Best rates seen.

    Attributes:
        copy_gbps: bytes read plus bytes written a second, in 1e9, copying one large fp32 array to another.
        read_gbps: summing one.
        gemm_tflops: dtype -> rate of a square matrix product by the library, or by ours where that is the faster one.
    """

    copy_gbps: float
    read_gbps: float
    gemm_tflops: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def seconds(self, counts: Counts) -> float:
        """The least time that the counted work can take: the slower of memory and arithmetic."""
        memory = self._memory_seconds(counts)
        rate = self.gemm_tflops.get(counts.gemm_dtype or "")
        return max(memory, counts.flops / (rate * 1e12)) if rate else memory

    def bound(self, counts: Counts) -> str:
        """What that limit is: "memory" or "compute"."""
        return "compute" if self.seconds(counts) > self._memory_seconds(counts) else "memory"

    def _memory_seconds(self, counts: Counts) -> float:
        return counts.bytes / ((self.read_gbps if counts.reads_only else self.copy_gbps) * 1e9)


def _best(run, device: str) -> float:
    sample = clock(device).prepare(run)
    return min(Timing(tuple(sample() for _ in range(ROUNDS))).samples)


def measure(device: str, dtypes: list[str]) -> Roof:
    """Measure the roof; takes a second or two on a CPU.

    Args:
        dtypes: names to measure matrix products in.
    """
    on_gpu = device.startswith("cuda")
    elements = (CUDA_BYTES if on_gpu else CPU_BYTES) // 4
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    copy = 8 * elements / _best(functools.partial(target.copy_, source), device) / 1e9
    read = 4 * elements / _best(source.sum, device) / 1e9
    n = CUDA_GEMM if on_gpu else CPU_GEMM
    rates = {}
    for name in dtypes:
        a, b = (torch.randn(n, n, device=device).to(DTYPES[name]) for _ in range(2))
        products: list[Callable] = [torch.matmul, multiply] if a.is_cpu else [torch.matmul]
        rates[name] = 2 * n**3 / min(_best(functools.partial(by, a, b), device) for by in products) / 1e12
    return Roof(copy, read, rates)
