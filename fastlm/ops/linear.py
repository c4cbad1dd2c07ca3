"""The linear layer y = x weight^T + bias: one op, which every layer and model calls.

With the one to eight rows of decoding the time goes into reading the weight, which a kernel of our own does at the rate
of the memory. Training and long prompts belong to MKL and oneDNN, unless our own GEMM is faster on the CPU at hand
(_gemm.py). `_fastest` decides; its thresholds are in _thresholds.py, their measurements in docs/design/linear.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.dispatch import (
    Backend,
    Request,
    always,
    autocast_dtype,
    choose,
    forced_backend,
    mode,
    must_trace,
    needs_grad,
    without_autocast,
)
from .._core.registry import Draw, register
from .._core.torch_private import has_pointwise_linear, pointwise_linear
from ..backends import cpu as _native
from ..backends.conditions import cpu_unsupported
from ..backends.cpu import linear as _kernels
from . import _thresholds
from ._autograd import by_reference
from ._gemm import as_matrix, has_tiles, leads, multiply, suits, too_deep
from ._shadow import copy_of, rounded


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition, in fp32 or wider."""
    wide = _native.compute_dtype(x.dtype)
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


# ---- kernels --------------------------------------------------------------------------------------------------------


def _by_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Under autocast, of what that casts the arguments to."""
    device = "cpu" if x.is_cpu else x.device.type
    dtype = autocast_dtype(device)
    if dtype is None or x.dtype is torch.float64:  # which autocast leaves alone
        return linear_ref(x, weight, bias)
    with without_autocast(device):
        return linear_ref(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _kernels.linear_fwd(x.contiguous(), weight.contiguous(), bias if bias is None else bias.contiguous())


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return multiply(as_matrix(x), weight.t(), bias).view(*x.shape[:-1], weight.shape[0])


def _in_halves(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _matmul(x, weight, None)
    return y if bias is None else y.add_(bias)


def _rows_that_count(d: Tensor, x: Tensor) -> Tensor | None:
    """The rows of the gradient d (M, N) that are not all zeros, where they are few; x (M, K) is what d is of.

    A row of zeros adds nothing to the weight's gradient unless its x is not finite: NaN then, as without this.
    """
    if d.shape[1] < _thresholds.MANY_CLASSES or not d.is_cpu:
        return None
    zero, least = d[:, 0] == 0, _thresholds.IGNORED_SHARE * d.shape[0]
    if int(zero.sum()) <= least:
        return None
    zero &= (d.amax(1) == 0) & (d.amin(1) == 0)
    if int(zero.sum()) <= least or not bool(x[zero].isfinite().all()):
        return None
    return (~zero).nonzero().squeeze(1)


class _Linear(torch.autograd.Function):
    """y = x weight^T + bias in x's dtype, fp32 or bf16, for weights in it or in fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        w = rounded(weight) if x.dtype is torch.bfloat16 else weight
        ctx.save_for_backward(x, w, weight)
        ctx.with_bias = bias is not None
        rows = as_matrix(x)
        y = x.new_empty(*x.shape[:-1], w.shape[0])  # a view made here could not be edited in place afterwards
        multiply(rows, w.t(), None if bias is None else bias.to(x.dtype), y.view(rows.shape[0], w.shape[0]))
        return y

    @staticmethod
    def backward(ctx, grad):
        x, w, weight = ctx.saved_tensors
        rows, d = as_matrix(x), as_matrix(grad)
        bias_grad = d.sum(0) if ctx.with_bias and ctx.needs_input_grad[2] else None
        if by_reference(grad):
            return (d @ weight.to(d.dtype)).view_as(x), d.t() @ rows, bias_grad
        dx = dw = None
        kept = _rows_that_count(d, rows)
        if kept is not None:
            d, every, rows = d[kept], rows, rows[kept]
        if ctx.needs_input_grad[0]:
            dx = multiply(d, w)
            dx = (dx if kept is None else torch.zeros_like(every).index_copy_(0, kept, dx)).view_as(x)
        if ctx.needs_input_grad[1]:  # laid out as the weight is
            dw = multiply(d.t(), rows) if weight.is_contiguous() else multiply(rows.t(), d).t()
        return dx, dw, bias_grad


def _train_in_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _Linear.apply(x.to(torch.bfloat16), weight, bias)


