"""What the ops' autograd classes share: gradients of gradients, and batches of gradients, through the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._core.torch_private import is_legacy_batch, transforms_active


def rows_of(x: Tensor, N: int) -> Tensor:
    """x in rows of N elements, (M, N); no row where N is 0, of which `reshape(-1, 0)` could not say how many."""
    return x.reshape(x.numel() // N if N else 0, N)


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
