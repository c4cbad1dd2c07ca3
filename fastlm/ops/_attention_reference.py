"""Attention's definition in plain torch: what every backend of it has to give, and its gradients by formula.

out = dropout(softmax(s)) value and lse = logsumexp(s) with s = cap(scale query key^T) + mask, where
cap(x) = softcap tanh(x / softcap) (Gemma Team 2024) or x, and keys outside a row's window have s = -inf.

Keys that no row of a head attends to count as 0, whatever they hold: a weight of 0 times NaN would be NaN. Kernels keep
them from every row that does not attend to them, which products of whole matrices cannot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._core import dropout as _dropout
from .._core.dispatch import without_autocast
from ..backends import cpu as _native


class Options(NamedTuple):
    """What a kernel is told beside its tensors, in the order in which it takes them.

    Attributes:
        is_causal: window_right is 0.
        scale: of the scores.
        dropout_p: probability of dropping a weight.
        seed: of the dropout mask.
        window_left: query i attends keys from i - window_left on; -1 is no limit.
        window_right: query i attends keys up to i + window_right; -1 is no limit.
        softcap: bound of the scores, 0 for none.
    """

    is_causal: bool
    scale: float
    dropout_p: float = 0.0
    seed: int = 0
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0


def _wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 or wider, with as many heads in k and v as in q."""
    dtype = _native.compute_dtype(q.dtype)
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = (x.to(dtype).repeat_interleave(group, 1) if group > 1 else x.to(dtype) for x in (k, v))
    return q.to(dtype), k, v


def _scores(q: Tensor, k: Tensor, options: Options) -> tuple[Tensor, Tensor | float]:
    """Scores before any mask, and the slope of the soft cap there."""
    scores = q @ k.transpose(-2, -1) * options.scale
    if not options.softcap:
        return scores, 1.0
    bounded = torch.tanh(scores / options.softcap)
    return bounded * options.softcap, 1 - bounded * bounded


def _outside(T: int, S: int, options: Options, device: torch.device) -> Tensor | None:
    """(T, S): True where query i may not attend key j; None where the window excludes nothing."""
    left, right = options.window_left, 0 if options.is_causal else options.window_right
    if left < 0 and right < 0:
        return None
    ahead = torch.arange(S, device=device) - torch.arange(T, device=device)[:, None]
    outside = torch.zeros(T, S, dtype=torch.bool, device=device)
    if left >= 0:
        outside = outside | (ahead < -left)
    return outside | (ahead > right) if right >= 0 else outside