class Kernel(NamedTuple):
    """A way to compute the layer.

    Attributes:
        name: what `explain` calls it.
        run: (x, weight, bias) -> y.
        ours: whether kernels of our own multiply; else PyTorch's operators do.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    ours: bool = False


TORCH = Kernel("torch", F.linear)
REFERENCE = Kernel("reference", _by_reference)
FEW_ROWS = Kernel("few_rows", _few_rows, ours=True)
GEMM = Kernel("gemm", _matmul, ours=True)
GEMM_IN_TRAINING = Kernel("gemm", _Linear.apply, ours=True)
# In training under autocast: the weight's bf16 copy is read where it has one (_shadow.py).
GEMM_IN_BF16 = Kernel("gemm_bf16_copy", _train_in_bf16, ours=True)
TORCH_IN_BF16 = Kernel("bf16_copy", _train_in_bf16)
# Rows without gradient are left out of the backward pass of a layer of many outputs.
COUNTED_ROWS = Kernel("counted_rows", _Linear.apply)
# oneDNN's in bf16 without gradients: a layer in two halves for two threads, and with the bias inside the matmul.
HALVES = Kernel("halves", _in_halves)
POINTWISE = Kernel("pointwise", pointwise_linear)
TOO_DEEP = Kernel("torch", _matmul)
QUANTIZED = Kernel("quantized", F.linear, ours=True)  # run by compression.quantization, of the weight as it is held

OURS = {kernel.name for kernel in (FEW_ROWS, GEMM, GEMM_IN_BF16, QUANTIZED)}


def _fastest(x: Tensor, weight: Tensor, bias: Tensor | None) -> Kernel:
    """The kernel for arguments of shapes that fit each other and of memory that a kernel can read.

    A small call takes 5 us, of which this may not take much: what leaves most calls to PyTorch is asked first.
    """
    shape = weight.shape
    if not x.is_cpu or len(shape) != 2:
        return TORCH
    if torch.is_autocast_enabled("cpu"):
        return _fastest_under_autocast(x, weight, bias)
    columns, depth = shape
    dtype, size = x.dtype, x.numel()
    work, rows = size * columns, size // (depth or 1)  # work in multiplications
    few = rows in _thresholds.FASTER_ROWS.get(dtype, ())
    if work <= _thresholds.SMALL_PRODUCT and not few and rows < _thresholds.MANY_ROWS:
        return TORCH
    if not work or not _same_dtype(x, weight, bias):
        return TORCH
    if needs_grad(x, weight, bias):
        return _fastest_in_training(x, weight, work)
    if few:
        return FEW_ROWS if columns * depth > _thresholds.SMALL_WEIGHT[dtype] else TORCH
    if leads(dtype):
        if work <= _thresholds.SMALL_PRODUCT:
            return TORCH
        return TOO_DEEP if dtype is torch.bfloat16 and too_deep(x) else GEMM
    if dtype is not torch.bfloat16 or rows < _thresholds.MANY_ROWS:
        return TORCH
    if has_tiles() and rows in _thresholds.LONE_ROWS and columns in _thresholds.LONE_COLUMNS:
        return HALVES
    return POINTWISE if bias is not None and has_pointwise_linear() else TORCH


def _fastest_in_training(x: Tensor, weight: Tensor, work: int) -> Kernel:
    if work <= _thresholds.SMALL_IN_TRAINING:
        return TORCH
    if leads(x.dtype):
        return GEMM_IN_TRAINING
    many = weight.shape[0] >= _thresholds.MANY_CLASSES and x.dtype in (torch.float32, torch.bfloat16)
    return COUNTED_ROWS if many and needs_grad(x, weight) else TORCH


def _fastest_under_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Kernel:
    """A kernel of our own for training in bfloat16 alone: large layers, and those whose weight carries a copy."""
    work = x.numel() * weight.shape[0]
    if not needs_grad(x, weight, bias) or torch.get_autocast_dtype("cpu") is not torch.bfloat16 or not work:
        return TORCH
    if weight.dtype is not torch.float32 or x.dtype not in _CAST or (bias is not None and bias.dtype not in _CAST):
        return TORCH
    if work <= _thresholds.SMALL_IN_TRAINING and copy_of(weight) is None:
        return TORCH
    return GEMM_IN_BF16 if suits(torch.bfloat16, work) else TORCH_IN_BF16


_CAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts

# ---- dispatch -------------------------------------------------------------------------------------------------------


def _unsupported(request: Request) -> str | None:
    asked = dict(request.features)
    if asked["traced"]:
        return "its kernels read memory, which a tensor under a transform or of a subclass does not have"
    if asked["kernel"] not in OURS:
        if asked["autocast"]:
            return "under autocast its kernels serve large layers in training in bfloat16"
        if not asked["few_rows"]:
            return f"its kernel takes 1 to {_kernels.LINEAR_ROWS} rows; more are PyTorch's, but for large matmuls"
        if asked["gradient"]:
            return "its kernel has no backward pass; gradients are PyTorch's, but for large matmuls"
    return cpu_unsupported(request)


def _slower(request: Request) -> str | None:
    if dict(request.features)["kernel"] not in OURS:
        return "PyTorch's matmul is faster with so few rows of this dtype, or with so small a weight"
    return None


def _stands_in(request: Request) -> bool:
    asked = dict(request.features)
    return asked["layer"] or asked["traced"]


@functools.cache
def _features(kernel: Kernel, few_rows: bool, gradient: bool, autocast: bool, traced: bool, layer: bool) -> tuple:
    return (
        ("kernel", kernel.name), ("few_rows", few_rows), ("gradient", gradient), ("autocast", autocast),
        ("traced", traced), ("layer", layer),
    )  # fmt: skip


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether shapes and devices are right; of dtypes `_fastest` sees to it, and PyTorch."""
    shape = weight.shape
    if len(shape) != 2 or x.shape[-1:] != shape[1:]:
        return False
    if x.is_cpu and weight.is_cpu:
        return bias is None or (bias.is_cpu and bias.shape == shape[:1])
    return x.device == weight.device and (bias is None or (bias.device == x.device and bias.shape == shape[:1]))


