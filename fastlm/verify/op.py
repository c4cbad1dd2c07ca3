"""What the checks know of an op: how to draw a random call, and what it should give."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The values are Tensor or None; which of them cannot be None is known to each op alone.
Tensors = dict[str, Any]

FLOATS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Rounding(NamedTuple):
    """What rounding may do to one output or gradient; see `tolerance.rounding`.

    Attributes:
        stored: largest magnitude on the way to it that is rounded to the storage dtype.
        summed: largest magnitude on the way to it that is rounded to the dtype of the computation.
        size: number of terms in the longest sum behind one element.
    """

    stored: float = 0.0
    summed: float = 0.0
    size: int = 1


@dataclass
class Sample:
    """One random call of an op.

    Attributes:
        settings: scalar arguments, and the shapes, as they are shown.
        tensors: contiguous values by name; None for an argument left out.
        differentiable: names of the tensors to take gradients of.
        seed: given to torch.manual_seed before each call, for dropout.
        exact: small integers, for which every backend has to give the reference's very bits.
        rows: names of the tensors that share a leading batch dimension.
    """

    dtype: torch.dtype
    settings: dict[str, Any]
    tensors: Tensors
    differentiable: tuple[str, ...]
    seed: int
    exact: bool = False
    rows: tuple[str, ...] = ()

    def describe(self) -> str:
        shapes = " ".join(
            f"{name}={'x'.join(map(str, t.shape)) or 'scalar'}" for name, t in self.tensors.items() if t is not None
        )
        options = " ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{str(self.dtype)[6:]} {shapes} {options}{' exact' if self.exact else ''}".strip()


@dataclass(frozen=True)
class Spec:
    """An op under test.

    Attributes:
        name: the op's name, as the dispatch table has it.
        draw: (generator, dtype, exact) -> a random call.
        call: the public function on a sample's tensors, as a tuple of outputs.
        stock: the same in PyTorch's operators; on fp64 tensors it is the truth. Empty where PyTorch has
            nothing to compare with.
        truth: the reference on fp64 tensors, where that is not `stock`.
        rounding: (sample, fp64 tensors, fp64 output gradients) -> output or gradient name -> Rounding;
            what is left out has the largest magnitude of the truth and sums of one term.
        invariant: whether a row's bits are promised for any batch and thread count; not where a library's
            matrix product is a part of the op.
    """

    name: str
    draw: Callable[[random.Random, torch.dtype, bool], Sample]
    call: Callable[[Tensors, Sample], tuple[Tensor, ...]]
    stock: Callable[[Tensors, Sample], tuple[Tensor, ...]]
    truth: Callable[[Tensors, Sample], tuple[Tensor, ...]] | None = None
    rounding: Callable[[Sample, Tensors, tuple[Tensor, ...]], dict[str, Rounding]] = field(
        default=lambda sample, tensors, grads: {}
    )
    invariant: bool = True


def size(generator: random.Random, largest: int) -> int:
    """A random extent: often 1, a power of two or one beside it, where kernels change their ways."""
    if generator.random() < 0.5:
        power = 2 ** generator.randint(0, largest.bit_length())
        return max(1, min(largest, power + generator.choice((-1, 0, 1))))
    return generator.randint(1, largest)


def normal(generator: random.Random, *shape: int) -> Tensor:
    """Standard normal fp64 values from the sample's own generator."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(generator.getrandbits(62)))


def integers(generator: random.Random, low: int, high: int, *shape: int) -> Tensor:
    """Integers from low to high, both included, in int64."""
    seeded = torch.Generator().manual_seed(generator.getrandbits(62))
    return torch.randint(low, high + 1, shape, generator=seeded)


def largest(tensor: Tensor | None) -> float:
    return float(tensor.detach().abs().max()) if tensor is not None and tensor.numel() else 0.0
