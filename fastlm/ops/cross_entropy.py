"""Softmax cross-entropy.

Of a row x of logits with class y and lse = log sum_c exp x_c, with label smoothing e (Szegedy et al. 2016) and
class weights w:   loss = (1 - e) w_y (lse - x_y) + e/N sum_c w_c (lse - x_c);   the mean divides by the sum of w_y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.dispatch import (
    Backend,
    LazyModule,
    Request,
    always,
    autocast_dtype,
    choose,
    must_trace,
    needs_grad,
    request_of,
)
from .._core.registry import Draw, register
from ..backends import cpu as _native
from ..backends.conditions import cpu_unsupported, triton_unsupported
from ..backends.cpu import cross_entropy as _kernels
from ._autograd import by_kernels, operator

KERNELS: dict[str, Any] = {"cpu": _kernels, "triton": LazyModule("fastlm.kernels.cross_entropy")}
REDUCTIONS = ("none", "mean", "sum")
IGNORE_INDEX = -100  # PyTorch's: a target that does not count


def cross_entropy_ref(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The definition in fp32 or wider, over dimension 1 (0 where it is the only one), in the input's dtype."""
    wide = _native.compute_dtype(input.dtype)
    dim = min(1, input.dim() - 1)
    C = input.shape[dim]
    log_p = input.to(wide).log_softmax(dim).movedim(dim, -1)
    w = input.new_ones(C, dtype=wide) if weight is None else weight.to(wide)
    if target.is_floating_point():
        q = target.to(wide).movedim(dim, -1) * (1 - label_smoothing) + label_smoothing / C
        loss = -(log_p * q * w).sum(-1)
        count = loss.new_tensor(loss.numel())
    else:
        keep = target != ignore_index
        classes = torch.where(keep, target, 0).long()
        loss = -(1 - label_smoothing) * w[classes] * log_p.gather(-1, classes.unsqueeze(-1)).squeeze(-1)
        if label_smoothing > 0:
            loss = loss - label_smoothing / C * (log_p * w).sum(-1)
        loss = torch.where(keep, loss, 0)
        count = torch.where(keep, w[classes], 0).sum()
    if reduction != "none":
        loss = loss.sum() / count if reduction == "mean" else loss.sum()
    return loss.to(input.dtype)


def cross_entropy_grad_ref(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    grad: Tensor,
) -> Tensor:
    """Gradient of the definition for class indices and logits (M, C), in fp32 or wider, without autograd."""
    wide, C = _native.compute_dtype(x.dtype), x.shape[1]
    w = x.new_ones(C, dtype=wide) if weight is None else weight.to(wide)
    keep = target != ignore_index
    classes = torch.where(keep, target, 0)
    w_y = torch.where(keep, w[classes], 0)
    grad = grad.to(wide) / w_y.sum() if reduction == "mean" else grad.to(wide)
    spread = w * (label_smoothing / C)
    hard = (1 - label_smoothing) * w_y
    dx = (hard + spread.sum())[:, None] * x.to(wide).softmax(1) - spread
    dx = dx.scatter_add(1, classes[:, None], -hard[:, None])
    return torch.where(keep[:, None], dx * grad.reshape(-1, 1), 0)


def _class_indices(unsupported: Callable[[Request], str | None]) -> Callable[[Request], str | None]:
    """A backend's conditions with that of the kernels, which take class indices alone."""

    def reason(request: Request) -> str | None:
        if ("target", "probabilities") in request.features:
            return "its kernels take class indices, not class probabilities"
        return unsupported(request)

    return reason


cpu_conditions, triton_conditions = _class_indices(cpu_unsupported), _class_indices(triton_unsupported)


