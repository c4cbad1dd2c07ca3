"""Buffers with margins of NaN: a write outside of a tensor changes a margin, a read from one brings a NaN in.

Inputs are carved out of larger buffers, with gaps between their elements too where their strides leave any.
Outputs are guarded by `guarded_allocations`: while it is active, every tensor that Python code allocates lies
between two margins, and starts as NaN where torch promises nothing about its contents.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

MARGIN = 4096  # bytes on either side: a row of most test shapes, and a multiple of every vector's alignment
PATTERN = -7_777_777  # what fills integers, which have no NaN

UNWRITTEN = ("empty", "empty_like", "empty_strided")
WRITTEN = ("zeros", "zeros_like", "ones", "ones_like", "full", "full_like")
METHODS = ("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full")
_EMPTY = torch.empty  # still the original while torch.empty is exchanged


def _poison(buffer: Tensor) -> Tensor:
    if buffer.is_floating_point():
        return buffer.fill_(float("nan"))
    return buffer.fill_(True if buffer.dtype == torch.bool else PATTERN % (torch.iinfo(buffer.dtype).max + 1))


def to_bytes(tensor: Tensor) -> Tensor:
    """The elements' bytes in order, so that NaNs compare equal to themselves and 0 differs from -0."""
    flat = _EMPTY(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return flat.copy_(tensor.detach().flatten()).view(torch.uint8)


def carve(values: Tensor, generator: random.Random | None = None) -> tuple[Tensor, Tensor]:
    """A tensor equal to `values` inside a larger poisoned buffer, and that buffer.

    Args:
        values: any shape.
        generator: draws an order of dimensions in memory, a step between elements and an odd offset;
            None keeps the tensor contiguous and aligned.
    """
    margin = MARGIN // values.element_size()
    order, step = list(range(values.dim())), 1
    if generator is not None:
        if generator.random() < 0.4:
            generator.shuffle(order)
        step = generator.choice((1, 1, 2, 3))
        margin += generator.choice((0, 0, 1, 3))
    strides, extent = [0] * values.dim(), step
    for dim in reversed(order):
        strides[dim] = extent
        extent *= max(values.shape[dim], 1)
    buffer = _poison(torch.empty(extent + 2 * margin, dtype=values.dtype, device=values.device))
    tensor = torch.empty(0, dtype=values.dtype, device=values.device)
    # Not a view of the buffer, which autograd would follow, but a tensor of its own on the same memory.
    tensor.set_(buffer.untyped_storage(), margin, values.shape, strides)
    tensor.copy_(values)
    return tensor, buffer


@dataclass
class Guards:
    """Buffers under watch: `inputs` must not change at all, `outputs` not outside of their tensors."""

    inputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    outputs: list[tuple[str, Tensor, int, int]] = field(default_factory=list)

    def place(self, name: str, values: Tensor, generator: random.Random | None) -> Tensor:
        """Carve an input and remember its buffer."""
        tensor, buffer = carve(values, generator)
        self.inputs[name] = buffer, buffer.clone()
        return tensor

    def allocate(self, name: str, result: Tensor, written: bool) -> Tensor:
        """The stand-in of a fresh tensor: of its shape, strides and contents, between two margins."""
        extent = 1 + sum((n - 1) * s for n, s in zip(result.shape, result.stride(), strict=True))
        margin = MARGIN // result.element_size()
        extent = extent if result.numel() else 0
        buffer = _poison(_EMPTY(extent + 2 * margin, dtype=result.dtype, device=result.device))
        tensor = _EMPTY(0, dtype=result.dtype, device=result.device)
        tensor.set_(buffer.untyped_storage(), margin, result.shape, result.stride())
        if written:
            tensor.copy_(result)
        self.outputs.append((name, buffer, margin, margin + extent))
        return tensor.requires_grad_(result.requires_grad)

    def violations(self) -> list[str]:
        """What was overwritten, in words."""
        found = [
            f"{name} or the memory around it was written to"
            for name, (buffer, before) in self.inputs.items()
            if not torch.equal(to_bytes(buffer), to_bytes(before))
        ]
        for name, buffer, start, stop in self.outputs:
            fresh = _poison(torch.empty_like(buffer))
            for side, part in (("before", slice(0, start)), ("after", slice(stop, None))):
                if not torch.equal(to_bytes(buffer[part]), to_bytes(fresh[part])):
                    found.append(f"the memory {side} a tensor from {name} was written to")
        return found


@contextlib.contextmanager
def guarded_allocations(guards: Guards) -> Iterator[None]:
    """Guard every strided tensor that Python code allocates inside, in forward and backward passes alike.

    A torch-function mode would be the tidier way, but autograd leaves it when it calls a backward written
    in Python. So the names are exchanged, and put back afterwards.
    """

    def guarded(name: str, allocate: Callable[..., Tensor], written: bool) -> Callable[..., Tensor]:
        def replacement(*args, **kwargs):
            result = allocate(*args, **kwargs)
            if kwargs.get("out") is not None or result.layout != torch.strided or type(result) is not Tensor:
                return result
            return guards.allocate(name, result, written)

        return replacement

    functions = {name: getattr(torch, name) for name in UNWRITTEN + WRITTEN}
    try:
        for name, function in functions.items():
            setattr(torch, name, guarded(name, function, name in WRITTEN))
        for name in METHODS:  # inherited by Tensor from a C type, so taking the attribute away undoes it
            method = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, guarded(name, method, not name.startswith("new_empty")))
        yield
    finally:
        for name, function in functions.items():
            setattr(torch, name, function)
        for name in METHODS:
            if name in vars(torch.Tensor):
                delattr(torch.Tensor, name)
