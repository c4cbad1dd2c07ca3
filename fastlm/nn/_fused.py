"""What a block computes with its children: by fused ops over their parameters where `plain` allows that, else by them.

Each function gives what calling the modules gives, within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cross_entropy import cross_entropy
from ..ops.gelu import bias_gelu, gelu
from ..ops.layer_norm import add_layer_norm, layer_norm
from ..ops.linear import layer_linear
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.rms_norm import add_rms_norm, rms_norm
from ._plain import plain
from .layer_norm import LayerNorm
from .linear import Linear
from .rms_norm import RMSNorm


def apply_linear(x: Tensor, layer: nn.Module) -> Tensor:
    """`layer(x)`, a linear layer."""
    return layer_linear(x, layer.weight, layer.bias) if plain(layer, nn.Linear, Linear) else layer(x)


def linear_gelu(x: Tensor, layer: nn.Module, form: str = "none", dropout_p: float = 0.0) -> Tensor:
    """dropout(gelu(layer(x))), with the layer's bias, GELU and dropout in one pass."""
    if plain(layer, nn.Linear, Linear) and layer.bias is not None:
        return bias_gelu(layer_linear(x, layer.weight), layer.bias, form, dropout_p)
    hidden = gelu(layer(x), form)
    return F.dropout(hidden, dropout_p) if dropout_p else hidden


def apply_norm(x: Tensor, norm: nn.Module, out_dtype: torch.dtype | None = None) -> Tensor:
    """`norm(x)`, a layer or RMS normalization; one that is fused writes `out_dtype`."""
    if plain(norm, nn.LayerNorm, LayerNorm):
        return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, out_dtype=out_dtype)
    if plain(norm, nn.RMSNorm, RMSNorm):
        return rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)
    return norm(x)


def add_norm(
    x: Tensor,
    residual: Tensor,
    norm: nn.Module | None,
    dropout: nn.Module | float | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Any, Tensor]:
    """(norm(z), z) with z = residual + dropout(x), in one pass; (None, z) without a normalization.

    Args:
        norm: a layer or RMS normalization, or None.
        dropout: a module, or a rate above 0 in training.
        out_dtype: of a fused layer normalization's result.
    """
    if norm is None:
        return None, add(x, residual, dropout)
    rate = _rate(dropout)
    if rate is not None and plain(norm, nn.LayerNorm, LayerNorm) and len(norm.normalized_shape) == 1:
        return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, rate, out_dtype=out_dtype)
    if rate == 0.0 and plain(norm, nn.RMSNorm, RMSNorm) and len(norm.normalized_shape) == 1:
        return add_rms_norm(x, residual, norm.weight, norm.eps)
    z = add(x, residual, dropout)
    return norm(z), z


def add(x: Tensor, residual: Tensor, dropout: nn.Module | float | None = None) -> Tensor:
    """residual + dropout(x)."""
    if isinstance(dropout, nn.Module):
        return residual + dropout(x)
    return residual + (F.dropout(x, dropout) if dropout else x)


# A sublayer's function, the dropout after it, and its normalization.
Sublayer = tuple[Callable[[Tensor], Tensor], nn.Module | float | None, nn.Module]


def residual_chain(x: Tensor, sublayers: Sequence[Sublayer], norm_first: bool) -> Tensor:
    """The residual stream x through sublayers that begin or end with their own normalization.

    Post-norm x = norm_i(x + dropout_i(f_i(x))), else x = x + dropout_i(f_i(norm_i(x))), fused with the norm after it.
    """
    if norm_first:
        normed: Any = apply_norm(x, sublayers[0][2])
        for i, (function, dropout, _) in enumerate(sublayers, 1):
            following = sublayers[i][2] if i < len(sublayers) else None
            normed, x = add_norm(function(normed), x, following, dropout)
        return x
    for function, dropout, norm in sublayers:
        x = add_norm(function(x), x, norm, dropout)[0]
    return x


def _rate(dropout: nn.Module | float | None) -> float | None:
    """The rate that a fused dropout takes; None where the module has to be called."""
    if isinstance(dropout, nn.Module):
        if not plain(dropout, nn.Dropout):
            return None
        return dropout.p if dropout.training else 0.0
    return dropout or 0.0


def head_loss(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Mean cross-entropy of `head(hidden)`, a linear layer's logits (N, V), which are only made where they must be."""
    if plain(head, nn.Linear, Linear):
        return linear_cross_entropy(hidden, head.weight, targets, head.bias)
    return cross_entropy(head(hidden), targets)


def norms_within_reach(blocks: Iterable[nn.Module], kind: type, name: str, last: nn.Module) -> list[nn.Module | None]:
    """For each of a chain of pre-norm blocks the normalization that follows it, which it may compute with its sum.

    The next block's, `name`, is not the block's own: it is None where a call of either block could be seen, as by a
    hook that shards or offloads its weights, or changes what it is given; the next block then computes it. `last`, the
    caller's own, follows the last block.
    """
    chain = list(blocks)
    unseen = [plain(block, kind) for block in chain]
    norms: list[nn.Module | None] = []
    for i in range(len(chain)):
        following = last if i + 1 == len(chain) else getattr(chain[i + 1], name) if unseen[i + 1] else None
        norms.append(following if unseen[i] else None)
    return norms
