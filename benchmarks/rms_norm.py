"""rms_norm and add_rms_norm over M rows of N."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from .case import Case, Counts
from .kernel import Inputs, KernelBenchmark, each_dtype
from .peers import attribute
from .providers import interpreted, need_cuda

EPS = 1e-6
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 9  # an element: square, sum, scale, weight; and their reverse


def _table(quick: bool, device: str, name: str) -> list[Case]:
    if quick:
        return each_dtype([Case(name, (1024, 1024), "", passes=("fwd", "bwd"), headline=True)])
    shapes = [(4096, 1024)] if device == "cpu" else [(16384, N) for N in (1024, 2048, 4096, 8192)]
    return each_dtype(
        [Case(name, s, "", passes=("fwd", "bwd"), slow=device != "cpu" and s == shapes[0]) for s in shapes]
    )


def _inputs(case: Case, device: str) -> Inputs:
    M, N = case.shape
    drawn = [torch.randn(M, N, device=device) for _ in range(2 if case.op == "add_rms_norm" else 1)]
    drawn.append(torch.randn(N, device=device) + 1)
    return Inputs(tuple(t.to(case.torch_dtype) for t in drawn), tuple(range(len(drawn))))


def _ours(case: Case):
    N = case.shape[1]
    return lambda x, weight: fastlm.rms_norm(x, N, weight, EPS)


def _stock(case: Case):
    N = case.shape[1]
    return lambda x, weight: F.rms_norm(x, (N,), weight, EPS)


def _add_ours(case: Case):
    return lambda x, residual, weight: fastlm.add_rms_norm(x, residual, weight, EPS)


def _add_stock(case: Case):
    N = case.shape[1]

    def run(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        z = residual + x
        return F.rms_norm(z, (N,), weight, EPS), z

    return run


def _counts(case: Case, which: str) -> Counts:
    """x (and the residual) in, y (and z) out; dy (and dz) and the normalized input in, one gradient out."""
    M, N = case.shape
    size, fused = case.torch_dtype.itemsize, case.op == "add_rms_norm"
    forward = Counts(((4 if fused else 2) * M * N + N) * size, (FORWARD_FLOPS + fused) * M * N)
    backward = Counts(((4 if fused else 3) * M * N + 2 * N) * size, (BACKWARD_FLOPS + fused) * M * N)
    return Counts.of(which, forward, backward)


def _liger(case: Case, device: str):
    interpreted(device)
    function = attribute("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    return lambda x, weight: function.apply(x, weight, EPS, 0.0, "llama", False)


def _quack(case: Case, device: str):
    need_cuda(device, "quack")
    function = attribute("quack", "rmsnorm")
    return lambda x, weight: function(x, weight, eps=EPS)


RMS_NORM = KernelBenchmark(
    "rms_norm", ("M", "N"), ("",), lambda q, d: _table(q, d, "rms_norm"), _inputs, _ours, _stock, _counts,
    lambda case: max(case.shape), {"liger": _liger, "quack": _quack},
    gpu_peers=("compile", "liger", "quack"),
)  # fmt: skip
ADD_RMS_NORM = KernelBenchmark(
    "add_rms_norm", ("M", "N"), ("",), lambda q, d: _table(q, d, "add_rms_norm"), _inputs, _add_ours, _add_stock,
    _counts, lambda case: max(case.shape),
)  # fmt: skip
