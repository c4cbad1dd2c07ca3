"""Self-attention of the models, over packed sequences and over what a cache holds.

Shapes: B batch, T tokens of this call, S tokens attended to, H heads of queries, K of keys and values, D elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ...nn.linear import Linear
from ...ops.attention import scaled_dot_product_attention
from .cache import causal_mask
from .documents import Documents

if TYPE_CHECKING:
    from .cache import KVCache
    from .unpad import Packing


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    cache: KVCache | Documents | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    grouped: bool = False,
) -> Tensor:
    """Attention of tokens to those before them and themselves.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, T, D), K a divisor of H; other than H where `grouped` says that it may be.
        layer: whose keys and values in the cache these follow.
        cache: holds those of the tokens before, and takes up these; or where texts begin in a row of several.
        dropout: rate on the attention weights.
        window: tokens that each one sees, itself included; None for all.

    Returns:
        (B, H, T, D).
    """
    T = S = q.shape[2]
    if cache is not None:
        if isinstance(cache, Documents):
            return cache.attend(q, k, v, dropout, window)
        k, v = cache.append(layer, k, v)  # (B, K, S, D)
        S = k.shape[2]
    if window is None:
        mask = causal_mask(T, S, q.device) if 1 < T < S else None
        return scaled_dot_product_attention(q, k, v, mask, dropout, T > 1 and mask is None, enable_gqa=grouped)
    if window + T <= S:  # what no query of these sees is not read
        S = window + T - 1
        k, v = k[:, :, -S:], v[:, :, -S:]
    mask = None
    if 1 < T < S:  # is_causal and window would have the first query look at the first key
        mask = causal_mask(T, S, q.device).triu(S - T - window + 1)
    before = (window - 1, None) if window < S and T == S else None
    is_causal = T > 1 and mask is None
    return scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=grouped, window=before)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values, and biases, as of 2017."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, layer: int = 0):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, n_head, dropout
        self.qkv = Linear(n_embd, 3 * n_embd)
        self.out = Linear(n_embd, n_embd)

    def encode(self, x: Tensor, packing: Packing) -> Tensor:
        """(N, C) -> (N, C): every token attends to all of its own sequence."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).unbind(1)  # (N, H, D), views of the projection
        return self.out(packing.attend(q, k, v, self.dropout if self.training else 0.0).flatten(1))

    forward = encode

    def decode(self, x: Tensor, cache: KVCache | None) -> Tensor:
        """(B, T, C) -> (B, T, C): every token attends to those before it and itself."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = causal_attention(q, k, v, self.layer, cache, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))
