"""swiglu, silu(gate) * up, over M rows of N."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastlm

from .case import Case, Counts
from .kernel import Inputs, KernelBenchmark, each_dtype
from .peers import attribute
from .providers import interpreted

FORWARD_FLOPS, BACKWARD_FLOPS = 5, 12  # an element, with exp counted as one operation


def _table(quick: bool, device: str) -> list[Case]:
    if quick:
        return each_dtype([Case("swiglu", (1024, 2816), "", passes=("fwd", "bwd"), headline=True)])
    shapes = [(4096, 2816)] if device == "cpu" else [(16384, N) for N in (2816, 8192, 14336)]
    cases = [Case("swiglu", s, "", passes=("fwd", "bwd"), slow=device != "cpu" and s == shapes[0]) for s in shapes]
    return each_dtype(cases)


def _inputs(case: Case, device: str) -> Inputs:
    drawn = tuple(torch.randn(*case.shape, device=device).to(case.torch_dtype) for _ in range(2))
    return Inputs(drawn, (0, 1))


def _ours(case: Case):
    return fastlm.swiglu


def _stock(case: Case):
    return lambda gate, up: F.silu(gate) * up


def _counts(case: Case, which: str) -> Counts:
    """gate and up in, y out; both and dy in, two gradients out."""
    M, N = case.shape
    size = case.torch_dtype.itemsize
    forward = Counts(3 * M * N * size, FORWARD_FLOPS * M * N)
    backward = Counts(5 * M * N * size, BACKWARD_FLOPS * M * N)
    return Counts.of(which, forward, backward)


def _liger(case: Case, device: str):
    interpreted(device)
    return attribute("liger_kernel.ops.swiglu", "LigerSiLUMulFunction").apply


SWIGLU = KernelBenchmark(
    "swiglu", ("M", "N"), ("",), _table, _inputs, _ours, _stock, _counts, lambda case: 1, {"liger": _liger}
)
