"""bf16 copies of fp32 weights, so that training under autocast to bfloat16 on a CPU need not cast them at each step."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.dispatch import must_trace, needs_grad
from .._core.torch_private import version_of


class Copy:
    """A parameter rounded to bf16, and the version of the parameter that it was made of."""

    def __init__(self, parameter: Tensor):
        self.tensor = parameter.detach().to(torch.bfloat16)
        self.version = version_of(parameter)


def attach_copy(parameter: Tensor) -> None:
    """Let an fp32 CPU parameter carry its values in bf16; `fastlm.training.AdamW` refreshes them."""
    parameter.fastlm_copy = Copy(parameter)  # type: ignore[attr-defined]


def copy_of(parameter: Tensor) -> Tensor | None:
    """The copy that a parameter carries, if it still fits it; its values may be old."""
    copy = getattr(parameter, "fastlm_copy", None)
    if copy is None or copy.tensor.shape != parameter.shape or copy.tensor.device != parameter.device:
        return None
    return copy.tensor


def rounded(parameter: Tensor) -> Tensor:
    """A parameter in bf16, without gradient: its copy where that is up to date, else newly made."""
    tensor = copy_of(parameter)
    if tensor is not None and parameter.fastlm_copy.version == version_of(parameter):  # type: ignore[attr-defined]
        return tensor
    return parameter.detach().to(torch.bfloat16)


def serves(*tensors: Tensor | None) -> bool:
    """Whether a call under autocast is training in bfloat16 on a CPU, which the functions here are for."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and needs_grad(*tensors)
        and not must_trace(*tensors)
        and all(t is None or t.device.type == "cpu" for t in tensors)
    )


def prepare_weights(weights: list[Tensor], accumulate: bool) -> None:
    """Give fp32 CPU weights bf16 copies, for training under autocast to bfloat16 with `fastlm.training.AdamW`.

    Args:
        accumulate: whether a step adds up several gradients; they are then kept in fp32. A single one stays in the
            bf16 in which the matmul made it.
    """
    for weight in weights:
        attach_copy(weight)
        if not accumulate:
            weight.grad_dtype = torch.bfloat16