def _without_closed_keys(
    keys: Tensor, values: Tensor, T: int, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Zeros in the place of keys and values that no row attends to."""
    outside = _outside(T, keys.shape[2], options, keys.device)
    closed = outside
    if mask is not None:
        masked = ~mask if mask.dtype == torch.bool else mask.detach().to(keys.dtype) == -math.inf
        closed = masked if outside is None else outside | masked
    if closed is None or 0 in closed.shape:
        return keys, values
    closed = closed if closed.dim() > 1 else closed.expand(T, keys.shape[2])
    unseen = closed.all(-2).unsqueeze(-1)
    return keys.masked_fill(unseen, 0.0), values.masked_fill(unseen, 0.0)


def _weights(scores: Tensor, mask: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """(softmax weights (B, H, T, S), lse (B, H, T)); weights and lse are 0 and -inf where a row attends to nothing."""
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    outside = _outside(scores.shape[-2], scores.shape[-1], options, scores.device)
    if outside is not None:
        scores = scores.masked_fill(outside, -math.inf)
    closed = (scores == -math.inf).all(-1, keepdim=True)
    # Beside the lowest number of a dtype the logarithm of the sum is lost, so it is taken once the level is off.
    level = scores.detach().masked_fill(closed, 0.0).logsumexp(-1, keepdim=True)
    scores = scores - level
    rest = scores.masked_fill(closed, 0.0).logsumexp(-1, keepdim=True)
    return torch.exp(scores - rest), (level + rest).masked_fill(closed, -math.inf).squeeze(-1)


def _factors(rows: int, columns: int, options: Options, like: Tensor) -> Tensor:
    return _dropout.factors(rows, columns, options.dropout_p, options.seed, like.dtype, like.device)


def _dense_factors(queries: Tensor, S: int, options: Options) -> Tensor | float:
    """Dropout's factors of the weights (B, H, T, S)."""
    if not options.dropout_p:
        return 1.0
    B, H, T, _ = queries.shape
    return _factors(B * H * T, S, options, queries).view(B, H, T, S)


def _gradients(
    dout: Tensor,
    dlse: Tensor | None,
    wide: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    factors: Tensor | float,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, gradient of the masked scores), all with the query's heads."""
    queries, keys, values = wide
    keys, values = _without_closed_keys(keys, values, queries.shape[2], mask, options)
    scores, slope = _scores(queries, keys, options)
    weights, _ = _weights(scores, mask, options)
    dweights = dout @ values.transpose(-2, -1) * factors
    delta = (dweights * weights).sum(-1, keepdim=True)
    dmasked = weights * (dweights - delta + (0.0 if dlse is None else dlse.unsqueeze(-1)))
    dscores = dmasked * slope * options.scale
    dv = (weights * factors).transpose(-2, -1) @ dout
    return dscores @ keys, dscores.transpose(-2, -1) @ queries, dv, dmasked


def _sum_groups(gradient: Tensor, heads: int) -> Tensor:
    """A gradient with the query's heads, summed over those that share one of `heads`."""
    return gradient.unflatten(1, (heads, -1)).sum(2)


def attention_ref(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *given) -> tuple[Tensor, Tensor]:
    """The definition in fp32 or wider: q (B, H, T, D), k and v (B, Hkv, S, ...) -> (out, lse (B, H, T)).

    Args:
        given: the fields of `Options`.
    """
    options = Options(*given)
    with without_autocast(q.device.type):
        queries, keys, values = _wide(q, k, v)
        keys, values = _without_closed_keys(keys, values, q.shape[2], mask, options)
        weights, lse = _weights(_scores(queries, keys, options)[0], mask, options)
        return (weights * _dense_factors(queries, k.shape[2], options) @ values).to(q.dtype), lse


def attention_backward_ref(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: Options,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients by formula, for the registered operator, inside which autograd does not record."""
    wide = _wide(q, k, v)
    factors = _dense_factors(wide[0], k.shape[2], options)
    dq, dk, dv, dmasked = _gradients(dout.to(wide[0].dtype), dlse, wide, mask, factors, options)
    shared = _sum_groups(dk, k.shape[1]), _sum_groups(dv, v.shape[1])
    dq, dk, dv = (_native.heads_like(x).copy_(g) for x, g in zip((q, k, v), (dq, *shared), strict=True))
    return dq, dk, dv, dmasked.sum_to_size(mask.shape) if mask is not None and mask_grad else None


# ---- packed sequences --------------------------------------------------------------------------------------------


def _packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, heads, size) as (1, heads, tokens, size), wide and with as many heads in k and v as in q."""
    return _wide(*(x.transpose(0, 1)[None] for x in (q, k, v)))


def _sequences(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """The queries and the keys of each sequence."""
    first_q, first_k = cu_q.tolist(), cu_k.tolist()
    for b in range(len(first_q) - 1):
        yield slice(first_q[b], first_q[b + 1]), slice(first_k[b], first_k[b + 1])


def _packed_factors(queries: Tensor, cu_k: Tensor, options: Options) -> Tensor | None:
    """(H, Tq, longest sequence of keys): dropout's factors; a column is a key's index within its sequence."""
    if not options.dropout_p:
        return None
    H, Tq = queries.shape[1:3]
    longest = int(cu_k.diff().max()) if len(cu_k) > 1 else 0
    return _factors(H * Tq, longest, options, queries).view(H, Tq, longest)


def attention_varlen_ref(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *given) -> tuple[Tensor, Tensor]:
    """Every sequence by itself: q (Tq, H, D), k and v (Tk, Hkv, ...) -> (out (Tq, H, Dv), lse (H, Tq)).

    Args:
        given: the fields of `Options`.
    """
    options = Options(*given)
    with without_autocast(q.device.type):
        queries, keys, values = _packed(q, k, v)
        factors = _packed_factors(queries, cu_k, options)
        outs, sums = [], []
        for rows, columns in ((slice(0, 0), slice(0, 0)), *_sequences(cu_q, cu_k)):  # the first for where there is none
            own = keys[:, :, columns], values[:, :, columns]
            own_keys, own_values = _without_closed_keys(*own, rows.stop - rows.start, None, options)
            weights, lse = _weights(_scores(queries[:, :, rows], own_keys, options)[0], None, options)
            if factors is not None:
                weights = weights * factors[:, rows, : weights.shape[-1]]
            outs.append((weights @ own_values)[0].transpose(0, 1))
            sums.append(lse[0])
        return torch.cat(outs).to(q.dtype), torch.cat(sums, 1)


def attention_varlen_backward_ref(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by formula, for the registered operator, inside which autograd does not record."""
    queries, keys, values = _packed(q, k, v)
    douts = dout.transpose(0, 1)[None].to(queries.dtype)
    factors = _packed_factors(queries, cu_k, options)
    dq, dk, dv = (torch.zeros_like(x) for x in (queries, keys, values))
    for rows, columns in _sequences(cu_q, cu_k):
        wide = queries[:, :, rows], keys[:, :, columns], values[:, :, columns]
        kept = 1.0 if factors is None else factors[:, rows, : wide[1].shape[2]]
        grads = _gradients(douts[:, :, rows], None if dlse is None else dlse[None, :, rows], wide, None, kept, options)
        dq[:, :, rows], dk[:, :, columns], dv[:, :, columns] = grads[:3]
    shared = dq, _sum_groups(dk, k.shape[1]), _sum_groups(dv, v.shape[1])
    dq, dk, dv = (_native.heads_like(x).copy_(g[0].transpose(0, 1)) for x, g in zip((q, k, v), shared, strict=True))
    return dq, dk, dv
