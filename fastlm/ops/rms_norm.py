"""RMS normalization (Zhang & Sennrich 2019), alone and fused with the residual addition before it.

Over the last dimensions of x:   y = x rstd weight,   rstd = 1 / sqrt(mean(x^2) + eps).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.dispatch import Backend, LazyModule, always, choose, must_trace, needs_grad, request_of
from .._core.registry import Draw, register
from ..backends import cpu as _native
from ..backends.conditions import cpu_unsupported, cuda_unsupported, triton_unsupported
from ..backends.cpu import rms_norm as _kernels
from ._autograd import by_kernels, rows_of, stored
from ._residual import stream_dtype

KERNELS: dict[str, Any] = {
    "cpu": _kernels,
    "triton": LazyModule("fastlm.kernels.rms_norm"),
    "cuda": LazyModule("fastlm.backends.cuda.rms_norm"),
}


def rms_norm_ref(x: Tensor, weight: Tensor | None, N: int, eps: float) -> Tensor:
    """The definition, with statistics in fp32 or wider, over rows of N elements."""
    wide = _native.compute_dtype(x.dtype)
    rows = rows_of(x, N).to(wide)
    y = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.reshape(-1).to(wide)
    return y.reshape(x.shape).to(x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, z) with z = residual + x."""
    wide = _native.compute_dtype(residual.dtype)
    z, read = stored(residual.to(wide) + x.to(wide), residual.dtype)
    return rms_norm_ref(read, weight, z.shape[-1], eps).to(z.dtype), z


@functools.cache
def default_eps(dtype: torch.dtype) -> float:
    """What the installed torch adds to the mean square where eps is None.

    For 16-bit inputs that is float32's epsilon or, in older releases, the input's own. So it is asked once, by a number
    whose square lies between the two: all but 1 comes out under the former, less than 0.3 under the latter.
    """
    own = torch.finfo(dtype).eps
    if dtype not in (torch.bfloat16, torch.float16):
        return own
    with torch.inference_mode():
        by_torch = F.rms_norm(torch.full((1,), 2.0**-7, dtype=dtype, device="cpu"), (1,))
    return torch.finfo(torch.float32).eps if by_torch.item() > 0.5 else own


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, N, eps, backend):
        y, _, rstd = KERNELS[backend].rms_norm_fwd(x, None, weight, N, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.options, ctx.backend = (N, eps), backend
        return y

    @staticmethod
    @by_kernels(rms_norm_ref, tensors=2)
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        _, dx, dw = KERNELS[ctx.backend].rms_norm_bwd(
            dy.contiguous(), x, weight, rstd, ctx.options[0], weight_grad=ctx.needs_input_grad[1]
        )
        return dx, _like(dw, weight)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, backend):
        y, z, rstd = KERNELS[backend].rms_norm_fwd(x, residual, weight, x.shape[-1], eps)
        ctx.save_for_backward(x, residual, weight, z, rstd)
        ctx.options, ctx.backend = (eps,), backend
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    @by_kernels(add_rms_norm_ref, tensors=3)
    def backward(ctx, dy, dz_in):
        x, _, weight, z, rstd = ctx.saved_tensors
        dy = torch.zeros_like(z) if dy is None else dy.contiguous()
        dz_in = None if dz_in is None else dz_in.contiguous()
        dz, dx, dw = KERNELS[ctx.backend].rms_norm_bwd(
            dy, z, weight, rstd, x.shape[-1], dz_in, x.dtype, ctx.needs_input_grad[2]
        )
        return dx, dz, _like(dw, weight)


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """The weight's gradient in the weight's shape and dtype."""
    return None if grad is None or parameter is None else grad.to(parameter.dtype).reshape(parameter.shape)


