"""What attention looks at."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The weights that attention gives to each key, in full; differentiable.

    Args:
        query: (B, H, T, D).
        key: (B, Hkv, S, D), Hkv a divisor of H.
        attn_mask, is_causal, scale, softcap: as for `scaled_dot_product_attention`.
        sinks: (H,) scores of one more key that every query sees; its weights are left out.

    Returns:
        (B, H, T, S) in query's dtype, computed in fp32 or wider; 0 in the rows of queries that see no key.
    """
    scores = attention_scores(query, key, attn_mask, is_causal=is_causal, scale=scale, softcap=softcap)
    if sinks is not None:
        more = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, more), -1)
    empty = scores.detach().amax(-1, keepdim=True) == -math.inf
    # Filled before and after the softmax: its gradient at a row of -inf is NaN, whatever comes in.
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return weights[..., : key.shape[2]].to(query.dtype)


def attention_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """(B, H, T, S) scores in fp32 or wider, -inf where a key is not seen."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -math.inf)
    return scores if attn_mask is None else scores + attn_mask.to(wide)
