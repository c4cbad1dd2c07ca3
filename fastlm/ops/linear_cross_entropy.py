"""Linear projection and softmax cross-entropy in one op that never holds the full logits; see _projection.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.dispatch import Backend, always, autocast_dtype, choose, must_trace, needs_grad, request_of
from .._core.registry import Draw, register
from ..backends import cpu as _native
from ._autograd import by_kernels, operator
from ._projection import Grads, Projection
from .cross_entropy import (
    IGNORE_INDEX,
    KERNELS,
    REDUCTIONS,
    Options,
    Scalar,
    check_class_weight,
    check_options,
    check_target,
    cpu_conditions,
    cross_entropy_grad_ref,
    cross_entropy_ref,
    incoming,
    loss_dtype,
    reduced,
    row_scale,
    triton_conditions,
)


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """The definition over rows of hidden (M, H), with logits in fp32 or wider, in hidden's dtype."""
    wide = _native.compute_dtype(hidden.dtype)
    logits = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    loss = cross_entropy_ref(logits, target, class_weight, ignore_index, reduction, label_smoothing)
    return loss.to(hidden.dtype)


def _loss_ref(hidden, weight, bias, target, class_weight, ignore_index, reduction, label_smoothing, dtype) -> Tensor:
    """The same as the autograd class takes it."""
    options = ignore_index, reduction, label_smoothing
    return linear_cross_entropy_ref(hidden, weight, target, bias, *options, class_weight).to(dtype)


def _scaled(grads: Grads, factor: Tensor) -> Grads:
    """The gradients times the scalar that the loss received, in place."""
    if factor.device.type == "cpu" and factor.item() == 1:
        return grads
    return Grads(*(None if g is None else g.mul_(factor) for g in grads))


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients of a reduced loss are made with it, while its windows are at hand, for an incoming gradient of 1."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, class_weight, options, memory, backend):
        # fp16 has too little range to be scaled afterwards: what a loss scale would have saved is lost already. On
        # a GPU nobody looks whether there is one.
        now = options.reduction != "none" and not (hidden.dtype == torch.float16 and hidden.device.type != "cpu")
        tensors = (hidden, weight, bias, target, class_weight)
        projection = Projection(KERNELS[backend], tensors, options, memory, hold=now and ctx.needs_input_grad[1])
        loss, stats = projection.loss()
        ctx.grads = None
        if now:
            scale = row_scale(1.0, projection.count, options)
            ctx.grads = projection.gradients(stats, scale, ctx.needs_input_grad[:3])
        ctx.save_for_backward(hidden, weight, bias, target, class_weight, stats)
        ctx.options, ctx.memory, ctx.backend = options, memory, backend
        return reduced(loss, projection.count, options)

    @staticmethod
    @by_kernels(_loss_ref, tensors=5)
    def backward(ctx, grad):
        *tensors, stats = ctx.saved_tensors
        hidden, options = tensors[0], ctx.options
        grads, ctx.grads = ctx.grads, None  # handed out once, since they are scaled in place
        if grads is not None and (hidden.dtype != torch.float16 or grad.item() == 1):
            return tuple(_scaled(grads, grad))
        del grads
        projection = Projection(KERNELS[ctx.backend], tuple(tensors), options, ctx.memory)
        scale = _scale(grad, stats, projection.count, options)
        return tuple(projection.gradients(stats, scale, ctx.needs_input_grad[:3]))


def _scale(grad: Tensor, stats: Tensor, count: Scalar, options: Options) -> Scalar:
    if options.reduction == "none":
        return grad.to(stats.dtype).contiguous()
    return row_scale(incoming(grad, count), count, options)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


