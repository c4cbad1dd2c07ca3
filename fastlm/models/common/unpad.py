"""Batches without their padding: which tokens are kept, and the way there and back.

Zeng et al. 2022, "Boosting Distributed Training Performance of the Unpadded BERT Model". Shapes: B batch, T
length, N tokens that are no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.attention import OBSERVERS, scaled_dot_product_attention
from ...ops.attention_varlen import attention_varlen


def kept_rows(kept: Tensor) -> Tensor:
    """(B, T) bool -> (N,) places in the flattened (B, T) of the tokens that are no padding."""
    return kept.flatten().nonzero().squeeze(1)


def sequence_bounds(kept: Tensor) -> Tensor:
    """(B, T) bool -> (B + 1,) int32 places of the sequences' beginnings among the kept tokens, and their number N."""
    return F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def spread(x: Tensor, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """(N, ...) -> (B, T, ...): each row in its place, and 0 elsewhere."""
    flat = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
    return flat.index_copy(0, rows, x).unflatten(0, shape)


@dataclass
class Packing:
    """Where packed tokens come from.

    Attributes:
        shape: (B, T).
        rows: (N,) their places in the flattened (B, T), or None where there is no padding.
        cu_seqlens: (B + 1,) int32 places of the sequences' beginnings among them, and N; None likewise.
        mask: (B, T), False at padding that is kept, and masked: a compiled or exported graph cannot depend on how
            much there is, and attention that is watched is shown over (B, T). None otherwise.
    """

    shape: tuple[int, int]
    rows: Tensor | None = None
    cu_seqlens: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor | None, shape: tuple[int, int]) -> Packing:
        """From an attention mask (B, T): nonzero for tokens, 0 for padding."""
        if mask is None:
            return cls(shape)
        kept = mask != 0
        if kept.is_meta or torch.compiler.is_compiling() or OBSERVERS:
            return cls(shape, mask=kept)
        rows = kept_rows(kept)
        return cls(shape) if len(rows) == kept.numel() else cls(shape, rows, sequence_bounds(kept))

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...)."""
        flat = x.flatten(0, 1)
        return flat if self.rows is None else flat[self.rows]

    def unpack(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...), with 0 where there is padding."""
        if self.rows is not None:
            return spread(x, self.rows, self.shape)
        x = x.unflatten(0, self.shape)
        return x if self.mask is None else torch.where(self.mask.view(*self.shape, *[1] * (x.dim() - 2)), x, 0)

    def first(self, x: Tensor) -> Tensor:
        """(N, C) -> (B, C): the first token of each sequence; 0 for one that is all padding."""
        if self.mask is not None:
            places = self.mask.int().argmax(1, keepdim=True).unsqueeze(-1)  # (B, 1, 1)
            return self.unpack(x).gather(1, places.expand(-1, -1, x.shape[-1])).squeeze(1)
        if self.cu_seqlens is None:
            return x.unflatten(0, self.shape)[:, 0]
        begin, end = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:]
        if not len(x):
            return x.new_zeros(len(begin), *x.shape[1:])
        return torch.where((end > begin)[:, None], x[begin.clamp(max=len(x) - 1)], 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Attention of every token to all of its own sequence: (N, H, D) each -> (N, H, D)."""
        if self.cu_seqlens is not None:
            return attention_varlen(q, k, v, self.cu_seqlens, dropout_p=dropout_p)
        q, k, v = (x.unflatten(0, self.shape).transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        mask = None if self.mask is None else self.mask[:, None, None]
        return scaled_dot_product_attention(q, k, v, mask, dropout_p).transpose(1, 2).flatten(0, 1)
