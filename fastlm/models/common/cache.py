"""Keys and values of the tokens already read, so that each new token costs one position, not all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """Which of S tokens each of the last T sees: those before it and itself, (T, S) bool."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class KVCache:
    """Preallocated keys and values, one (B, H, max_length, D) buffer each per layer.

    The model calls `append` once a layer and `advance` once a step. Handed views stay valid until `clear`;
    nothing is ever copied or grown.

    Args:
        config: sizes of the model.
        batch_size: rows, B.
        dtype: that of the keys and values: the parameters' dtype, or autocast's.
        device: where the model is.
        max_length: positions to hold; None means the model's context length.

    Raises:
        ValueError: for a batch size or a length below 1, or a length above the context.
    """

    def __init__(
        self,
        config: Any,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
    ):
        max_length = config.context_length if max_length is None else max_length
        if batch_size < 1:
            raise ValueError(f"KVCache: batch_size is {batch_size}, expected at least 1")
        if not 1 <= max_length <= config.context_length:
            raise ValueError(
                f"KVCache: max_length is {max_length}, expected 1 to the context of {config.context_length}"
            )
        heads = getattr(config, "n_kv_head", config.n_head)  # grouped queries share keys and values
        shape = (config.n_layer, batch_size, heads, max_length, config.head_size)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.max_length = max_length
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k` and `v` (B, H, T, D) behind those of `layer`; return all of its keys and values.

        Raises:
            ValueError: if the batch differs from the cache's, or the cache has no room.
        """
        batch_size, T = self.keys.shape[1], k.shape[2]
        if len(k) != batch_size:
            raise ValueError(f"KVCache: got a batch of {len(k)}, expected {batch_size}")
        end = self.length + T
        if end > self.max_length:
            raise ValueError(f"KVCache: {self.length} + {T} tokens exceed its max_length of {self.max_length}")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def mask(self, T: int) -> Tensor | None:
        """Which positions each of the next `T` tokens sees, (T, length + T); None where that is all."""
        if T == 1:
            return None
        return causal_mask(T, self.length + T, self.keys.device)

    def advance(self, T: int) -> None:
        """Count `T` tokens, appended to every layer, as read."""
        self.length += T

    def clear(self) -> None:
        self.length = 0
