"""linear: B rows times a weight (N, K) in the case's dtype, or quantized.

With few rows little else is read. A decoding step reads every weight of the model once, so there calls take equal
weights in turn, more of them than the caches hold. A quantized weight is one that its format holds exactly, so that
every provider multiplies the same numbers.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.compression.quantization import QuantizedLinear, Scheme

from .case import Built, Case, Counts, Unavailable
from .kernel import Function, Inputs, KernelBenchmark, KernelSession, each_dtype

# Projections of GPT-2's blocks and its head in decoding, and of its blocks in training.
SHAPES = [(1, 768, 768), (1, 3072, 768), (1, 768, 3072), (1, 50257, 768), (8, 3072, 768)]
MANY = [(1024, 768, 768), (1024, 3072, 768), (1024, 768, 3072)]
FEW = 8  # rows of decoding
SCHEMES: dict[str, Scheme] = {"int8": "int8", "int4": "int4"}
GROUP_SIZE = 32
# Of the weights that take turns, unquantized: about GPT-2 124M in bf16.
BYTES_IN_TURN = 256 * 2**20
MOST_IN_TURN = 256


def _table(quick: bool, device: str) -> list[Case]:
    if device != "cpu":
        return []
    shapes = SHAPES[1:2] if quick else SHAPES
    plain = each_dtype(
        [Case("linear", shape, "", "plain", ("fwd",), headline=i == 0) for i, shape in enumerate(shapes)]
    )
    plain += each_dtype([Case("linear", shape, "", "plain", ("fwd", "bwd")) for shape in MANY if not quick])
    return plain + [Case("linear", shape, "bfloat16", scheme, ("fwd",)) for scheme in SCHEMES for shape in shapes]


def _inputs(case: Case, device: str) -> Inputs:
    B, N, K = case.shape
    weight = torch.randn(N, K, device=device) / K**0.5
    if case.variant in SCHEMES:
        weight = _quantized(weight, case).weight
    return Inputs((torch.randn(B, K, device=device).to(case.torch_dtype), weight.to(case.torch_dtype)), (0, 1))


def _quantized(weight: Tensor, case: Case) -> QuantizedLinear:
    return QuantizedLinear.from_weight(weight, None, SCHEMES[case.variant], GROUP_SIZE)


def _counts(case: Case, which: str) -> Counts:
    """The weight and its scales in, x in, y out; two more products for the gradients."""
    B, N, K = case.shape
    size = case.torch_dtype.itemsize
    weight = {"int8": N * K + 4 * N, "int4": N * K // 2 + 2 * N * K // GROUP_SIZE}.get(case.variant, N * K * size)
    if B <= FEW:
        return Counts(weight + B * (N + K) * size, 2 * B * N * K, reads_only=True)
    forward = Counts(weight + B * (N + K) * size, 2 * B * N * K, case.dtype)
    return Counts.of(which, forward, Counts(2 * weight + B * (N + 2 * K) * size, 4 * B * N * K, case.dtype))


class LinearBenchmark(KernelBenchmark):
    def session(self, case: Case, device: str) -> KernelSession:
        return LinearSession(self, case, device)


class LinearSession(KernelSession):
    @functools.cached_property
    def weights(self) -> list[Tensor]:
        """Copies of the weight, itself the first."""
        _, weight = self.tensors
        assert weight is not None
        return [weight, *(weight.clone() for _ in range(self._count() - 1))]

    def _count(self) -> int:
        _, N, K = self.case.shape
        return max(1, min(MOST_IN_TURN, BYTES_IN_TURN // (N * K * self.case.torch_dtype.itemsize)))

    def _runs(self, function: Function, forward_only: bool) -> dict[str, Callable[[], object]]:
        if self.case.shape[0] > FEW:
            return super()._runs(function, forward_only)
        x, weights = self.tensors[0], itertools.cycle(self.weights)
        return {"fwd": torch.no_grad()(lambda: function(x, next(weights)))}

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
        layers = itertools.cycle([layer, *(copy.deepcopy(layer) for _ in range(self._count() - 1))])
        return Built({"fwd": torch.no_grad()(lambda: next(layers)(x))}, found, f"fastlm {self.case.variant}")


LINEAR = LinearBenchmark(
    "linear", ("B", "N", "K"), ("plain", *SCHEMES), _table, _inputs, lambda case: fastlm.linear, lambda case: F.linear,
    _counts, lambda case: max(case.shape) if case.shape[0] > FEW else case.shape[2],
)  # fmt: skip
