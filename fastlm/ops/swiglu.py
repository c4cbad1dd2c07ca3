"""SwiGLU (Shazeer 2020): y = silu(gate) up, with silu(a) = a sigmoid(a)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.dispatch import Backend, LazyModule, always, choose, must_trace, needs_grad, request_of
from .._core.registry import register
from ..backends import cpu as _native
from ..backends.conditions import cpu_unsupported, triton_unsupported
from ..backends.cpu import swiglu as _kernels
from ._autograd import by_kernels

KERNELS: dict[str, Any] = {"cpu": _kernels, "triton": LazyModule("fastlm.kernels.swiglu")}


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The definition, in fp32 or wider."""
    wide = gate.to(_native.compute_dtype(gate.dtype))
    return (wide * torch.sigmoid(wide) * up.to(wide.dtype)).to(gate.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, backend):
        ctx.save_for_backward(gate, up)
        ctx.options, ctx.backend = (), backend
        return KERNELS[backend].swiglu_fwd(gate, up)

    @staticmethod
    @by_kernels(swiglu_ref, tensors=2)
    def backward(ctx, dy):
        return KERNELS[ctx.backend].swiglu_bwd(dy.contiguous(), *ctx.saved_tensors)


def _rows(x: Tensor) -> Tensor:
    """(M, N) with unit stride along N; a view where x's rows are evenly spaced, as in halves of one projection."""
    if x.dim() == 0:
        return x.reshape(1, 1)
    M = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(M, x.shape[-1])


@register(
    reference=swiglu_ref,
    backends=(
        Backend("cpu", cpu_unsupported),
        Backend("triton", triton_unsupported, needs_proof=True),
        Backend("reference", always),
    ),
    differentiable=("gate", "up"),
    draw=lambda draw: [{"gate": draw(3, 5, 16), "up": draw(3, 5, 16)}],
)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gated activation of a Transformer's feed-forward layer: silu(gate) * up.

    Args:
        gate, up: (..., N), of one shape and dtype: float32, float64, bfloat16 or float16. The two halves of one
            projection, as `x.chunk(2, -1)` gives them, are read in place.

    Returns:
        Like gate and contiguous, computed in fp32 or wider.

    Raises:
        ValueError: if shapes or devices disagree.
        TypeError: if a tensor is not floating-point, or the dtypes differ.
        BackendError: if a forced backend cannot serve the call.
    """
    if not gate.is_floating_point():
        raise TypeError(f"swiglu: gate has dtype {gate.dtype}, expected a floating-point dtype")
    if up.shape != gate.shape:
        raise ValueError(f"swiglu: up has shape {tuple(up.shape)}, expected {tuple(gate.shape)} to match gate")
    if up.dtype != gate.dtype:
        raise TypeError(f"swiglu: up has dtype {up.dtype}, expected {gate.dtype} to match gate")
    if up.device != gate.device:
        raise ValueError(f"swiglu: up is on {up.device}, gate is on {gate.device}")
    if must_trace(gate, up):
        return F.silu(gate) * up
    backend = choose("swiglu", ("cpu", gate.dtype, ()) if gate.is_cpu else request_of(gate))
    if backend == "reference":
        return swiglu_ref(gate, up)
    a, b = _rows(gate), _rows(up)
    y = _SwiGLU.apply(a, b, backend) if needs_grad(a, b) else KERNELS[backend].swiglu_fwd(a, b)
    return y.view(gate.shape)