def _same_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether all have one of the kernels' dtypes."""
    return x.dtype in _native.TYPE_CODE and _one_dtype(x, weight, bias)


def _one_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    dtype = x.dtype
    return weight.dtype is dtype and (bias is None or bias.dtype is dtype)


def _resolved(kernel: Kernel, x: Tensor, weight: Tensor, bias: Tensor | None, fits: bool, layer: bool) -> Kernel:
    """The kernel that runs where the fastest is `kernel`: the one that is asked for, and that the arguments allow."""
    if not fits:
        return TORCH  # whose error it is
    traced = must_trace(x, weight, bias)
    if mode() is None:
        return TORCH if traced else kernel
    device, dtype = "cpu" if x.is_cpu else x.device.type, x.dtype
    autocast = autocast_dtype(device) is not None
    if not (dtype.is_floating_point and _one_dtype(x, weight, bias)) and not autocast:
        return TORCH
    kernel = TORCH if traced else kernel
    work = x.numel() * weight.shape[0]
    few = not work or x.numel() <= _kernels.LINEAR_ROWS * weight.shape[1]
    gradient = work > 0 and needs_grad(x, weight, bias)
    backend = choose("linear", (device, dtype, _features(kernel, few, gradient, autocast, traced, layer)))
    if backend == "reference":
        return REFERENCE
    if backend == "cpu":
        return kernel if kernel.ours else FEW_ROWS if work else TORCH
    return TORCH if kernel.ours or forced_backend() == "torch" else kernel


def quantized_kernel_is_chosen(x: Tensor) -> bool:
    """Whether a quantized layer multiplies 1 to 8 rows x with its weight as it is held; it has a kernel for them."""
    features = _features(QUANTIZED, few_rows=True, gradient=False, autocast=False, traced=False, layer=True)
    return mode() is None or choose("linear", ("cpu", x.dtype, features)) == "cpu"


def layer_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` for layers and models: PyTorch's errors, and its matmul where a forced backend has none for the call."""
    return F.linear(x, weight, bias) if torch.compiler.is_compiling() else eager_layer_linear(x, weight, bias)


def eager_layer_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same outside torch.compile."""
    kernel = _fastest(x, weight, bias)
    if kernel is not TORCH or mode() is not None:
        kernel = _resolved(kernel, x, weight, bias, _fits(x, weight, bias), True)
    return kernel.run(x, weight, bias)


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
    backends=(
        Backend("cpu", _unsupported, slower=_slower),
        Backend("torch", always, stands_in=_stands_in),
        Backend("reference", always),
    ),
    differentiable=("x", "weight", "bias"),
    draw=_draw,
    note="our kernels for 1 to 8 rows without gradients (fp32: 4 to 8 where MKL is fast) and for large matmuls where "
    "they lead; the rest is PyTorch's",
)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer, as `torch.nn.functional.linear`: x weight^T + bias.

    Args:
        x: (..., K), float32, float64, bfloat16 or float16.
        weight: (N, K), like x.
        bias: (N,), like x, or None.

    Returns:
        (..., N), like x, or in autocast's dtype. Up to 8 rows without gradients, in fp32 4 to 8 where MKL is fast, are
        summed in fp32 by our own kernel, each row to the same bits whatever the others are, and so are large matmuls
        in fp32 and bf16 where `fastlm doctor` says that ours are the faster ones; all else, fp64 and tiny weights are
        PyTorch's. Under torch.compile it is `torch.nn.functional.linear`.

    Raises:
        ValueError: if shapes or devices disagree.
        TypeError: if a tensor is not floating-point, or the dtypes differ outside autocast.
        BackendError: if a forced backend cannot serve the call.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    fits = _fits(x, weight, bias)
    if not (fits and _same_dtype(x, weight, bias)):
        device = "cpu" if x.is_cpu else x.device.type
        if autocast_dtype(device) is None and not must_trace(x, weight, bias):
            _check(x, weight, bias)
    kernel = _fastest(x, weight, bias)
    if kernel is not TORCH or mode() is not None:
        kernel = _resolved(kernel, x, weight, bias, fits, False)
    return kernel.run(x, weight, bias)
