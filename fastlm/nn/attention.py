"""Multi-head attention (Vaswani et al. 2017), as `torch.nn.MultiheadAttention`.

Shapes: B batch, T query length, S key length, E embedding, H heads, D = E / H.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.dispatch import autocast_dtype
from ..ops.attention import scaled_dot_product_attention
from ..ops.linear import layer_linear
from ._drop_in import DropIn


class MultiheadAttention(torch.nn.MultiheadAttention, metaclass=DropIn, stands_for=torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on `fastlm.scaled_dot_product_attention`.

    Constructor, parameters, state_dict, masks and results are torch's, with one difference: a query whose
    keys are all masked out attends to nothing, and gets weights of 0 and zero gradients where torch gives NaN.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: (T, B, embed_dim), or (B, T, embed_dim) with batch_first, or (T, embed_dim).
            key, value: likewise with length S, and kdim and vdim features.
            key_padding_mask: (B, S), or (S,) unbatched. Boolean: True leaves the key out. Floating-point: added
                to the scores.
            need_weights: also return the attention weights; they are computed, and stored, only then.
            attn_mask: (T, S) or (B * num_heads, T, S), boolean or floating-point as key_padding_mask.
            average_attn_weights: return the weights' mean over heads.
            is_causal: a promise that attn_mask is the causal mask. It is then not read, unless key_padding_mask
                or need_weights call for it; a key of add_bias_kv or add_zero_attn is then beyond the triangle.

        Returns:
            (output, weights): output has query's shape; weights are None, or after dropout in training
            (B, T, S) averaged and (B, num_heads, T, S) otherwise, without B for unbatched input.

        Raises:
            ValueError: if a shape or device does not fit.
            TypeError: if a dtype does not fit, or a tensor is nested.
            RuntimeError: if is_causal is set without attn_mask.
        """
        if "parametrizations" in self._modules:  # their weights are computed at each look, and may change with it
            arguments = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            return torch.nn.MultiheadAttention.forward(self, query, key, value, *arguments)
        _check_inputs(self, query, key, value)
        if is_causal and attn_mask is None:
            raise RuntimeError("MultiheadAttention: attn_mask is None, but the is_causal hint needs it")
        causal = is_causal and key_padding_mask is None and not need_weights
        q, k, v = (_split_heads(self, x) for x in _project(self, query, key, value))  # (B, H, T or S, D)
        unbatched = query.dim() == 2
        mask = None if causal else _merged_mask(self, key_padding_mask, attn_mask, q, k.shape[2], unbatched)
        k, v = _extend(self, k, self.bias_k), _extend(self, v, self.bias_v)
        weights = None
        if need_weights:
            weights = F.dropout(_attention_weights(q, k, mask), self.dropout, self.training)
            y = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights.squeeze(0) if unbatched else weights
        else:
            if mask is not None and mask.dtype == torch.bool:
                mask = ~mask  # the op's masks are True where a key is seen
            y = scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, causal)
        return _output(self.out_proj, _join_heads(self, y, unbatched)), weights


def _output(out_proj: nn.Module, y: Tensor) -> Tensor:
    """The output projection, whose weight torch reads without calling it; what it could not read is called."""
    weight = out_proj.weight
    if not isinstance(weight, Tensor) or weight.is_meta != y.is_meta:  # quantized, or offloaded
        return out_proj(y)
    return layer_linear(y, weight, out_proj.bias)  # type: ignore[arg-type]


def _in_weight(layer: MultiheadAttention) -> Tensor:
    return layer.q_proj_weight if layer.in_proj_weight is None else layer.in_proj_weight


def _project(layer: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """q, k, v with features unflattened to (H, D); tensors that are one and the same share one product."""
    E, heads = layer.embed_dim, (layer.num_heads, layer.head_dim)
    w, bias = layer.in_proj_weight, layer.in_proj_bias
    b = None if bias is None else bias.to(_in_weight(layer).dtype)  # torch's takes one of another dtype
    if w is not None and query is key and key is value:
        return layer_linear(query, w, b).unflatten(-1, (3, *heads)).unbind(-3)
    if w is not None and key is value:
        b_q, b_kv = (None, None) if b is None else b.split((E, 2 * E))
        k, v = layer_linear(key, w[E:], b_kv).unflatten(-1, (2, *heads)).unbind(-3)
        return layer_linear(query, w[:E], b_q).unflatten(-1, heads), k, v
    ws = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight) if w is None else w.chunk(3)
    bs = (None, None, None) if b is None else b.chunk(3)
    projected = (layer_linear(*args) for args in zip((query, key, value), ws, bs, strict=True))
    return tuple(x.unflatten(-1, heads) for x in projected)