def _check(op: str, x: Tensor, shape: tuple[int, ...], weight: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{op}: x has dtype {x.dtype}, expected a floating-point dtype")
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected it to end in normalized_shape {shape}")
    if weight is None:
        return
    if weight.shape != shape:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected {shape} to match x")
    if weight.device != x.device:
        raise ValueError(f"{op}: weight is on {weight.device}, x is on {x.device}")
    if not weight.is_floating_point():
        raise TypeError(f"{op}: weight has dtype {weight.dtype}, expected a floating-point dtype")


def _inference(x: Tensor, normalized_shape: Any, weight: Tensor | None, eps: float | None) -> Tensor | None:
    """The result where the commonest call without gradients goes to the CPU kernel, else None.

    On one row the general path's questions take as long as the kernel; these are all that this case needs.
    """
    if weight is None or must_trace(x, weight):
        return None
    extents, dtype = weight.shape, x.dtype
    if len(extents) != 1 or x.shape[-1:] != extents:
        return None
    N = extents[0]
    if not N or (normalized_shape != N and normalized_shape != extents):
        return None
    if not (x.is_cpu and weight.is_cpu and x.is_contiguous() and weight.is_contiguous()):
        return None
    if weight.dtype not in _native.TYPE_CODE or choose("rms_norm", ("cpu", dtype, ())) != "cpu":
        return None
    eps = default_eps(dtype) if eps is None else eps
    return _kernels.rms_norm_fwd(x, None, weight, N, eps, statistics=False)[0]


def _by_torch(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float | None) -> Tensor:
    return F.rms_norm(x, shape, weight, eps).to(x.dtype)


CPU = Backend("cpu", cpu_unsupported)
TRITON = Backend("triton", triton_unsupported, needs_proof=True)
CUDA = Backend("cuda", cuda_unsupported, needs_proof=True)
TORCH, REFERENCE = Backend("torch", always), Backend("reference", always)


def _draw(draw: Draw) -> list[dict[str, Any]]:
    x = draw(3, 5, 16)
    return [{"x": x, "normalized_shape": 16, "weight": draw(16)}, {"x": x, "normalized_shape": (5, 16), "eps": 0.1}]


@register(
    reference=rms_norm_ref,
    backends=(CPU, TRITON, CUDA, TORCH, REFERENCE),
    differentiable=("x", "weight"),
    draw=_draw,
)
def rms_norm(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """RMS normalization over the last dimensions, as `torch.nn.functional.rms_norm`.

    Args:
        x: (..., *normalized_shape), float32, float64, bfloat16 or float16.
        normalized_shape: the trailing dimensions to normalize over.
        weight: normalized_shape, of any floating-point dtype; None for 1.
        eps: added to the mean square; None for the installed torch's choice, which is the distance of 1 to the next
            number of the dtype that it computes in: float32 for 16-bit inputs.

    Returns:
        Like x. Statistics are computed in fp32 or wider.

    Raises:
        ValueError: if shapes or devices disagree.
        TypeError: if a tensor is not floating-point.
        BackendError: if a forced backend cannot serve the call.
    """
    if not torch.is_grad_enabled():
        y = _inference(x, normalized_shape, weight, eps)
        if y is not None:
            return y
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    _check("rms_norm", x, shape, weight)
    if must_trace(x, weight):
        return _by_torch(x, shape, weight, eps)
    backend = choose("rms_norm", ("cpu", x.dtype, ()) if x.is_cpu else request_of(x))
    if backend == "torch":
        return _by_torch(x, shape, weight, eps)
    eps = default_eps(x.dtype) if eps is None else eps
    N = math.prod(shape)
    if backend == "reference":
        return rms_norm_ref(x, weight, N, eps)
    x, weight = x.contiguous(), None if weight is None else weight.contiguous()
    if needs_grad(x, weight):
        return _RMSNorm.apply(x, weight, N, eps, backend)
    return KERNELS[backend].rms_norm_fwd(x, None, weight, N, eps, statistics=False)[0]


def _add_draw(draw: Draw) -> list[dict[str, Any]]:
    tensors = {"x": draw(3, 5, 16), "residual": draw(3, 5, 16)}
    return [tensors, tensors | {"weight": draw(16), "eps": 0.1}]


@register(
    reference=add_rms_norm_ref,
    backends=(CPU, TRITON, CUDA, REFERENCE),
    differentiable=("x", "residual", "weight"),
    draw=_add_draw,
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """Residual addition and RMS normalization in one pass: the seam between two pre-norm sublayers.

    Args:
        x: (..., N), a sublayer's output.
        residual: like x; may be wider (a float32 stream under a 16-bit x).
        weight: (N,), or None for 1.
        eps: added to the mean square; None as for `rms_norm` of z.

    Returns:
        (rms_norm(z), z) with z = residual + x, both in the wider dtype of x and residual.

    Raises:
        ValueError: if shapes or devices disagree.
        TypeError: if a tensor is not floating-point.
        BackendError: if a forced backend cannot serve the call.
    """
    op = "add_rms_norm"
    _check(op, x, tuple(x.shape[-1:]), weight)
    stream = stream_dtype(op, x, residual)
    residual = residual.to(stream)
    if stream != torch.float32:
        x = x.to(stream)
    if must_trace(x, residual, weight):
        z = residual + x
        return _by_torch(z, tuple(z.shape[-1:]), weight, eps), z
    eps = default_eps(stream) if eps is None else eps
    backend = choose(op, ("cpu", x.dtype, ()) if x.is_cpu else request_of(x))
    if backend == "reference":
        return add_rms_norm_ref(x, residual, weight, eps)
    x, residual = x.contiguous(), residual.contiguous()
    weight = None if weight is None else weight.contiguous()
    if needs_grad(x, residual, weight):
        return _AddRMSNorm.apply(x, residual, weight, eps, backend)
    y, z, _ = KERNELS[backend].rms_norm_fwd(x, residual, weight, x.shape[-1], eps, statistics=False)
    return y, z
