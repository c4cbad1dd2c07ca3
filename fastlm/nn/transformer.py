"""Transformer layers (Vaswani et al. 2017; pre-norm: Xiong et al. 2020), as those of `torch.nn`.

A layer is a chain of sublayers: attention, cross-attention in a decoder, feed-forward. Each ends in dropout, the
residual addition and, somewhere, a layer normalization; those three run as one `fastlm.add_layer_norm`:

    post-norm   x = norm_i(x + dropout_i(f_i(x)))
    pre-norm    x = x + dropout_i(f_i(norm_i(x))),   fused with norm_{i+1} of the sum

A module that has hooks, that was replaced by another kind, or a block method that a subclass overrides, is called
as torch would call it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._drop_in import DropIn
from ._fused import residual_chain
from .attention import MultiheadAttention
from .feed_forward import feed_forward
from .layer_norm import LayerNorm
from .linear import Linear


class TransformerEncoderLayer(nn.TransformerEncoderLayer, metaclass=DropIn, stands_for=nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on fastlm's ops: same constructor, parameters, masks and results.

    Nested input, which `torch.nn.TransformerEncoder` makes of padded batches in evaluation, is padded again.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation,
            layer_norm_eps, batch_first, norm_first, bias, device, dtype,
        )  # fmt: skip
        _adopt_children(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Encode `src`, laid out as the query of `MultiheadAttention`; masks and the causal hint are as there.

        Raises:
            ValueError, TypeError, RuntimeError: as `MultiheadAttention`; ValueError for a mask on nested input.
        """
        if src.is_nested:
            return _through_padding(self, src, src_mask, src_key_padding_mask)
        attend = partial(_self_attention, self, src_mask, src_key_padding_mask, is_causal)
        attention = _block(self, "_sa_block", attend, self.dropout1, src_mask, src_key_padding_mask, is_causal)
        feed_forward = _block(self, "_ff_block", partial(_feed_forward, self), self.dropout2)
        return residual_chain(src, [(*attention, self.norm1), (*feed_forward, self.norm2)], self.norm_first)


class TransformerDecoderLayer(nn.TransformerDecoderLayer, metaclass=DropIn, stands_for=nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on fastlm's ops: same constructor, parameters, masks and results."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation,
            layer_norm_eps, batch_first, norm_first, bias, device, dtype,
        )  # fmt: skip
        _adopt_children(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Decode `tgt` against the encoder's `memory`; masks and causal hints are `MultiheadAttention`'s.

        Raises:
            ValueError, TypeError, RuntimeError: as `MultiheadAttention`.
        """
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        other = (memory_mask, memory_key_padding_mask, memory_is_causal)
        attention = _block(self, "_sa_block", partial(_self_attention, self, *own), self.dropout1, *own)
        look_up = partial(_cross_attention, self, memory, *other)
        cross_attention = _block(self, "_mha_block", look_up, self.dropout2, memory, *other)
        feed_forward = _block(self, "_ff_block", partial(_feed_forward, self), self.dropout3)
        sublayers = [(*attention, self.norm1), (*cross_attention, self.norm2), (*feed_forward, self.norm3)]
        return residual_chain(tgt, sublayers, self.norm_first)


TransformerLayer = TransformerEncoderLayer | TransformerDecoderLayer
FASTLM_CLASS: dict[type, type] = {nn.MultiheadAttention: MultiheadAttention, nn.LayerNorm: LayerNorm, nn.Linear: Linear}


def _adopt_children(layer: nn.Module) -> None:
    """Give torch's submodules fastlm's forward: parameters are drawn once, so that a seed gives torch's layer."""
    for child in layer.children():
        child.__class__ = FASTLM_CLASS.get(type(child), type(child))


def _self_attention(
    layer: TransformerLayer, attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool, x: Tensor
) -> Tensor:
    return layer.self_attn(
        x, x, x, attn_mask=attn_mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
    )[0]


def _cross_attention(
    layer: TransformerDecoderLayer,
    memory: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    x: Tensor,
) -> Tensor:
    return layer.multihead_attn(
        x, memory, memory, attn_mask=attn_mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
    )[0]


def _feed_forward(layer: TransformerLayer, x: Tensor) -> Tensor:
    return feed_forward(x, layer.linear1, layer.activation, layer.dropout, layer.linear2)


def _block(
    layer: TransformerLayer, name: str, function: Callable[[Tensor], Tensor], dropout: nn.Dropout, *args
) -> tuple[Callable[[Tensor], Tensor], nn.Dropout | None]:
    """(`function`, `dropout`), or a subclass's or an instance's own `name` method, which has its dropout inside."""
    encoder = isinstance(layer, nn.TransformerEncoderLayer)
    torchs = nn.TransformerEncoderLayer if encoder else nn.TransformerDecoderLayer
    if getattr(type(layer), name) is getattr(torchs, name) and name not in layer.__dict__:
        return function, dropout
    method = getattr(layer, name)
    return lambda x: method(x, *args), None


def _through_padding(
    layer: TransformerEncoderLayer, src: Tensor, src_mask: Tensor | None, padding: Tensor | None
) -> Tensor:
    """The layer on a nested tensor of (length, E) sequences."""
    if src_mask is not None or padding is not None:
        name = "src_key_padding_mask" if src_mask is None else "src_mask"
        raise ValueError(f"TransformerEncoderLayer: {name} is given with a nested src, which holds no padding")
    sequences = src.unbind()
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=src.device)
    x = nn.utils.rnn.pad_sequence(list(sequences), batch_first=layer.self_attn.batch_first)
    T = x.shape[1 if layer.self_attn.batch_first else 0]
    y = layer.forward(x, src_key_padding_mask=torch.arange(T, device=src.device) >= lengths[:, None])
    rows = y.unbind(0 if layer.self_attn.batch_first else 1)
    return torch.nested.as_nested_tensor([row[: len(s)] for row, s in zip(rows, sequences, strict=True)])
