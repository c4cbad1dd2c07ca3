"""Models without weights, and how they get those of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError

DRAWS = {Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_}
LAYERS = ("n_layer", "n_encoder_layer", "n_decoder_layer")


def blank(kind: type[nn.Module], config: Any, count: int, source: Path | str) -> nn.Module:
    """A model on the meta device, for a file of `count` tensors.

    Raises:
        CheckpointError: for more layers than there are tensors, before any is made, and for sizes beyond 64 bits.
    """
    for name in LAYERS:
        layers = getattr(config, name, 0)
        if layers > count:
            raise CheckpointError(f"{source}: {name} is {layers}, but there are only {count} tensors")
    try:
        with torch.device("meta"), _Undrawn():
            return kind(config)
    except RuntimeError as error:  # torch's, of a product of sizes
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{source}: its sizes are too large: {reason}") from error


class _Undrawn(TorchFunctionMode):
    """Leaves out the first values, for which PyTorch takes 1.4 ms a tensor on meta too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs.get("tensor", args[0] if args else None) if func in DRAWS else func(*args, **kwargs)


def fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a model on the meta device its tensors, as they are."""
    model.load_state_dict(state, assign=True)


def share(model: nn.Module, owners: dict[str, str]) -> None:
    """Make each parameter that `owners` names the one that it stands beside there."""
    for name, owner in owners.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(owner))


def non_finite(tensor: Tensor) -> str:
    """How many NaN and infinities there are in a tensor; nothing if there are none."""
    if not tensor.is_floating_point():
        return ""
    nans = infinities = 0
    for piece in tensor.detach().reshape(-1).split(2**20):  # the temporaries are as large as the piece
        if not piece.isfinite().all():
            nans += int(piece.isnan().sum())
            infinities += int(piece.isinf().sum())
    found = [f"{count} {name}" for count, name in ((nans, "NaN"), (infinities, "infinities")) if count]
    return " and ".join(found)
