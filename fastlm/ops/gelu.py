"""GELU (Hendrycks & Gimpel 2016), alone and fused with the bias before it and the dropout after it.

none: x Phi(x);   tanh: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import dropout as _dropout
from .._core.dispatch import Backend, LazyModule, always, choose, must_trace, needs_grad, request_of
from .._core.registry import Draw, register
from ..backends import cpu as _native
from ..backends.conditions import cpu_unsupported, cuda_unsupported, triton_unsupported
from ..backends.cpu import gelu as _kernels
from ._autograd import by_kernels

KERNELS: dict[str, Any] = {
    "cpu": _kernels,
    "triton": LazyModule("fastlm.kernels.gelu"),
    "cuda": LazyModule("fastlm.backends.cuda.gelu"),
}


def gelu_ref(x: Tensor, bias: Tensor | None, approximate: str, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """The definition, in fp32 or wider; the dropout mask is the kernels' own."""
    wide = x.to(_native.compute_dtype(x.dtype))
    if bias is not None:
        wide = wide + bias.to(wide.dtype)
    if approximate == "tanh":
        y = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    else:
        y = 0.5 * wide * torch.erfc(-wide / math.sqrt(2))
    if dropout_p > 0:
        N = x.shape[-1]
        keep = _dropout.factors(x.numel() // max(N, 1), N, dropout_p, seed, wide.dtype, x.device)
        y = y * keep.reshape(y.shape)
    return y.to(x.dtype)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, approximate, dropout_p, seed, backend):
        ctx.save_for_backward(x, bias)
        ctx.options, ctx.backend = (approximate, dropout_p, seed), backend
        return KERNELS[backend].gelu_fwd(x, bias, approximate == "tanh", dropout_p, seed)

    @staticmethod
    @by_kernels(gelu_ref, tensors=2)
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        approximate, dropout_p, seed = ctx.options
        dx, db = KERNELS[ctx.backend].gelu_bwd(dy.contiguous(), x, bias, approximate == "tanh", dropout_p, seed)
        return dx, None if bias is None else db.to(bias.dtype)


def _check(op: str, x: Tensor, approximate: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{op}: x has dtype {x.dtype}, expected a floating-point dtype")
    if approximate not in ("none", "tanh"):  # a constant is quicker than a name
        raise ValueError(f"{op}: approximate is {approximate!r}, expected 'none' or 'tanh'")


FORMS = ("none", "tanh")
CPU = Backend("cpu", cpu_unsupported)
TRITON = Backend("triton", triton_unsupported, needs_proof=True)
CUDA = Backend("cuda", cuda_unsupported, needs_proof=True)
TORCH, REFERENCE = Backend("torch", always), Backend("reference", always)


@register(
    reference=gelu_ref,
    backends=(CPU, TRITON, CUDA, TORCH, REFERENCE),
    differentiable=("x",),
    draw=lambda draw: [{"x": draw(3, 5, 16), "approximate": form} for form in FORMS],
    choices={"approximate": FORMS},
)
def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit, as `torch.nn.functional.gelu`.

    Args:
        x: any shape; float32, float64, bfloat16 or float16.
        approximate: "none" for x Phi(x), "tanh" for GPT-2's form.

    Returns:
        Like x, computed in fp32 or wider.

    Raises:
        ValueError: for an unknown form.
        TypeError: if x is not floating-point.
        BackendError: if a forced backend cannot serve the call.
    """
    _check("gelu", x, approximate)
    if must_trace(x):
        return F.gelu(x, approximate=approximate)
    backend = choose("gelu", ("cpu", x.dtype, ()) if x.is_cpu else request_of(x))
    if backend == "torch":
        return F.gelu(x, approximate=approximate)
    if backend == "reference":
        return gelu_ref(x, None, approximate)
    x = x.contiguous()
    if needs_grad(x):
        return _Gelu.apply(x, None, approximate, 0.0, 0, backend)
    return KERNELS[backend].gelu_fwd(x, None, approximate == "tanh")


def _draw(draw: Draw) -> list[dict[str, Any]]:
    tensors = {"x": draw(3, 5, 16), "bias": draw(16)}
    return [tensors, tensors | {"approximate": "tanh", "dropout_p": 0.3}]


@register(
    reference=gelu_ref,
    backends=(CPU, TRITON, CUDA, REFERENCE),
    differentiable=("x", "bias"),
    draw=_draw,
    choices={"approximate": FORMS},
)
def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "none", dropout_p: float = 0.0) -> Tensor:
    """dropout(gelu(x + bias)) in one pass; backward sums the bias gradient in its own single pass.

    Args:
        x: (..., N), a linear layer's product without its bias.
        bias: (N,), of any floating-point dtype.
        approximate: "none" or "tanh".
        dropout_p: probability of dropping an element of the result; the mask comes from a seed drawn from
            torch's default generator and is recomputed, not stored, for the backward pass.

    Returns:
        Like x.

    Raises:
        ValueError: if shapes or devices disagree, the form is unknown, or dropout_p is no probability.
        TypeError: if a tensor is not floating-point.
        BackendError: if a forced backend cannot serve the call.
    """
    op = "bias_gelu"
    _check(op, x, approximate)
    if bias.dim() != 1 or x.dim() < 1 or bias.shape[0] != x.shape[-1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected {tuple(x.shape[-1:])} to match x")
    if bias.device != x.device:
        raise ValueError(f"{op}: bias is on {bias.device}, x is on {x.device}")
    if not bias.is_floating_point():
        raise TypeError(f"{op}: bias has dtype {bias.dtype}, expected a floating-point dtype")
    dropout_p = _dropout.check_probability(op, dropout_p)
    if must_trace(x, bias):
        return F.dropout(F.gelu((x + bias).to(x.dtype), approximate=approximate), dropout_p)
    backend = choose(op, ("cpu", x.dtype, ()) if x.is_cpu else request_of(x))
    seed = _dropout.draw_seed(x.device) if dropout_p > 0 else 0
    if backend == "reference":
        return gelu_ref(x, bias, approximate, dropout_p, seed)
    x, bias = x.contiguous(), bias.contiguous()
    if needs_grad(x, bias):
        return _Gelu.apply(x, bias, approximate, dropout_p, seed, backend)
    return KERNELS[backend].gelu_fwd(x, bias, approximate == "tanh", dropout_p, seed)