class Options(NamedTuple):
    """What a call says beyond its tensors; `dtype` is the loss's."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    dtype: torch.dtype


# A count, and what is made of it, is a number from the CPU kernels and a scalar tensor from a GPU's, which is not
# waited for.
Scalar = Tensor | float


def reduced(loss: Tensor, count: Scalar, options: Options) -> Tensor:
    """(M,) losses in compute dtype -> the result; count is the sum of the targets' class weights."""
    if options.reduction == "none":
        return loss.to(options.dtype)
    if isinstance(count, Tensor):
        summed = loss.sum()
        return (summed / count if options.reduction == "mean" else summed).to(options.dtype)
    total = _kernels.cross_entropy_total(loss)
    if options.reduction == "mean":
        total = total / count if count else math.nan
    return torch.tensor(total, dtype=loss.dtype).to(options.dtype)


def incoming(grad: Tensor, count: Scalar) -> Scalar:
    """The gradient of a reduced loss, of count's kind."""
    return grad.float() if isinstance(count, Tensor) else grad.item()


def row_scale(grad: Scalar, count: Scalar, options: Options) -> Scalar:
    """What a row's gradient is multiplied by, where the reduced loss received `grad`."""
    if options.reduction == "sum":
        return grad
    if isinstance(count, Tensor):
        return grad / count
    return grad / count if count else math.nan


# The gradient that the last reduced loss received: 1 in plain training, 1/k under gradient accumulation, a loss
# scale. The forward pass computes the logits' gradient for this guess while the row is in cache, which saves
# reading the logits again; a wrong guess costs that time and changes no bit. On a GPU the guess is always 1, and
# the kernel that makes the gradient again looks for itself whether it has to.
_expected = [1.0]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, weight, options, backend, inplace):
        kernels = KERNELS[backend]
        count = kernels.cross_entropy_targets(target, weight, x.shape[1], options.ignore_index)
        guess = None if options.reduction == "none" or inplace else 1.0 if isinstance(count, Tensor) else _expected[0]
        loss, stats, dx = kernels.cross_entropy_fwd(
            x, target, weight, options.ignore_index, options.label_smoothing,
            None if guess is None else row_scale(guess, count, options),
        )  # fmt: skip
        ctx.save_for_backward(x, target, weight, stats)
        ctx.options, ctx.backend, ctx.inplace, ctx.count = options, backend, inplace, count
        ctx.guess, ctx.dx = guess, dx
        return reduced(loss, count, options)

    @staticmethod
    @by_kernels(lambda *given: cross_entropy_ref(*given[:-1]).to(given[-1]), tensors=3)
    def backward(ctx, grad):
        x, target, weight, stats = ctx.saved_tensors
        out, ctx.dx = ctx.dx, None  # handed out once: what a second backward pass returns is another tensor
        unless = {}
        if ctx.options.reduction == "none":
            scale = grad.to(stats.dtype).contiguous()
        elif isinstance(ctx.count, Tensor):
            scale = row_scale(incoming(grad, ctx.count), ctx.count, ctx.options)
            unless = {} if out is None else {"unless": (grad, ctx.guess)}
        else:
            value = grad.item()
            if math.isfinite(value):
                _expected[0] = value
            if out is not None and value == ctx.guess:
                return (out,)
            scale = row_scale(value, ctx.count, ctx.options)
        if ctx.inplace:
            out = x.detach()
        dx = KERNELS[ctx.backend].cross_entropy_bwd(
            x, target, weight, stats, scale, ctx.options.ignore_index, ctx.options.label_smoothing, out, **unless
        )
        if ctx.inplace:
            torch.autograd.graph.increment_version(x)  # whoever else saved the logits is told that they are gone
        return (dx,)


def _op_fake(x, target, weight, ignore_index, reduction, label_smoothing, dtype):
    loss = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=dtype)
    return loss, x.new_empty(x.shape[0], 3, dtype=_native.compute_dtype(x.dtype))


def _op_gradients(ctx, grad, _):
    *options, _ = ctx.options
    return (torch.ops.fastlm.cross_entropy_backward(grad, *ctx.saved_tensors, *options),)


