"""The linear layer y = x weight^T + bias.

With the one to eight rows of decoding the time goes into reading the weight, which a kernel of our own does at the rate
of the memory. Training and long prompts belong to the library's matrix product, unless ours is faster on the CPU at
hand (_products.py).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.dispatch import Backend, Request, always, autocast_dtype, choose, must_trace, needs_grad
from .._core.registry import Draw, register
from ..backends import cpu as _native
from ..backends.conditions import cpu_unsupported
from ..backends.cpu import linear as _kernels
from . import _products
from ._thresholds import ROWS_IN_FP32, ROWS_IN_HALF, SMALL_WEIGHT


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition, in fp32 or wider."""
    wide = _native.compute_dtype(x.dtype)
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _unsupported(request: Request) -> str | None:
    asked = dict(request.features)
    if not asked["large"]:
        if not asked["few_rows"]:
            return f"its kernel takes 1 to {_kernels.LINEAR_ROWS} rows; more are the library's, but for large products"
        if asked["gradient"]:
            return "its kernel has no backward pass; gradients are the library's, but for large products"
    return cpu_unsupported(request)


def faster_rows_in_fp32() -> range:
    return ROWS_IN_FP32[_products.mkl_lags()]


# Rows at which the kernel reads a weight faster than PyTorch's product does.
FASTER_ROWS = {
    torch.float32: faster_rows_in_fp32(),
    torch.bfloat16: ROWS_IN_HALF,
    torch.float16: ROWS_IN_HALF,
}


def _library_faster(dtype: torch.dtype, rows: int, size: int) -> bool:
    return rows not in FASTER_ROWS.get(dtype, ()) or size <= SMALL_WEIGHT[dtype]


def _slower(request: Request) -> str | None:
    if dict(request.features)["library_faster"]:
        return "PyTorch's product is faster with so few rows of this dtype, or with so small a weight"
    return None


# The answers -> the request's features, made once: a tenth of a small call. `large`: ours leads, gradients included.
_FEATURES = {
    asked: tuple(zip(("few_rows", "gradient", "large", "library_faster"), asked, strict=True))
    for asked in itertools.product((False, True), repeat=4)
}


def _usual(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether everything fits in the commonest way: less than half of what `_check` costs."""
    dtype, shape = x.dtype, weight.shape
    return (
        len(shape) == 2
        and x.shape[-1:] == shape[1:]
        and dtype in _native.TYPE_CODE
        and weight.dtype is dtype
        and x.is_cpu
        and weight.is_cpu
        and (bias is None or (bias.is_cpu and bias.dtype is dtype and bias.shape == shape[:1]))
    )


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: weight has shape {tuple(weight.shape)}, expected (features, {x.shape[-1] if x.dim() else 1}) "
            f"to match x of shape {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},) to match weight")
    for name, given in (("weight", weight), ("bias", bias)):
        if given is None:
            continue
        if given.device != x.device:
            raise ValueError(f"linear: {name} is on {given.device}, x is on {x.device}")
        if given.dtype != x.dtype:
            raise TypeError(f"linear: {name} has dtype {given.dtype}, expected {x.dtype} to match x")
    if not x.is_floating_point():
        raise TypeError(f"linear: x has dtype {x.dtype}, expected a floating-point dtype")


def _draw(draw: Draw) -> list[dict[str, Any]]:
    weight = draw(7, 24)
    return [{"x": draw(3, 24), "weight": weight}, {"x": draw(5, 4, 24), "weight": weight, "bias": draw(7)}]


@register(
    reference=linear_ref,
    backends=(Backend("cpu", _unsupported, slower=_slower), Backend("torch", always), Backend("reference", always)),
    differentiable=("x", "weight", "bias"),
    draw=_draw,
    note="our kernels for 1 to 8 rows without gradients (fp32: 4 to 8 where MKL is fast) and for large products where "
    "they lead; the rest is the library's",
)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer, as `torch.nn.functional.linear`: x weight^T + bias.

    Args:
        x: (..., K), float32, float64, bfloat16 or float16.
        weight: (N, K), like x.
        bias: (N,), like x, or None.

    Returns:
        (..., N), like x. Up to 8 rows without gradients, in fp32 4 to 8 where MKL is fast, are summed in fp32 by our
        own kernel, each row to the same bits whatever the others are, and so are large products in fp32 and bf16 where
        `fastlm doctor` says that ours are the faster ones; all else, fp64 and tiny weights are the library's product.

    Raises:
        ValueError: if shapes or devices disagree.
        TypeError: if a tensor is not floating-point, or the dtypes differ outside autocast.
        BackendError: if a forced backend cannot serve the call.
    """
    device = "cpu" if x.is_cpu else x.device.type
    if must_trace(x, weight, bias) or autocast_dtype(device) is not None:
        return F.linear(x, weight, bias)
    if not _usual(x, weight, bias):
        _check(x, weight, bias)
    return _served(x, weight, bias, device)


def chosen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's product by the backend that is asked for, and by PyTorch where this op does not take its arguments."""
    device = "cpu" if x.is_cpu else x.device.type
    if must_trace(x, weight, bias) or torch.is_autocast_enabled(device) or not _usual(x, weight, bias):
        return F.linear(x, weight, bias)
    return _served(x, weight, bias, device)


def _served(x: Tensor, weight: Tensor, bias: Tensor | None, device: str) -> Tensor:
    size = weight.numel()
    rows = x.numel() // max(1, weight.shape[1])
    products = rows * size
    few = rows <= _kernels.LINEAR_ROWS or not products
    gradient = products > 0 and needs_grad(x, weight, bias)
    large = (gradient or not few) and _products.suits(x, products, gradient)
    asked = few, gradient, large, not large and _library_faster(x.dtype, rows, size)
    backend = choose("linear", (device, x.dtype, _FEATURES[asked]))
    if backend == "torch" or not products:  # without products the result is the bias, or empty
        return F.linear(x, weight, bias)
    if backend == "reference":
        return linear_ref(x, weight, bias)
    if large:
        return _products.linear(x, weight, bias)
    return _kernels.linear_fwd(x.contiguous(), weight.contiguous(), bias if bias is None else bias.contiguous())
