"""What the models ask of the tensors they are given; each message names model, argument, got and wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_tokens(
    model: str, tokens: Tensor, config: Any, start: int = 0, name: str = "tokens", vocab_size: int | None = None
) -> None:
    """Raise ValueError unless `tokens` are (B, T) ids of the vocabulary that fit the context after `start`."""
    if tokens.dim() != 2:
        raise ValueError(f"{model}: {name} has shape {tuple(tokens.shape)}, expected (batch, length)")
    if start + tokens.shape[1] > config.context_length:
        before = f" after {start} cached" if start else ""
        raise ValueError(
            f"{model}: {name} of length {tokens.shape[1]}{before} does not fit the context of {config.context_length}"
        )
    check_ids(model, name, tokens, config.vocab_size if vocab_size is None else vocab_size)


def check_ids(model: str, name: str, ids: Tensor, count: int, ignored: int | None = None) -> None:
    """Raise ValueError unless `ids` are int64 in [0, count), or `ignored`."""
    if ids.dtype != torch.int64:
        raise ValueError(f"{model}: {name} has dtype {ids.dtype}, expected torch.int64")
    # Elsewhere the look would wait for the device, or break the compiled graph.
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    looked_at = ids if ignored is None else ids.masked_fill(ids == ignored, 0)
    low, high = (int(bound) for bound in looked_at.aminmax())
    if low < 0 or high >= count:
        outside = low if low < 0 else high
        raise ValueError(f"{model}: {name} holds the id {outside}, expected ids from 0 to {count - 1}")


def check_same_shape(model: str, name: str, tensor: Tensor, other: str, wanted: Tensor) -> None:
    """Raise ValueError unless `tensor` is shaped like `wanted`."""
    if tensor.shape != wanted.shape:
        raise ValueError(
            f"{model}: {name} has shape {tuple(tensor.shape)}, expected {tuple(wanted.shape)} as {other} has"
        )
