"""The table of a model whose embedding is its output layer's weight too, with one gradient for both uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.dispatch import must_trace, needs_grad
from ._autograd import by_reference
from ._gemm import as_matrix
from ._shadow import rounded, serves


class _TiedEmbedding(torch.autograd.Function):
    """The rows that tokens look up, and the whole table for the output projection, in bf16 where that is wanted.

    The lookup's gradient is added to the projection's in place: a second gradient of the table's size, zero but for
    those rows, is neither made nor added.
    """

    @staticmethod
    def forward(ctx, weight, tokens, low):
        ctx.save_for_backward(weight, tokens)
        ctx.set_materialize_grads(False)
        return F.embedding(tokens, weight), (rounded(weight) if low else weight).detach()

    @staticmethod
    def backward(ctx, d_rows, d_table):
        weight, tokens = ctx.saved_tensors
        if d_rows is None:
            return d_table, None, None
        flat, d_rows = tokens.flatten(), as_matrix(d_rows)
        if d_table is None:
            return torch.ops.aten.embedding_dense_backward(d_rows, flat, weight.shape[0], -1, False), None, None
        wanted = getattr(weight, "grad_dtype", weight.dtype) if weight.is_leaf else weight.dtype
        if wanted not in (None, d_table.dtype):
            d_table = d_table.to(wanted)
        # Each row is added once, however often its token occurs: rounded once, and in a fixed order on a GPU too.
        found, inverse = flat.unique(return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(d_rows, inverse, found.numel(), -1, False)
        sums = (sums + d_table[found]).to(d_table.dtype)
        if by_reference(d_rows, d_table):
            return d_table.index_copy(0, found, sums), None, None
        return d_table.index_copy_(0, found, sums), None, None


def tied_embedding(weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(rows that the tokens look up, the table as a projection's weight), with one gradient for both uses."""
    if not needs_grad(weight) or must_trace(weight, tokens):
        return F.embedding(tokens, weight), weight
    return _TiedEmbedding.apply(weight, tokens, serves(weight))
