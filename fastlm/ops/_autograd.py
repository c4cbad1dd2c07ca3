"""The anatomy of an op with kernels: one autograd class in eager mode, and where it is traced whole, one operator.

`by_kernels` decorates the class's backward pass, which then sees to kernels alone; gradients of gradients and batches
of them go through the reference. `operator` registers with torch what torch.compile and FakeTensorMode record, with
its shapes and its gradients; ops that trace to plain torch operators have none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._core.torch_private import is_legacy_batch, transforms_active


def rows_of(x: Tensor, N: int) -> Tensor:
    """x in rows of N elements, (M, N); no row where N is 0, of which `reshape(-1, 0)` could not say how many."""
    return x.reshape(x.numel() // N if N else 0, N)


NONE = (None,) * 16  # gradients of whatever arguments follow: autograd leaves off what is too many


def by_kernels(reference: Callable[..., Tensor | tuple[Tensor, ...]], tensors: int) -> Callable[[Callable], Any]:
    """Decorates the backward pass of an op's autograd class, which may then leave to the reference what kernels cannot.

    The class's forward saves the op's tensors before all else, and as `ctx.options` what the reference takes after
    them.
    Its backward returns the tensors' gradients; those of its other arguments, which are None, are added here.

    Args:
        reference: (*tensors, *options) -> outputs, in plain torch.
        tensors: how many, with those that have no gradient.
    """

    def decorate(backward: Callable[..., tuple[Tensor | None, ...]]) -> Any:
        def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if not (torch.is_grad_enabled() or is_batch(*grads)):  # `by_reference`, one call less
                return backward(ctx, *grads) + NONE
            inputs, needed, options = ctx.saved_tensors[:tensors], ctx.needs_input_grad[:tensors], ctx.options
            return reference_gradients(lambda *given: reference(*given, *options), inputs, needed, grads) + NONE

        return gradients

    return decorate


def operator(
    name: str,
    fake: Callable,
    gradients: Callable[..., tuple[Tensor | None, ...]] | None = None,
    saved: Callable[..., tuple[Tensor | None, ...]] = lambda tensors, outputs, options: (*tensors, *outputs),
) -> Callable[[Callable], Any]:
    """Decorates the function behind torch.ops.fastlm.NAME; its annotated types are the operator's.

    Args:
        fake: the same for tensors without numbers: outputs of the right shape, dtype and layout.
        gradients: (ctx, *output gradients) -> gradients of the first tensors, with `ctx.saved_tensors`, `ctx.options`
            (all arguments after the tensors) and `ctx.needs_input_grad`; an output's gradient may be None. It calls
            another operator, so that it can be recorded. Without it there are no gradients.
        saved: (tensors, outputs, options) -> what `gradients` needs; all of them if not given.
    """

    def register(function: Callable) -> Any:
        op = torch.library.custom_op(f"fastlm::{name}", function, mutates_args=())
        op.register_fake(fake)
        if gradients is None:
            return op
        parameters = inspect.signature(function).parameters.values()
        count = sum(p.annotation in ("Tensor", "Tensor | None") for p in parameters)

        def setup(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.options = inputs[count:]
            outputs = (output,) if isinstance(output, Tensor) else output
            ctx.save_for_backward(*saved(inputs[:count], outputs, ctx.options))
            ctx.set_materialize_grads(False)

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            found = gradients(ctx, *grads)
            return found + (None,) * (len(ctx.needs_input_grad) - len(found))

        op.register_autograd(backward, setup_context=setup)
        return op

    return register


def by_reference(*grads: Tensor | None) -> bool:
    """Whether a backward pass has to be made of plain torch operators, as `reference_gradients` is.

    That is where it is differentiated again (create_graph=True), and where a gradient stands for a batch of them, as
    in `torch.autograd.grad(..., is_grads_batched=True)` and under torch.func.vmap: a kernel finds no memory there.

    Args:
        grads: what the op's outputs received.
    """
    return torch.is_grad_enabled() or is_batch(*grads)


def is_batch(*grads: Tensor | None) -> bool:
    """Whether a gradient stands for a batch of them."""
    if transforms_active():
        return True
    for grad in grads:
        if grad is not None and is_legacy_batch(grad):
            return True
    return False


def reference_gradients(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    grad_outputs: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of `reference(*inputs)` that can be differentiated again and batched by torch.func.vmap.

    An op's backward calls this where `by_reference` holds: kernels are opaque to autograd and vmap, plain torch
    operators are not, so every order of derivative comes out right.

    Args:
        reference: the op in plain torch, as a function of `inputs`.
        inputs: what the op was called with, still attached to the caller's graph.
        needed: which inputs a gradient is wanted for.
        grad_outputs: one a output of the reference; None for an output that received no gradient.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # An alias of each input, so that gradients stop there even where one input depends on another.
        args = [None if x is None else x.view_as(x) if x.is_floating_point() else x for x in inputs]
        outputs = reference(*args)
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        wanted = [a for a, need in zip(args, needed, strict=True) if need and a is not None]
        if not pairs or not wanted:
            return tuple(None for _ in inputs)
        grads = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=again, allow_unused=True
            )
        )
    return tuple(next(grads) if need and a is not None else None for a, need in zip(args, needed, strict=True))


def stored(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A value as it is stored in `dtype`, and as it reads back in its own wider dtype, for a reference.

    The gradients that reach the two are added before they are rounded, as a fused backward does.
    """
    kept = wide.to(dtype)
    if dtype == wide.dtype:
        return kept, kept
    return kept, wide + (kept.detach().to(wide.dtype) - wide.detach())