@operator("cross_entropy", _op_fake, _op_gradients, saved=lambda tensors, outputs, _: (*tensors, outputs[1]))
def _cross_entropy_op(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    x, target = x.contiguous(), target.contiguous()
    options = Options(ignore_index, reduction, label_smoothing, dtype)
    backend = choose("cross_entropy", request_of(x, (), tuple(x.shape), True))
    if backend in KERNELS:
        count = KERNELS[backend].cross_entropy_targets(target, weight, x.shape[1], ignore_index)
        loss, stats, _ = KERNELS[backend].cross_entropy_fwd(x, target, weight, ignore_index, label_smoothing)
        return reduced(loss, count, options).clone(), stats
    loss = cross_entropy_ref(x, target, weight, ignore_index, reduction, label_smoothing)
    return loss.to(dtype, copy=True), x.new_zeros(x.shape[0], 3, dtype=_native.compute_dtype(x.dtype))


def _backward_fake(grad, x, target, weight, stats, ignore_index, reduction, label_smoothing):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("cross_entropy_backward", _backward_fake)
def _cross_entropy_backward_op(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    x, target = x.contiguous(), target.contiguous()
    options = Options(ignore_index, reduction, label_smoothing, grad.dtype)
    backend = choose("cross_entropy", request_of(x, (), tuple(x.shape), True))
    if backend in KERNELS:
        scale: Tensor | float
        if reduction == "none":
            scale = grad.to(stats.dtype).contiguous()
        else:
            count = KERNELS[backend].cross_entropy_targets(target, weight, x.shape[1], ignore_index)
            scale = row_scale(incoming(grad, count), count, options)
        return KERNELS[backend].cross_entropy_bwd(x, target, weight, stats, scale, ignore_index, label_smoothing)
    dx = cross_entropy_grad_ref(x, target, weight, ignore_index, reduction, label_smoothing, grad)
    return dx.to(x.dtype)


def check_options(op: str, reduction: str, label_smoothing: float) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, expected 0 to 1")


def check_class_weight(op: str, name: str, weight: Tensor | None, like: Tensor, C: int) -> None:
    if weight is None:
        return
    if weight.shape != (C,):
        raise ValueError(f"{op}: {name} has shape {tuple(weight.shape)}, expected ({C},), one a class")
    if not weight.is_floating_point():
        raise TypeError(f"{op}: {name} has dtype {weight.dtype}, expected a floating-point dtype")
    if weight.device != like.device:
        raise ValueError(f"{op}: {name} is on {weight.device}, the logits are on {like.device}")
    if needs_grad(weight):
        raise ValueError(f"{op}: {name} requires a gradient, which this op does not have; detach it")


def check_target(
    op: str, target: Tensor, like: Tensor, logits_shape: tuple[int, ...], target_shape: tuple[int, ...]
) -> None:
    probabilities = target.is_floating_point()
    expected = logits_shape if probabilities else target_shape
    if tuple(target.shape) != tuple(expected):
        kind = "class probabilities" if probabilities else "class indices"
        raise ValueError(f"{op}: target has shape {tuple(target.shape)}, expected {tuple(expected)} for {kind}")
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"{op}: target has dtype {target.dtype}, expected class indices or probabilities")
    if target.device != like.device:
        raise ValueError(f"{op}: target is on {target.device}, the logits are on {like.device}")


def _check(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    op = "cross_entropy"
    if not input.is_floating_point():
        raise TypeError(f"{op}: input has dtype {input.dtype}, expected a floating-point dtype")
    if input.dim() == 0:
        raise ValueError(f"{op}: input has no dimensions, expected (C,), (N, C) or (N, C, d1, ...)")
    dim = min(1, input.dim() - 1)
    check_target(op, target, input, input.shape, input.shape[:dim] + input.shape[dim + 1 :])
    check_class_weight(op, "weight", weight, input, input.shape[dim])


def loss_dtype(x: Tensor) -> torch.dtype:
    """torch's: the input's, but float32 for 16-bit inputs under autocast."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow and autocast_dtype(x.device.type) is not None else x.dtype


def _draw(draw: Draw) -> list[dict[str, Any]]:
    x, target, ignored = draw(7, 11), draw.index(11, 7), draw.given([3, 0, 3, 10, 9, 3, 1], torch.int64)
    return [
        {"input": x, "target": target},
        {
            "input": x, "target": ignored, "weight": draw(11).abs(), "ignore_index": 3, "label_smoothing": 0.1,
            "reduction": "sum",
        },
        {"input": draw(3, 11, 4), "target": draw.index(11, 3, 4), "reduction": "none"},
        {"input": x, "target": target, "inplace_backward": True},
        {"input": x, "target": draw(7, 11).softmax(1)},
    ]  # fmt: skip


@register(
    reference=cross_entropy_ref,
    backends=(
        Backend("cpu", cpu_conditions),
        Backend("triton", triton_conditions, needs_proof=True),
        Backend("torch", always),
        Backend("reference", always),
    ),
    differentiable=("input", "target"),
    draw=_draw,
    choices={"reduction": REDUCTIONS},
    overwriting=("inplace_backward",),
    opaque=True,
)
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace_backward: bool = False,
) -> Tensor:
    """Softmax cross-entropy between logits and targets, as `torch.nn.functional.cross_entropy`.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), float32, float64, bfloat16 or float16.
        target: class indices of any integer dtype, shaped like input without its class dimension; or class
            probabilities, floating-point, shaped like input (these run on PyTorch's own operator).
        weight: (C,) weights of the classes; no gradient reaches them.
        ignore_index: rows with this target have loss and gradient 0, whatever their logits.
        reduction: "none", "mean" (over the summed class weights of the targets that count; NaN where none
            does) or "sum".
        label_smoothing: share of the target spread evenly over the classes, 0 to 1.
        inplace_backward: let the backward pass write the gradient over the logits instead of into a new tensor
            of their size. The logits are then lost: a later use of them in the backward pass raises.

    Returns:
        The loss in input's dtype (float32 under autocast), a scalar or shaped like the class indices. Sums are
        in fp32, in fp64 for float64.

    Raises:
        ValueError: if shapes, devices or options are wrong, or a target is outside [0, C) and not ignored. On a
            GPU, which nothing here waits for, such a row's loss and gradient are NaN instead.
        IndexError: PyTorch's, for any target that counts where there are no classes.
        TypeError: if a dtype is wrong.
        BackendError: if a forced backend cannot serve the call.
    """
    check_options("cross_entropy", reduction, label_smoothing)
    _check(input, target, weight)
    probabilities = target.is_floating_point()
    if not probabilities:
        target = target.long()
    compiling = torch.compiler.is_compiling()
    args = (weight, ignore_index, reduction, label_smoothing)
    C = input.shape[min(1, input.dim() - 1)]
    if must_trace(input, target, weight) and not (compiling and not probabilities and C):
        return _by_torch(input, target, *args)
    if inplace_backward and input.is_leaf and needs_grad(input):
        raise ValueError("cross_entropy: input is a leaf that requires a gradient; inplace_backward would overwrite it")
    if not compiling or probabilities:
        features = (("target", "probabilities"),) if probabilities else ()
        backend = choose("cross_entropy", request_of(input, features, (input.numel() // max(C, 1), C)))
        if backend == "torch" or C == 0:
            return _by_torch(input, target, *args)
        if backend == "reference":
            return cross_entropy_ref(input, target, *args).to(loss_dtype(input))
    x = (input.movedim(1, -1) if input.dim() > 2 else input).reshape(-1, C).contiguous()
    rows = target.reshape(-1).contiguous()
    weight = None if weight is None else weight.detach().contiguous()
    options = Options(ignore_index, reduction, float(label_smoothing), loss_dtype(input))
    if compiling:
        loss, _ = torch.ops.fastlm.cross_entropy(x, rows, weight, *options)
    elif needs_grad(x):
        loss = _CrossEntropy.apply(x, rows, weight, options, backend, inplace_backward)
    else:
        count = KERNELS[backend].cross_entropy_targets(rows, weight, C, ignore_index)
        loss = reduced(
            KERNELS[backend].cross_entropy_fwd(x, rows, weight, ignore_index, label_smoothing)[0], count, options
        )
    return loss.reshape(target.shape) if reduction == "none" else loss


def _by_torch(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