def _or_empty(grads: Grads, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = (like.new_empty(0) if g is None else g for g in grads)
    return hidden, weight, bias


def _op_fake(hidden, weight, bias, target, class_weight, ignore_index, reduction, smoothing, dtype, memory, wanted):
    each = reduction == "none"
    loss = hidden.new_empty(hidden.shape[:1] if each else (), dtype=dtype)
    stats = hidden.new_empty(hidden.shape[0], 3, dtype=_native.compute_dtype(hidden.dtype))
    inputs = (hidden, weight, bias)
    made = Grads(
        *(
            t.new_empty(t.shape) if want and t is not None and not each else None
            for t, want in zip(inputs, wanted, strict=True)
        )
    )
    return loss, stats, *_or_empty(made, hidden)


def _op_saved(tensors, outputs, options):
    """For a reduced loss the gradients that were made with it."""
    _, stats, *grads = outputs
    return (*tensors, stats) if options[1] == "none" else grads


def _op_gradients(ctx, grad, *_):
    ignore_index, reduction, label_smoothing, _, memory, wanted = ctx.options
    if reduction == "none":
        grads = torch.ops.fastlm.linear_cross_entropy_backward(
            grad, *ctx.saved_tensors, ignore_index, label_smoothing, memory, wanted
        )
    else:
        grads = tuple(g * grad.to(g.dtype) for g in ctx.saved_tensors)
    return tuple(g if w else None for g, w in zip(grads, wanted, strict=True))


def _extents(hidden: Tensor, weight: Tensor) -> tuple[int, ...]:
    """(N, K, V): how large a call is."""
    return (*hidden.shape, weight.shape[0])


@operator("linear_cross_entropy", _op_fake, _op_gradients, _op_saved)
def _linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype,
    memory: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> (loss, stats, and for a reduced loss the gradients of hidden, weight and bias that are wanted, else empty)."""
    options = Options(ignore_index, reduction, label_smoothing, dtype)
    backend = choose("linear_cross_entropy", request_of(hidden, (), _extents(hidden, weight), True))
    if backend not in KERNELS:
        return _op_by_reference(hidden, weight, bias, target, class_weight, options, wanted)
    tensors = _contiguous(hidden, weight, bias, target, class_weight)
    now = reduction != "none"
    projection = Projection(KERNELS[backend], tensors, options, memory, hold=now and wanted[1])
    loss, stats = projection.loss()
    grads = Grads()
    if now:
        grads = projection.gradients(stats, row_scale(1.0, projection.count, options), tuple(wanted))
    return reduced(loss, projection.count, options).clone(), stats, *_or_empty(grads, hidden)


def _grads_by_reference(hidden, weight, bias, target, class_weight, options: Options, grad, wanted) -> Grads:
    """In fp32 or wider and without autograd, which does not record inside a registered op."""
    h, w = (t.to(_native.compute_dtype(hidden.dtype)) for t in (hidden, weight))
    logits = F.linear(h, w, None if bias is None else bias.to(h.dtype))
    d = cross_entropy_grad_ref(logits, target, class_weight, *options[:3], grad)
    made = (d @ w if wanted[0] else None, d.t() @ h if wanted[1] else None, d.sum(0) if wanted[2] else None)
    return Grads(*(None if g is None else g.to(hidden.dtype) for g in made))


def _op_by_reference(hidden, weight, bias, target, class_weight, options: Options, wanted):
    loss = linear_cross_entropy_ref(
        hidden, weight, target, bias, options.ignore_index, options.reduction, options.label_smoothing, class_weight
    )
    grads = Grads()
    if options.reduction != "none":
        one = hidden.new_ones((), dtype=torch.float32)
        grads = _grads_by_reference(hidden, weight, bias, target, class_weight, options, one, wanted)
    stats = hidden.new_zeros(hidden.shape[0], 3, dtype=_native.compute_dtype(hidden.dtype))
    return loss.to(options.dtype, copy=True), stats, *_or_empty(grads, hidden)


def _backward_fake(grad, hidden, weight, bias, *given):
    inputs = (hidden, weight, bias)
    made = (t.new_empty(t.shape) if w and t is not None else None for t, w in zip(inputs, given[-1], strict=True))
    return _or_empty(Grads(*made), hidden)


@operator("linear_cross_entropy_backward", _backward_fake)
def _linear_cross_entropy_backward_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    label_smoothing: float,
    memory: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for reduction "none"; empty where one is not wanted."""
    options = Options(ignore_index, "none", label_smoothing, grad.dtype)
    backend = choose("linear_cross_entropy", request_of(hidden, (), _extents(hidden, weight), True))
    if backend in KERNELS:
        tensors = _contiguous(hidden, weight, bias, target, class_weight)
        projection = Projection(KERNELS[backend], tensors, options, memory)
        return _or_empty(projection.gradients(stats, grad.to(stats.dtype).contiguous(), wanted), hidden)
    grads = _grads_by_reference(hidden, weight, bias, target, class_weight, options, grad, wanted)
    return _or_empty(grads, hidden)


def _check_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "linear_cross_entropy"
    if hidden.dim() == 0:
        raise ValueError(f"{op}: hidden has no dimensions, expected (..., H)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected (C, {hidden.shape[-1]}) to match hidden"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},) to match weight")
    for name, given in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if given is None:
            continue
        if not given.is_floating_point():
            raise TypeError(f"{op}: {name} has dtype {given.dtype}, expected a floating-point dtype")
        if given.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {given.device}, hidden is on {hidden.device}")
        if given.dtype != hidden.dtype and autocast_dtype(hidden.device.type) is None:
            raise TypeError(f"{op}: {name} has dtype {given.dtype}, expected {hidden.dtype} to match hidden")


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """To autocast's dtype where it is on, as the projection's own cast would be; float64 stays."""
    dtype = autocast_dtype(hidden.device.type)
    if dtype is None or hidden.dtype == torch.float64:
        return hidden, weight, bias
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _draw(draw: Draw) -> list[dict[str, Any]]:
    tensors = {"hidden": draw(7, 16), "weight": draw(11, 16), "target": draw.index(11, 7)}
    ignored = draw.given([3, 0, 3, 10, 9, 3, 1], torch.int64)
    more = {"bias": draw(11), "target": ignored, "ignore_index": 3, "label_smoothing": 0.1}
    return [
        tensors,
        tensors | more | {"class_weight": draw(11).abs(), "reduction": "sum", "memory": 0.5},
        tensors | {"reduction": "none"},
        tensors | {"target": draw(7, 11).softmax(1)},
    ]


