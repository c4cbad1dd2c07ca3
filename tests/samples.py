"""Every op's samples (fastlm/_core/registry.py), as cases that tests go over."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlm  # noqa: F401  (enters the ops)
from fastlm._core import registry


class Case(NamedTuple):
    """A sample of an op by its number."""

    op: registry.Op
    number: int

    def arguments(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        return self.op.samples(device, dtype)[self.number]

    def leaves(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict]:
        """(tensors that gradients are taken of, other arguments)."""
        found, others = self.op.split(self.arguments(device, dtype))
        return {name: t.detach().clone().requires_grad_() for name, t in found.items()}, others

    def run(self, leaves: dict[str, Tensor], others: dict) -> list[Tensor]:
        """The outputs of a call on the leaves' values, which an op may overwrite."""
        outputs = self.op.function(**{name: t.view_as(t) for name, t in leaves.items()}, **others)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    @property
    def keeps_inputs(self) -> bool:
        """Whether the backward pass can run more than once."""
        return not any(name in self.arguments("meta") for name in self.op.overwriting)


CASES = {
    f"{op.name} {number}" if number else op.name: Case(op, number)
    for op in registry.ops()
    for number in range(len(op.samples("meta")))
}