def _split_heads(layer: MultiheadAttention, x: Tensor) -> Tensor:
    """A view of shape (B, H, T, D); nothing is copied."""
    if x.dim() == 3:
        return x.transpose(0, 1).unsqueeze(0)
    return x.transpose(1, 2) if layer.batch_first else x.permute(1, 2, 0, 3)


def _join_heads(layer: MultiheadAttention, y: Tensor, unbatched: bool) -> Tensor:
    """(B, H, T, D) back to the layer's layout; a view where that is batch first."""
    if unbatched:
        return y.squeeze(0).transpose(0, 1).flatten(1)
    return (y.transpose(1, 2) if layer.batch_first else y.permute(2, 0, 1, 3)).flatten(2)


def _extend(layer: MultiheadAttention, x: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, S, D) keys or values, then the learned row of add_bias_kv and the zero row of add_zero_attn."""
    B, H, _, D = x.shape
    rows = []
    if bias is not None:
        rows.append(bias.to(x.dtype).reshape(1, H, 1, D).expand(B, H, 1, D))
    if layer.add_zero_attn:
        rows.append(x.new_zeros(B, H, 1, D))
    return torch.cat([x, *rows], dim=2) if rows else x


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask), (B, H, T, S); 0 in the rows of queries that may see no key."""
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    if mask is None or k.shape[2] == 0:
        return torch.softmax(scores, dim=-1)
    scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    # Filled before and after the softmax: its gradient at a row of -inf is NaN, whatever comes in.
    empty = scores.detach().amax(dim=-1, keepdim=True) == -math.inf
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def _merged_mask(
    layer: MultiheadAttention,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    q: Tensor,
    S: int,
    unbatched: bool,
) -> Tensor | None:
    """One mask that broadcasts to (B, H, T, S): boolean with True where blocked, or floating-point to add."""
    B, H, T, _ = q.shape
    padding = attn = None
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, ((S,) if unbatched else (B, S),), q.device)
        padding = _extended_mask(layer, key_padding_mask.view(B, 1, 1, S), q.dtype)
    if attn_mask is not None:
        _check_mask("attn_mask", attn_mask, ((T, S), (B * H, T, S)), q.device)
        attn = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (B, H))
        attn = _extended_mask(layer, attn, q.dtype)
    if padding is None or attn is None:
        return attn if padding is None else padding
    if padding.dtype == torch.bool:
        return attn | padding if attn.dtype == torch.bool else attn.masked_fill(padding, -math.inf)
    return padding.masked_fill(attn, -math.inf) if attn.dtype == torch.bool else attn + padding


def _extended_mask(layer: MultiheadAttention, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask with columns that let the keys of `_extend` through, in the queries' dtype unless boolean."""
    columns = int(layer.bias_k is not None) + int(layer.add_zero_attn)
    mask = F.pad(mask, (0, columns)) if columns else mask
    return mask if mask.dtype == torch.bool else mask.to(dtype)


def _check_mask(name: str, mask: Tensor, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"MultiheadAttention: {name} has dtype {mask.dtype}, expected bool or floating-point")
    if mask.shape not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"MultiheadAttention: {name} has shape {tuple(mask.shape)}, expected {expected}")
    if mask.device != device:
        raise ValueError(f"MultiheadAttention: {name} is on {mask.device}, query is on {device}")


def _check_inputs(layer: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    op, weight = "MultiheadAttention", _in_weight(layer)
    widths = (("query", query, layer.embed_dim), ("key", key, layer.kdim), ("value", value, layer.vdim))
    for name, x, width in widths:
        if x.is_nested:
            raise TypeError(f"{op}: {name} is a nested tensor, expected a padded one and key_padding_mask")
        if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
            dims = "two or three dimensions" if name == "query" else f"{query.dim()} dimensions, as query,"
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {dims} and {width} features")
        if x.device != weight.device:
            raise ValueError(f"{op}: {name} is on {x.device}, the parameters are on {weight.device}")
        if x.dtype != weight.dtype and autocast_dtype(x.device.type) is None:
            raise TypeError(f"{op}: {name} has dtype {x.dtype}, the parameters have {weight.dtype}")
    if key.shape[:-1] != value.shape[:-1]:
        expected = (*key.shape[:-1], layer.vdim)
        raise ValueError(f"{op}: value has shape {tuple(value.shape)}, expected {expected} to match key")
    batch = 0 if layer.batch_first else 1
    if query.dim() == 3 and key.shape[batch] != query.shape[batch]:
        raise ValueError(f"{op}: key has a batch of {key.shape[batch]}, query one of {query.shape[batch]}")
