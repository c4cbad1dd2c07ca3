"""cross_entropy over N tokens and V classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastlm

from .case import Case, Counts
from .kernel import Inputs, KernelBenchmark, each_dtype, slow_in_16_bits
from .peers import attribute
from .providers import interpreted, need_cuda

FORWARD_FLOPS, BACKWARD_FLOPS = 4, 3  # a logit: maximum, subtract, exp, sum; exp, scale, subtract


def _table(quick: bool, device: str) -> list[Case]:
    if quick:
        return each_dtype([Case("cross_entropy", (256, 8192), "", passes=("fwd", "full"), headline=True)])
    shapes = [(1024, 50257)] if device == "cpu" else [(8192, 50257), (8192, 128256)]
    cases = each_dtype([Case("cross_entropy", s, "", passes=("fwd", "full"), headline=True) for s in shapes])
    return slow_in_16_bits(cases, lambda c: True)


def _inputs(case: Case, device: str) -> Inputs:
    N, V = case.shape
    logits = torch.randn(N, V, device=device).to(case.torch_dtype)
    return Inputs((logits, torch.randint(V, (N,), device=device)), (0,))


def _counts(case: Case, which: str) -> Counts:
    """Logits in; backward, logits in and their gradient out."""
    N, V = case.shape
    size = case.torch_dtype.itemsize
    forward = Counts(N * V * size + 8 * N, FORWARD_FLOPS * N * V)
    backward = Counts(2 * N * V * size + 8 * N, BACKWARD_FLOPS * N * V)
    return Counts.of(which, forward, backward)


def _liger(case: Case, device: str):
    """On a copy, since it overwrites the logits with their gradient."""
    interpreted(device)
    function = attribute("liger_kernel.transformers.functional", "liger_cross_entropy")
    return lambda logits, target: function(logits.clone(), target)


def _quack(case: Case, device: str):
    need_cuda(device, "quack")
    function = attribute("quack.cross_entropy", "cross_entropy")
    return lambda logits, target: function(logits, target, reduction="mean")


CROSS_ENTROPY = KernelBenchmark(
    "cross_entropy", ("N", "V"), ("",), _table, _inputs, lambda case: fastlm.cross_entropy,
    lambda case: F.cross_entropy, _counts, lambda case: sum(case.shape), {"liger": _liger, "quack": _quack},
    gpu_peers=("compile", "liger", "quack"),
)  # fmt: skip
