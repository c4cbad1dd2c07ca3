"""One specification for each op, said where the op is: whatever goes over all ops reads it here.

`fastlm verify`, `bench` and `doctor`, ahead-of-time compilation, the tests of gradients, of tensors without numbers and
of the GPU, and the README's table keep no list of ops. What else an op has lies under the name of its file (its stem):
verify/STEM.py has its random calls, benchmarks/STEM.py its cases, and tools/aot.py its kernels' launches.
tests/ops/test_specs.py says what an op lacks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import dispatch
from .dispatch import Backend

F = TypeVar("F", bound=Callable)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Draw:
    """Small tensors for an op's samples: on a device (meta too) and in a dtype, the same numbers each time."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self._generator, device="cpu").to(self.device, self.dtype)

    def index(self, size: int, *shape: int) -> Tensor:
        """Indices from 0 to size - 1, in int64."""
        return torch.randint(size, shape, generator=self._generator, device="cpu").to(self.device)

    def given(self, values: Any, dtype: torch.dtype) -> Tensor:
        """These values, in a dtype of their own."""
        return torch.tensor(values, dtype=dtype, device="cpu").to(self.device)


@dataclass(frozen=True)
class Op:
    """What is known of an op.

    Attributes:
        function: the public function, whose signature names tensors (annotated as such) and options.
        reference: the definition in plain PyTorch, which the backend of that name runs.
        backends: in order of preference.
        differentiable: the tensors that gradients reach.
        draw: draws the samples: small calls by argument name, which together use every argument in every way.
        choices: option -> all its values, for options that are one of a few words.
        overwriting: options under which the backward pass overwrites its inputs, so that it runs once.
        opaque: whether torch.compile records it as one operator, which chooses a backend when it runs; else it traces
            plain torch operators.
        note: for the README's table, what name and options do not say.
        dtypes: of the tensors that are differentiable.
    """

    name: str
    function: Callable
    reference: Callable
    backends: tuple[Backend, ...]
    differentiable: tuple[str, ...]
    draw: Callable[[Draw], list[dict[str, Any]]]
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    overwriting: tuple[str, ...] = ()
    opaque: bool = False
    note: str = ""
    dtypes: tuple[torch.dtype, ...] = FLOATS

    @property
    def stem(self) -> str:
        """The name of the op's file, here and wherever else it has one."""
        return self.function.__module__.rpartition(".")[2]

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(n for n, p in self.parameters.items() if p.annotation in ("Tensor", "Tensor | None"))

    @property
    def options(self) -> tuple[str, ...]:
        """Arguments that may be left out, but for tensors."""
        return tuple(n for n, p in self.parameters.items() if p.default is not p.empty and n not in self.tensors)

    def samples(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        """Arguments by name of the op's small calls, with tensors on `device` and in `dtype`."""
        return self.draw(Draw(device, dtype))

    def split(self, sample: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(the sample's tensors that gradients reach, its other arguments), by name."""
        leaves = {n: sample[n] for n in self.differentiable if n in sample and sample[n].is_floating_point()}
        return leaves, {n: value for n, value in sample.items() if n not in leaves}

    def backend(self, name: str) -> Backend | None:
        return next((row for row in self.backends if row.name == name), None)


_OPS: dict[str, Op] = {}


def register(
    *,
    reference: Callable,
    backends: tuple[Backend, ...],
    differentiable: tuple[str, ...],
    draw: Callable[[Draw], list[dict[str, Any]]],
    **more: Any,
) -> Callable[[F], F]:
    """Decorates an op's public function, which stays as it is, with the rest of its `Op`, which says what is what."""

    def enter(function: F) -> F:
        op = Op(function.__name__, function, reference, backends, differentiable, draw, **more)
        _OPS[op.name] = op
        dispatch.register(op.name, *backends, opaque=op.opaque)
        return function

    return enter


def ops() -> list[Op]:
    """All ops, by file, and within a file in its order."""
    return sorted(_OPS.values(), key=lambda op: op.stem)


def get(name: str) -> Op:
    return _OPS[name]


def stems() -> list[str]:
    return list(dict.fromkeys(op.stem for op in ops()))


def found(package: str, kind: type) -> Iterator[Any]:
    """What of a kind the files of a package with the ops' names define, in the order of the ops."""
    for stem in stems():
        name = f"{package}.{stem}"
        if importlib.util.find_spec(name) is not None:
            yield from _defined(importlib.import_module(name), kind)


def _defined(module: ModuleType, kind: type) -> list[Any]:
    """The module's own constants of a kind, in its order."""
    return [value for name, value in vars(module).items() if name.isupper() and isinstance(value, kind)]
