"""Several texts one after the other in a row, as if each were a row by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.attention_varlen import attention_varlen


class Documents:
    """In the place of a cache: what blocks need to know of the texts that a row of N tokens is made of.

    Args:
        cu_seqlens: (texts + 1,) int32, the first token of each text and, last, N.
        length: N.

    Attributes:
        positions: (N,) int64 of each token in its own text.
    """

    length = 0  # of what came before, as of a cache

    def __init__(self, cu_seqlens: Tensor, length: int):
        self.cu_seqlens = cu_seqlens
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        own = torch.repeat_interleave(starts, ends - starts, output_size=length)
        self.positions = torch.arange(length, device=cu_seqlens.device) - own

    def longest(self) -> int:
        """Tokens of the longest text; on a GPU this waits for the device."""
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, window: int | None) -> Tensor:
        """Causal attention within each text: (1, H, N, D), (1, K, N, D) twice -> (1, H, N, D)."""
        before = None if window is None else (window - 1, None)
        query, key, value = (x[0].transpose(0, 1) for x in (q, k, v))
        y = attention_varlen(query, key, value, self.cu_seqlens, dropout_p=dropout, is_causal=True, window=before)
        return y.transpose(0, 1)[None]

    def advance(self, length: int) -> None:
        """Nothing follows."""
