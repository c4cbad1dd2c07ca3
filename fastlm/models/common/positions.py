"""Learned positions, as the models' embeddings take them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...nn._plain import plain


def learned_positions(table: nn.Embedding, start: int, length: int, device: torch.device) -> Tensor:
    """The embeddings (length, C) of positions `start` to `start + length - 1`; a view where the table may be read."""
    if plain(table, nn.Embedding):
        return table.weight[start : start + length]
    return table(torch.arange(start, start + length, device=device))
