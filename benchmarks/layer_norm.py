"""layer_norm and add_layer_norm over M rows of N; "+dropout" drops elements of what is added."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from .case import Case, Counts
from .kernel import Inputs, KernelBenchmark, each_dtype, slow_in_16_bits
from .peers import attribute, onnx_session
from .providers import interpreted, need_cuda

EPS = 1e-5
DROPPED, DROPOUT = "+dropout", 0.1  # a variant of add_layer_norm
FORWARD_FLOPS, BACKWARD_FLOPS = 7, 12  # an element: sum, centre, square, sum, scale, weight, bias; and their reverse


def _table(quick: bool, device: str, name: str) -> list[Case]:
    if quick:
        return each_dtype([Case(name, (1024, 768), "", passes=("fwd", "bwd"), headline=True)])
    shapes = [(4096, 768), (16384, 1024)] if name == "layer_norm" else [(4096, 768)]
    if device != "cpu":
        shapes = [(16384, N) for N in (768, 1024, 2048, 4096, 8192)]
    cases = [Case(name, s, "", passes=("fwd", "bwd"), headline=i == 0) for i, s in enumerate(shapes)]
    if name == "add_layer_norm":
        cases.append(Case(name, shapes[0], "", DROPPED, ("fwd", "bwd")))
    cases = each_dtype([*cases, *(Case(name, (rows, 768), "", passes=("fwd",)) for rows in (1, 64, 512))])
    return slow_in_16_bits(cases, lambda c: c.headline and (device != "cpu" or name == "layer_norm"))


def _inputs(case: Case, device: str) -> Inputs:
    M, N = case.shape
    count = 2 if case.op == "add_layer_norm" else 1
    drawn = [torch.randn(M, N, device=device) for _ in range(count)]
    drawn += [torch.randn(N, device=device) + 1, torch.randn(N, device=device)]
    return Inputs(tuple(t.to(case.torch_dtype) for t in drawn), tuple(range(len(drawn))))


def _ours(case: Case):
    N = case.shape[1]
    return lambda x, weight, bias: fastlm.layer_norm(x, N, weight, bias, EPS)


def _stock(case: Case):
    N = case.shape[1]
    return lambda x, weight, bias: F.layer_norm(x, (N,), weight, bias, EPS)


def _add_ours(case: Case):
    p = DROPOUT if case.variant == DROPPED else 0.0
    return lambda x, residual, weight, bias: fastlm.add_layer_norm(x, residual, weight, bias, EPS, dropout_p=p)


def _add_stock(case: Case):
    N, p = case.shape[1], DROPOUT if case.variant == DROPPED else 0.0

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        z = residual + F.dropout(x, p, p > 0)
        return F.layer_norm(z, (N,), weight, bias, EPS), z

    return run


def _counts(case: Case, which: str) -> Counts:
    """x (and the residual) in, y (and z) out; dy (and dz) and the normalized input in, one gradient out."""
    M, N = case.shape
    size = case.torch_dtype.itemsize
    fused = case.op == "add_layer_norm"
    forward = Counts(((4 if fused else 2) * M * N + 2 * N) * size, (FORWARD_FLOPS + fused) * M * N)
    backward = Counts(((4 if fused else 3) * M * N + 3 * N) * size, (BACKWARD_FLOPS + fused) * M * N)
    return Counts.of(which, forward, backward)


def _liger(case: Case, device: str):
    interpreted(device)
    function = attribute("liger_kernel.ops.layer_norm", "LigerLayerNormFunction")
    return lambda x, weight, bias: function.apply(x, weight, bias, EPS)


def _quack(case: Case, device: str):
    need_cuda(device, "quack")
    function = attribute("quack.layernorm", "layernorm")
    return lambda x, weight, bias: function(x, weight.float(), bias.float(), EPS)


def _flash(case: Case, device: str):
    need_cuda(device, "flash-attn")
    function = attribute("flash_attn.ops.triton.layer_norm", "layer_norm_fn")
    return lambda x, weight, bias: function(x, weight, bias, eps=EPS)


def _onnxruntime(case: Case, device: str):
    return onnx_session(case, device, "LayerNormalization", {"axis": -1, "epsilon": EPS}, _inputs(case, device))


def _flash_add(case: Case, device: str):
    need_cuda(device, "flash-attn")
    p = DROPOUT if case.variant == DROPPED else 0.0
    function = attribute("flash_attn.ops.triton.layer_norm", "layer_norm_fn")

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return function(x, weight, bias, residual=residual, eps=EPS, dropout_p=p, prenorm=True)

    return run


LAYER_NORM = KernelBenchmark(
    "layer_norm", ("M", "N"), ("",), lambda q, d: _table(q, d, "layer_norm"), _inputs, _ours, _stock, _counts,
    lambda case: max(case.shape), {"liger": _liger, "quack": _quack, "flash-attn": _flash, "onnxruntime": _onnxruntime},
    gpu_peers=("compile", "liger", "quack", "flash-attn"),
)  # fmt: skip
ADD_LAYER_NORM = KernelBenchmark(
    "add_layer_norm", ("M", "N"), ("", DROPPED), lambda q, d: _table(q, d, "add_layer_norm"), _inputs, _add_ours,
    _add_stock, _counts, lambda case: max(case.shape), {"flash-attn": _flash_add},
    gpu_peers=("compile", "flash-attn"),
)  # fmt: skip
