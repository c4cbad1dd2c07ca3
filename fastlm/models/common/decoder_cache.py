"""A decoder's cache: its own keys and values, which beams swap, and the source's, which they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import KVCache

if TYPE_CHECKING:
    from ..seq2seq import Memory, Seq2Seq


class DecoderCache(KVCache):
    """Keys and values of the target tokens so far, (R, H, T, D) a layer, and of the source, (B, H, S, D).

    Those of the source are computed by each layer in its first step.

    Args:
        model: whose decoder it serves.
        memory: what the encoder left.
        beams: target rows for each source row.
        max_length: target positions to hold.
    """

    def __init__(self, model: Seq2Seq, memory: Memory, beams: int, max_length: int):
        rows = memory.states.shape[0] * beams
        super().__init__(model.config, rows, memory.states.dtype, memory.states.device, max_length)
        self.memory: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(model.config.n_layer)]

    def reorder(self, rows: Tensor) -> None:
        """Row r continues what row `rows[r]` held, for (R,) int64 `rows`."""
        for held in (self.keys, self.values):
            held[:, :, :, : self.length] = held[:, rows, :, : self.length]

    @staticmethod
    def rows_of(parents: Tensor) -> Tensor:
        """(B, K) beams within each source row -> (B K,) rows."""
        B, K = parents.shape
        return (parents + K * torch.arange(B, device=parents.device)[:, None]).flatten()
