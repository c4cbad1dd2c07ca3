"""What may be saved: a model whose tensors a fresh one of its configuration would take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.common.config import LARGEST
from .filling import blank
from .hf.files import listed


def state_to_save(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of one of fastlm's models, no two in the same memory, if `load` could read them again.

    Raises:
        CheckpointError: for tensors that the configuration does not call for or that are not there, as pruning,
            parametrizations, adapters, quantization and sharding leave them, by name.
    """
    kind = type(model).__name__
    config: Any = model.config
    try:
        config = type(config).from_dict(config.to_dict())
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{kind}: its configuration could not be loaded again: {error}") from error
    state = model.state_dict()
    if any(name.endswith(".qweight") for name in state):
        raise CheckpointError(
            f"{kind}: it is quantized; save it with format='fastlm', or fastlm.inference.save_quantized"
        )
    if problems := misfits(state, blank(type(model), config, LARGEST, kind).state_dict()):
        raise CheckpointError(
            f"{kind}: load could not read its tensors again: {problems}; undo pruning, parametrizations, adapters "
            "and sharding first"
        )
    return _apart(state)


def misfits(state: dict[str, Any], wanted: dict[str, Tensor], in_file: bool = False) -> str:
    """What is wrong with a state dict for a model that has `wanted`; nothing if it fits.

    Args:
        in_file: the tensors stand for those of a file and are on meta.
    """
    problems = [
        f"{kind} {listed(sorted(names))}"
        for kind, names in (("missing", wanted.keys() - state.keys()), ("unexpected", state.keys() - wanted.keys()))
        if names
    ]
    odd = [
        f"{name} {problem}"
        for name in sorted(wanted.keys() & state.keys())
        if (problem := _oddity(state[name], wanted[name], in_file))
    ]
    return "; ".join(problems + ([listed(odd)] if odd else []))


def _oddity(tensor: Any, wanted: Tensor, in_file: bool) -> str:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}"
    if tensor.is_meta and not in_file:
        return "is on meta, without values"
    if tensor.layout != torch.strided:
        return f"has the layout {tensor.layout}"
    if tensor.shape != wanted.shape:
        return f"has shape {tuple(tensor.shape)} instead of {tuple(wanted.shape)}"
    if wanted.is_floating_point() and not tensor.is_floating_point():
        return f"is {tensor.dtype}, expected a floating-point dtype"
    return "" if wanted.is_floating_point() or tensor.dtype == wanted.dtype else f"is {tensor.dtype}"


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of each tensor that lies in the memory of an earlier one, since a file has them one after the other."""
    seen: set[tuple[torch.device, int]] = set()
    apart = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart
