"""gelu and bias_gelu over M rows of N; "+dropout" drops elements of the result."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastlm

from .case import Case, Counts, Unavailable
from .kernel import Inputs, KernelBenchmark, each_dtype, slow_in_16_bits
from .peers import attribute, onnx_session

FORMS = {"tanh": "tanh", "erf": "none"}
DROPPED = "tanh+dropout"  # a variant of bias_gelu
DROPOUT = 0.1
FORWARD_FLOPS, BACKWARD_FLOPS = 8, 16  # an element, with exp or erf counted as one operation


def _table(quick: bool, device: str, name: str) -> list[Case]:
    if quick:
        return each_dtype([Case(name, (1024, 3072), "", "tanh", ("fwd", "bwd"), headline=True)])
    shapes = [(4096, 3072)] if device == "cpu" else [(16384, N) for N in (3072, 4096, 8192, 16384)]
    cases = [
        Case(name, shape, "", form, ("fwd", "bwd"), headline=i == 0) for i, shape in enumerate(shapes) for form in FORMS
    ]
    if name == "bias_gelu":
        cases.append(Case(name, shapes[0], "", DROPPED, ("fwd", "bwd")))
    cases = each_dtype([*cases, *(Case(name, (rows, 3072), "", "tanh", ("fwd",)) for rows in (1, 64, 512))])
    compiled = device != "cpu" or name == "gelu"
    return slow_in_16_bits(cases, lambda c: c.headline and c.variant == "tanh" and compiled)


def _inputs(case: Case, device: str) -> Inputs:
    M, N = case.shape
    drawn = [torch.randn(M, N, device=device)]
    if case.op == "bias_gelu":
        drawn.append(torch.randn(N, device=device))
    return Inputs(tuple(t.to(case.torch_dtype) for t in drawn), tuple(range(len(drawn))))


def _ours(case: Case):
    form = FORMS[case.variant]
    return lambda x: fastlm.gelu(x, form)


def _stock(case: Case):
    form = FORMS[case.variant]
    return lambda x: F.gelu(x, approximate=form)


def _dropout(case: Case) -> tuple[str, float]:
    """The form, and the probability of dropping."""
    return FORMS[case.variant.removesuffix("+dropout")], DROPOUT if case.variant == DROPPED else 0.0


def _bias_ours(case: Case):
    form, p = _dropout(case)
    return lambda x, bias: fastlm.bias_gelu(x, bias, form, dropout_p=p)


def _bias_stock(case: Case):
    form, p = _dropout(case)
    return lambda x, bias: F.dropout(F.gelu(x + bias, approximate=form), p, p > 0)


def _counts(case: Case, which: str) -> Counts:
    """x in and y out; x and dy in and dx out; with a bias, that in and its gradient out."""
    M, N = case.shape
    size, bias = case.torch_dtype.itemsize, case.op == "bias_gelu"
    forward = Counts((2 * M * N + bias * N) * size, (FORWARD_FLOPS + bias) * M * N)
    backward = Counts((3 * M * N + 2 * bias * N) * size, (BACKWARD_FLOPS + 2 * bias) * M * N)
    return Counts.of(which, forward, backward)


def _transformers(case: Case, device: str):
    if case.variant != "tanh":
        raise Unavailable("its erf form is torch's own")
    return attribute("transformers.activations", "NewGELUActivation")()


def _onnxruntime(case: Case, device: str):
    return onnx_session(case, device, "Gelu", {"approximate": FORMS[case.variant]}, _inputs(case, device))


PEERS = {"transformers": _transformers, "onnxruntime": _onnxruntime}

GELU = KernelBenchmark(
    "gelu", ("M", "N"), tuple(FORMS), lambda q, d: _table(q, d, "gelu"), _inputs, _ours, _stock, _counts,
    lambda case: 1, PEERS, gpu_peers=("compile",),
)  # fmt: skip
BIAS_GELU = KernelBenchmark(
    "bias_gelu", ("M", "N"), (*FORMS, DROPPED), lambda q, d: _table(q, d, "bias_gelu"), _inputs, _bias_ours,
    _bias_stock, _counts, lambda case: case.shape[0], gpu_peers=("compile",),
)  # fmt: skip
