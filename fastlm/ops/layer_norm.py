"""Layer normalization (Ba et al. 2016), alone and fused with the residual addition before it.

Over the last dimensions of x:   y = (x - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import dropout as _dropout
from .._core.dispatch import Backend, LazyModule, always, choose, must_trace, needs_grad, request_of
from .._core.registry import Draw, register
from ..backends import cpu as _native
from ..backends.conditions import cpu_unsupported, cuda_unsupported, triton_unsupported
from ..backends.cpu import layer_norm as _kernels
from ._autograd import by_kernels, rows_of, stored
from ._residual import stream_dtype

KERNELS: dict[str, Any] = {
    "cpu": _kernels,
    "triton": LazyModule("fastlm.kernels.layer_norm"),
    "cuda": LazyModule("fastlm.backends.cuda.layer_norm"),
}


def row_means(rows: Tensor) -> Tensor:
    """(M, N) -> (M, 1), in which the mean of equal numbers is that number.

    The second sum takes back what rounding did to the first; its derivative is 0.
    """
    mean = rows.mean(-1, keepdim=True)
    return mean + (rows - mean).mean(-1, keepdim=True).detach()


def layer_norm_ref(x: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, eps: float) -> Tensor:
    """The definition, with statistics in fp32 or wider, over rows of N elements."""
    wide = _native.compute_dtype(x.dtype)
    rows = rows_of(x, N).to(wide)
    centred = rows - row_means(rows)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.reshape(-1).to(wide)
    if bias is not None:
        y = y + bias.reshape(-1).to(wide)
    return y.reshape(x.shape).to(x.dtype)


def add_layer_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """(normed, z) with z = residual + dropout(x), the mask being the kernels' own."""
    wide, N = _native.compute_dtype(residual.dtype), x.shape[-1]
    x = x.to(wide)
    if dropout_p > 0:
        x = x * _dropout.factors(x.numel() // max(N, 1), N, dropout_p, seed, wide, x.device).reshape(x.shape)
    z, read = stored(residual.to(wide) + x, residual.dtype)
    return layer_norm_ref(read, weight, bias, N, eps).to(z.dtype), z


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A parameter's gradient sum in the parameter's shape and dtype.

    It is so already where the sums are of one dimension in fp32. Two operators that do nothing take 50 us right after a
    kernel that has swept the caches, of 1000 at 4096x768.
    """
    if grad is None or parameter is None:
        return None
    if grad.dtype is not parameter.dtype:
        grad = grad.to(parameter.dtype)
    return grad if grad.shape == parameter.shape else grad.reshape(parameter.shape)


def _as(out_dtype: torch.dtype, y: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return y.to(out_dtype), *rest


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, N, eps, out_dtype, backend):
        y, _, mean, rstd = KERNELS[backend].layer_norm_fwd(x, None, weight, bias, N, eps, out_dtype=out_dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.options, ctx.backend = (N, eps, out_dtype), backend
        return y

    @staticmethod
    @by_kernels(lambda *given: layer_norm_ref(*given[:-1]).to(given[-1]), tensors=3)
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        need = ctx.needs_input_grad
        _, dx, dw, db = KERNELS[ctx.backend].layer_norm_bwd(
            dy.contiguous(), x, weight, mean, rstd, ctx.options[0], weight_grads=need[1] or need[2]
        )
        return dx, _like(dw, weight), _like(db, bias)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, dropout_p, seed, out_dtype, backend):
        y, z, mean, rstd = KERNELS[backend].layer_norm_fwd(
            x, residual, weight, bias, x.shape[-1], eps, dropout_p, seed, out_dtype=out_dtype
        )
        ctx.save_for_backward(x, residual, weight, bias, z, mean, rstd)
        ctx.options, ctx.backend = (eps, dropout_p, seed, out_dtype), backend
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    @by_kernels(lambda *given: _as(given[-1], *add_layer_norm_ref(*given[:-1])), tensors=4)
    def backward(ctx, dy, dz_in):
        x, _, weight, bias, z, mean, rstd = ctx.saved_tensors
        _, dropout_p, seed, out_dtype = ctx.options
        need = ctx.needs_input_grad
        dy = torch.zeros_like(z, dtype=out_dtype) if dy is None else dy.contiguous()
        dz, dx, dw, db = KERNELS[ctx.backend].layer_norm_bwd(
            dy, z, weight, mean, rstd, x.shape[-1],
            None if dz_in is None else dz_in.contiguous(), dropout_p, seed, x.dtype, need[2] or need[3],
        )  # fmt: skip
        return dx, dz, _like(dw, weight), _like(db, bias)


def _check_parameter(op: str, name: str, given: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if given.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(given.shape)}, expected {shape} to match x")
    if given.device != x.device:
        raise ValueError(f"{op}: {name} is on {given.device}, x is on {x.device}")
    if not given.is_floating_point():
        raise TypeError(f"{op}: {name} has dtype {given.dtype}, expected a floating-point dtype")


def _usual(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether everything fits in the commonest way: a third of what `_check` costs, which is felt on one row."""
    dtype = x.dtype
    return (
        x.is_cpu
        and dtype in _native.TYPE_CODE
        and x.shape[-1:] == shape
        and (weight is None or (weight.is_cpu and weight.dtype is dtype and weight.shape == shape))
        and (bias is None or (bias.is_cpu and bias.dtype is dtype and bias.shape == shape))
    )


def _inference(
    x: Tensor, normalized_shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """The result where the commonest call without gradients goes to the CPU kernel, else None.

    On one row the general path's questions take twice as long as the kernel; these are all that this case needs.
    """
    if weight is None or bias is None:
        return None
    dtype = x.dtype
    N = _plain_row(x, weight, bias, dtype)
    if not N or (normalized_shape != N and normalized_shape != (N,)):
        return None
    if choose("layer_norm", ("cpu", dtype, ())) != "cpu":
        return None
    return _kernels.layer_norm(x, weight, bias, N, eps, dtype)


def _add_inference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor] | None:
    """As `_inference`, of the sum of two tensors alike."""
    if weight is None or bias is None or type(residual) is not type(x):
        return None
    dtype = x.dtype
    if residual.shape != x.shape or residual.dtype is not dtype or not residual.is_cpu:
        return None
    N = _plain_row(x, weight, bias, dtype)
    if not N or not residual.is_contiguous() or choose("add_layer_norm", ("cpu", dtype, ())) != "cpu":
        return None
    return _kernels.add_layer_norm(x, residual, weight, bias, N, eps, dtype)


def _plain_row(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> int:
    """x's last extent where all are contiguous, on the CPU and of x's dtype, weight and bias vectors of it; else 0."""
    if must_trace(x, weight, bias):
        return 0
    shape, extents = weight.shape, x.shape
    if len(shape) != 1 or bias.shape != shape or not extents or extents[-1] != shape[0]:
        return 0
    if not (weight.dtype is dtype is bias.dtype and x.is_cpu and weight.is_cpu and bias.is_cpu):
        return 0
    return shape[0] if x.is_contiguous() and weight.is_contiguous() and bias.is_contiguous() else 0


def _check(op: str, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{op}: x has dtype {x.dtype}, expected a floating-point dtype")
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected it to end in normalized_shape {shape}")
    if weight is not None:
        _check_parameter(op, "weight", weight, x, shape)
    if bias is not None:
        _check_parameter(op, "bias", bias, x, shape)


def _same_dtype(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Kernels read both parameters in one dtype; the wider serves where they differ."""
    if weight is not None:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
        if weight is not None and weight.dtype != bias.dtype:
            wider = torch.promote_types(weight.dtype, bias.dtype)
            return weight.to(wider), bias.to(wider)
    return weight, bias


def _stored_by_kernels(stream: torch.dtype, out: torch.dtype) -> bool:
    """Whether the kernels write this output dtype from a stream of that one: the same, or 16 bits from fp32."""
    return out == stream or (stream == torch.float32 and out in (torch.bfloat16, torch.float16))


CPU = Backend("cpu", cpu_unsupported)
TRITON = Backend("triton", triton_unsupported, needs_proof=True)
CUDA = Backend("cuda", cuda_unsupported, needs_proof=True)
TORCH, REFERENCE = Backend("torch", always), Backend("reference", always)


def _draw(draw: Draw) -> list[dict[str, Any]]:
    x, parameters = draw(3, 5, 16), {"weight": draw(16), "bias": draw(16)}
    return [
        {"x": x, "normalized_shape": 16} | parameters,
        {"x": x, "normalized_shape": (5, 16), "eps": 0.1},
        {"x": x, "normalized_shape": 16, "out_dtype": torch.float16} | parameters,
    ]


@register(
    reference=layer_norm_ref,
    backends=(CPU, TRITON, CUDA, TORCH, REFERENCE),
    differentiable=("x", "weight", "bias"),
    draw=_draw,
)
def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Layer normalization over the last dimensions, as `torch.nn.functional.layer_norm`.

    Args:
        x: (..., *normalized_shape), float32, float64, bfloat16 or float16.
        normalized_shape: the trailing dimensions to normalize over.
        weight, bias: normalized_shape, of any floating-point dtype; None for 1 and 0.
        eps: added to the variance.
        out_dtype: of the result, where it is not x's: a 16-bit one spares the cast before a 16-bit product.

    Returns:
        Like x, in out_dtype. Statistics are computed in fp32 or wider, the variance from centred values.

    Raises:
        ValueError: if shapes or devices disagree.
        TypeError: if a tensor is not floating-point.
        BackendError: if a forced backend cannot serve the call.
    """
    if out_dtype is None and not torch.is_grad_enabled():
        y = _inference(x, normalized_shape, weight, bias, eps)
        if y is not None:
            return y
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not _usual(x, shape, weight, bias):
        _check("layer_norm", x, shape, weight, bias)
    out_dtype = out_dtype or x.dtype
    if must_trace(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, eps).to(out_dtype)
    N = math.prod(shape)
    backend = choose("layer_norm", ("cpu", x.dtype, ()) if x.is_cpu else request_of(x))
    if backend == "torch":
        return F.layer_norm(x, shape, weight, bias, eps).to(out_dtype)
    if backend == "reference":
        return layer_norm_ref(x, weight, bias, N, eps).to(out_dtype)
    x = x.contiguous()
    weight, bias = _same_dtype(weight, bias)
    if not _stored_by_kernels(x.dtype, out_dtype):
        return layer_norm(x, shape, weight, bias, eps).to(out_dtype)
    if needs_grad(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, N, eps, out_dtype, backend)
    return KERNELS[backend].layer_norm_fwd(x, None, weight, bias, N, eps, out_dtype=out_dtype, statistics=False)[0]


def _add_draw(draw: Draw) -> list[dict[str, Any]]:
    tensors = {"x": draw(3, 5, 16), "residual": draw(3, 5, 16)}
    weight, bias = draw(16), draw(16)
    return [
        tensors,
        tensors | {"weight": weight, "dropout_p": 0.3},
        tensors | {"weight": weight, "bias": bias, "eps": 0.1, "out_dtype": torch.float16},
    ]


@register(
    reference=add_layer_norm_ref,
    backends=(CPU, TRITON, CUDA, REFERENCE),
    differentiable=("x", "residual", "weight", "bias"),
    draw=_add_draw,
)
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and layer normalization in one pass: the seam between two pre-norm sublayers.

    Args:
        x: (..., N), a sublayer's output.
        residual: like x; may be wider (a float32 stream under a 16-bit x).
        weight, bias: (N,), or None for 1 and 0.
        eps: added to the variance.
        dropout_p: probability of dropping an element of x; the mask comes from torch's default generator's
            seed and is recomputed, not stored, for the backward pass.
        out_dtype: of the normalized result, where it is not z's: a 16-bit one under a float32 stream spares
            the cast before a 16-bit product.

    Returns:
        (layer_norm(z), z) with z = residual + dropout(x) in the wider dtype of x and residual, and the
        normalized one in out_dtype.

    Raises:
        ValueError: if shapes or devices disagree, or dropout_p is no probability.
        TypeError: if a tensor is not floating-point.
        BackendError: if a forced backend cannot serve the call.
    """
    if out_dtype is None and dropout_p == 0 and not torch.is_grad_enabled():
        found = _add_inference(x, residual, weight, bias, eps)
        if found is not None:
            return found
    op = "add_layer_norm"
    _check(op, x, tuple(x.shape[-1:]), weight, bias)
    stream = stream_dtype(op, x, residual)
    dropout_p = _dropout.check_probability(op, dropout_p)
    out_dtype = out_dtype or stream
    if residual.dtype != stream:
        residual = residual.to(stream)
    if x.dtype != stream and (stream != torch.float32 or out_dtype not in (stream, x.dtype)):
        x = x.to(stream)
    if must_trace(x, residual, weight, bias):
        z = residual + F.dropout(x, dropout_p)
        return F.layer_norm(z, z.shape[-1:], weight, bias, eps).to(out_dtype), z
    backend = choose(op, ("cpu", x.dtype, ()) if x.is_cpu else request_of(x))
    seed = _dropout.draw_seed(x.device) if dropout_p > 0 else 0
    if backend == "reference":
        y, z = add_layer_norm_ref(x, residual, weight, bias, eps, dropout_p, seed)
        return y.to(out_dtype), z
    x, residual = x.contiguous(), residual.contiguous()
    weight, bias = _same_dtype(weight, bias)
    kernel_dtype = out_dtype if _stored_by_kernels(stream, out_dtype) else stream
    if needs_grad(x, residual, weight, bias):
        y, z = _AddLayerNorm.apply(x, residual, weight, bias, eps, dropout_p, seed, kernel_dtype, backend)
    else:
        y, z, _, _ = KERNELS[backend].layer_norm_fwd(
            x, residual, weight, bias, x.shape[-1], eps, dropout_p, seed, out_dtype=kernel_dtype, statistics=False
        )
    return y.to(out_dtype), z
