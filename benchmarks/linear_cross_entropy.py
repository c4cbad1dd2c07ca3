"""linear_cross_entropy: N tokens of hidden size K against a vocabulary of V; PyTorch's holds the N x V logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from .case import Case, Counts, Unavailable
from .kernel import Inputs, KernelBenchmark, each_dtype
from .peers import attribute
from .providers import interpreted, need_cuda


def _table(quick: bool, device: str) -> list[Case]:
    if quick:
        return each_dtype([Case("linear_cross_entropy", (256, 256, 8192), "", passes=("full",), headline=True)])
    shapes = [(1024, 768, 50257)] if device == "cpu" else [(8192, 768, 50257), (8192, 4096, 128256)]
    large = device != "cpu"  # on a CPU a minute more for the second allocator, whose price the train case shows
    cases = [Case("linear_cross_entropy", s, "", passes=("full",), headline=large, slow=large) for s in shapes]
    return each_dtype(cases)


def _inputs(case: Case, device: str) -> Inputs:
    N, K, V = case.shape
    hidden = torch.randn(N, K, device=device).to(case.torch_dtype)
    weight = (torch.randn(V, K, device=device) * K**-0.5).to(case.torch_dtype)
    return Inputs((hidden, weight, torch.randint(V, (N,), device=device)), (0, 1))


def _stock(case: Case):
    return lambda hidden, weight, target: F.cross_entropy(F.linear(hidden, weight), target)


def _counts(case: Case, which: str) -> Counts:
    """One product forward and two backward; the logits cost no traffic, as they need not exist."""
    N, K, V = case.shape
    size = case.torch_dtype.itemsize
    forward = Counts((N * K + V * K) * size + 8 * N, 2 * N * K * V, case.dtype)
    backward = Counts(2 * (N * K + V * K) * size, 4 * N * K * V, case.dtype)
    return Counts.of(which, forward, backward)


def _torch_fused(case: Case, device: str):
    """PyTorch's own op of this name, where the version has one."""
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    return lambda hidden, weight, target: function(hidden, weight, target)


def _liger(case: Case, device: str):
    interpreted(device)
    module = attribute("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")()
    return lambda hidden, weight, target: module(weight, hidden, target)


def _cce(case: Case, device: str):
    need_cuda(device, "cut-cross-entropy")
    function = attribute("cut_cross_entropy", "linear_cross_entropy")

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return function(hidden, weight, target)

    return run


def _quack(case: Case, device: str):
    need_cuda(device, "quack")
    function = attribute("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda hidden, weight, target: function(hidden, weight, target)


LINEAR_CROSS_ENTROPY = KernelBenchmark(
    "linear_cross_entropy", ("N", "K", "V"), ("",), _table, _inputs, lambda case: fastlm.linear_cross_entropy, _stock,
    _counts, lambda case: sum(case.shape),
    {"torch-fused": _torch_fused, "liger": _liger, "cce": _cce, "quack": _quack},
)  # fmt: skip