@register(
    reference=linear_cross_entropy_ref,
    backends=(
        Backend("cpu", cpu_conditions),
        Backend("triton", triton_conditions, needs_proof=True),
        Backend("torch", always),
        Backend("reference", always),
    ),
    differentiable=("hidden", "weight", "bias", "target"),
    draw=_draw,
    choices={"reduction": REDUCTIONS},
    note="never holds the logits",
    opaque=True,
)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    *,
    memory: float = 0.1,
) -> Tensor:
    """cross_entropy(linear(hidden, weight, bias), target, class_weight, ...) that never holds the full logits.

    Args:
        hidden: (..., H), float32, float64, bfloat16 or float16; cast to autocast's dtype where that is on.
        weight: (C, H), the projection, in hidden's dtype.
        target: (...) class indices of any integer dtype; or class probabilities (..., C), floating-point,
            which run on PyTorch's own operators, with the full logits.
        bias: (C,), in hidden's dtype, or None.
        ignore_index, reduction, label_smoothing: as for `cross_entropy`. Ignored rows are left out of the
            products where they are more than a tenth.
        class_weight: (C,) weights of the classes; no gradient reaches them.
        memory: share of the full logits that may be held at once beside the gradients, above 0; no less than 2048
            classes are held. The products cost up to 4 instead of 3 of full size; 1 holds everything once.

    Returns:
        The loss in hidden's dtype (float32 under autocast), a scalar or shaped like the class indices.
        The gradients of a reduced loss are computed with it and kept until the backward pass.

    Raises:
        ValueError: if shapes, devices or options are wrong, or a target is outside [0, C) and not ignored.
        IndexError: PyTorch's, for any target that counts where there are no classes.
        TypeError: if a dtype is wrong.
        BackendError: if a forced backend cannot serve the call.
    """
    op = "linear_cross_entropy"
    check_options(op, reduction, label_smoothing)
    if not memory > 0:
        raise ValueError(f"{op}: memory is {memory}, expected a share above 0")
    _check_projection(hidden, weight, bias)
    C = weight.shape[0]
    check_target(op, target, hidden, (*hidden.shape[:-1], C), hidden.shape[:-1])
    check_class_weight(op, "class_weight", class_weight, hidden, C)
    dtype = loss_dtype(hidden)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    probabilities = target.is_floating_point()
    compiling = torch.compiler.is_compiling()
    rows = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
    flat = target.reshape(rows.shape[0], C) if probabilities else target.reshape(-1).long()
    options = Options(ignore_index, reduction, float(label_smoothing), dtype)
    if must_trace(hidden, weight, target, bias, class_weight) and not (compiling and not probabilities and C):
        loss = _by_torch(rows, weight, flat, bias, class_weight, options)
    elif compiling:
        loss = _by_op(rows, weight, flat, bias, class_weight, options, memory)
    else:
        loss = _eager(rows, weight, flat, bias, class_weight, options, memory)
    return loss.reshape(hidden.shape[:-1]) if reduction == "none" else loss


def _by_torch(hidden, weight, target, bias, class_weight, options: Options) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits, target, class_weight, None, options.ignore_index, None, *options[1:3])


def _by_op(hidden, weight, target, bias, class_weight, options: Options, memory: float) -> Tensor:
    wanted = [needs_grad(t) for t in (hidden, weight, bias)]
    return torch.ops.fastlm.linear_cross_entropy(hidden, weight, bias, target, class_weight, *options, memory, wanted)[
        0
    ]


def _eager(hidden, weight, target, bias, class_weight, options: Options, memory: float) -> Tensor:
    features = (("target", "probabilities"),) if target.is_floating_point() else ()
    backend = choose("linear_cross_entropy", request_of(hidden, features, _extents(hidden, weight)))
    if backend == "torch" or weight.shape[0] == 0:
        return _by_torch(hidden, weight, target, bias, class_weight, options)
    if backend == "reference":
        return linear_cross_entropy_ref(
            hidden, weight, target, bias, options.ignore_index, options.reduction, options.label_smoothing, class_weight
        ).to(options.dtype)
    tensors = _contiguous(hidden, weight, bias, target, class_weight)
    if needs_grad(hidden, weight, bias):
        return _LinearCrossEntropy.apply(*tensors, options, memory, backend)
    projection = Projection(KERNELS[backend], tensors, options, memory)
    return reduced(projection.loss()[0], projection.count, options)
