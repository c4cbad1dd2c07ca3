"""rotary over B sequences of T positions with H heads of size D, in halves as Llama has it."""

from __future__ import annotations

import torch
from torch import Tensor

import fastlm

from .case import Case, Counts
from .kernel import Inputs, KernelBenchmark, each_dtype

BASE = 10000.0
FLOPS = 3  # an element: two products and their sum


def _table(quick: bool, device: str) -> list[Case]:
    if quick:
        return each_dtype([Case("rotary", (2, 12, 256, 64), "", passes=("fwd", "bwd"), headline=True)])
    shapes = [(4, 12, 1024, 64)] if device == "cpu" else [(4, 32, 4096, 64), (4, 32, 4096, 128)]
    cases = [Case("rotary", s, "", passes=("fwd", "bwd"), slow=device != "cpu" and s == shapes[0]) for s in shapes]
    return each_dtype(cases)


def _inputs(case: Case, device: str) -> Inputs:
    *_, T, D = case.shape
    angle = torch.arange(T, device=device)[:, None] / BASE ** (torch.arange(0, D, 2, device=device) / D)
    x = torch.randn(*case.shape, device=device).to(case.torch_dtype)
    return Inputs((x, angle.cos(), angle.sin()), (0,))


def _ours(case: Case):
    return fastlm.rotary


def _stock(case: Case):
    """As Llama's code writes it, with tables of whole heads."""

    def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (torch.cat([t, t], dim=-1).to(x.dtype) for t in (cos, sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return run


def _counts(case: Case, which: str) -> Counts:
    """x in and out, the tables in fp32; its gradient the same way."""
    B, H, T, D = case.shape
    one = Counts(2 * B * H * T * D * case.torch_dtype.itemsize + 4 * T * D, FLOPS * B * H * T * D)
    return Counts(2 * one.bytes, 2 * one.flops) if which == "full" else one


ROTARY = KernelBenchmark("rotary", ("B", "H", "T", "D"), ("",), _table, _inputs, _ours, _stock, _counts, lambda case: 2)
