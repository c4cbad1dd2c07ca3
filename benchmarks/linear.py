"""linear of few rows: B rows times a weight (N, K) in the case's dtype, or quantized; little else is read.

A quantized weight is one that its format holds exactly, so that every provider multiplies the same numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.inference.quantize import QuantizedLinear, Scheme

from .case import Built, Case, Counts, Unavailable
from .kernel import Inputs, KernelBenchmark, KernelSession, each_dtype

# Projections of GPT-2's blocks and its head.
SHAPES = [(1, 768, 768), (1, 3072, 768), (1, 768, 3072), (1, 50257, 768), (8, 3072, 768)]
SCHEMES: dict[str, Scheme] = {"int8": "int8", "int4": "int4"}
GROUP_SIZE = 32


def _table(quick: bool, device: str) -> list[Case]:
    if device != "cpu":
        return []
    shapes = SHAPES[1:2] if quick else SHAPES
    plain = each_dtype(
        [Case("linear", shape, "", "plain", ("fwd",), headline=i == 0) for i, shape in enumerate(shapes)]
    )
    return plain + [Case("linear", shape, "bfloat16", scheme, ("fwd",)) for scheme in SCHEMES for shape in shapes]


def _inputs(case: Case, device: str) -> Inputs:
    B, N, K = case.shape
    weight = torch.randn(N, K, device=device) / K**0.5
    if case.variant in SCHEMES:
        weight = _quantized(weight, case).weight
    return Inputs((torch.randn(B, K, device=device).to(case.torch_dtype), weight.to(case.torch_dtype)), ())


def _quantized(weight: Tensor, case: Case) -> QuantizedLinear:
    return QuantizedLinear.from_weight(weight, None, SCHEMES[case.variant], GROUP_SIZE)


def _counts(case: Case, which: str) -> Counts:
    """The weight and its scales in, x in, y out."""
    B, N, K = case.shape
    size = case.torch_dtype.itemsize
    weight = {"int8": N * K + 4 * N, "int4": N * K // 2 + 2 * N * K // GROUP_SIZE}.get(case.variant, N * K * size)
    return Counts(weight + B * (N + K) * size, 2 * B * N * K, reads_only=True)


class LinearBenchmark(KernelBenchmark):
    def session(self, case: Case, device: str) -> KernelSession:
        return LinearSession(self, case, device)


class LinearSession(KernelSession):
    def build(self, provider: str) -> Built:
        """A quantized layer is no backend of an op: it takes the place of the CPU's."""
        if self.case.variant not in SCHEMES or provider in ("torch", "compile"):
            return super().build(provider)
        if provider != "fastlm-cpu":
            raise Unavailable("it has no quantized layer")
        x, weight = self.tensors
        assert x is not None
        assert weight is not None
        layer = _quantized(weight.float(), self.case)
        with torch.no_grad():
            found = {"output 0": layer(x)}

        def run() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return Built({"fwd": run}, found, f"fastlm {self.case.variant}")


LINEAR = LinearBenchmark(
    "linear", ("B", "N", "K"), ("plain", *SCHEMES), _table, _inputs, lambda case: fastlm.linear, lambda case: F.linear,
    _counts, lambda case: case.shape[2],
)  # fmt: skip
