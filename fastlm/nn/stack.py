"""Stacks of Transformer layers and the whole encoder-decoder (Vaswani et al. 2017), as those of `torch.nn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.dispatch import autocast_dtype
from ._drop_in import DropIn
from .attention import MultiheadAttention
from .layer_norm import LayerNorm
from .linear import Linear
from .transformer import TransformerDecoderLayer, TransformerEncoderLayer


class TransformerEncoder(nn.TransformerEncoder, metaclass=DropIn, stands_for=nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` on fastlm's ops: same constructor, parameters, masks and results.

    The padded positions of the result are as in torch: where it would run nested tensors in evaluation
    (enable_nested_tensor and a left-aligned src_key_padding_mask alone), they are 0 before the final norm.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Encode `src` by every layer; arguments and errors are `TransformerEncoderLayer`'s.

        Args:
            is_causal: a promise that mask is the causal one; None looks.
        """
        first = self.layers[0]
        is_causal = _is_causal(mask, is_causal, _length(src, first))
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
        if src_key_padding_mask is not None and mask is None and _would_nest(self, src, src_key_padding_mask):
            output = output.masked_fill(_blocked(src_key_padding_mask).unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(nn.TransformerDecoder, metaclass=DropIn, stands_for=nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder` on fastlm's ops: same constructor, parameters, masks and results."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Decode `tgt` by every layer; arguments and errors are `TransformerDecoderLayer`'s.

        Args:
            tgt_is_causal: a promise that tgt_mask is the causal one; None looks.
        """
        tgt_is_causal = _is_causal(tgt_mask, tgt_is_causal, _length(tgt, self.layers[0]))
        output = tgt
        for layer in self.layers:
            output = layer(
                output, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_is_causal=tgt_is_causal,
                tgt_key_padding_mask=tgt_key_padding_mask, memory_key_padding_mask=memory_key_padding_mask,
                memory_is_causal=memory_is_causal,
            )  # fmt: skip
        return output if self.norm is None else self.norm(output)


class Transformer(nn.Transformer, metaclass=DropIn, stands_for=nn.Transformer):
    """`torch.nn.Transformer` on fastlm's ops: same constructor, parameters, masks and results."""

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation,
            custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype,
        )  # fmt: skip
        # Swapped after torch has drawn the parameters, so that a seed gives torch's model.
        for stack, given in ((self.encoder, custom_encoder), (self.decoder, custom_decoder)):
            for module in stack.modules() if given is None else ():
                module.__class__ = _OURS.get(type(module), type(module))


_OURS: dict[type, type] = {
    nn.LayerNorm: LayerNorm,
    nn.Linear: Linear,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
}


def _length(x: Tensor, layer: Any) -> int:
    return x.shape[1 if x.dim() == 3 and layer.self_attn.batch_first else 0]


def _is_causal(mask: Tensor | None, given: bool | None, T: int) -> bool:
    """The causal hint, or whether `mask` is seen to be the causal mask; nothing is looked at while compiling."""
    if given is not None:
        return given
    if mask is None or mask.shape[-2:] != (T, T) or torch.compiler.is_compiling():
        return False
    return bool((_blocked(mask) == torch.ones(T, T, dtype=torch.bool, device=mask.device).triu(1)).all()) and (
        mask.dtype == torch.bool or not bool(mask.tril().any())
    )


def _blocked(mask: Tensor) -> Tensor:
    """Where a mask, True or -inf, leaves a position out."""
    return mask if mask.dtype == torch.bool else mask == float("-inf")


def _would_nest(encoder: TransformerEncoder, src: Tensor, padding: Tensor) -> bool:
    """Whether torch's encoder would run these arguments as nested tensors."""
    layer = encoder.layers[0]
    if not (encoder.use_nested_tensor and torch.backends.mha.get_fastpath_enabled()) or layer.training:
        return False
    if src.dim() != 3 or src.is_nested or autocast_dtype(src.device.type) is not None:
        return False
    if torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in layer.parameters())):
        return False
    if not getattr(encoder, "mask_check", True):
        return True
    if torch.compiler.is_compiling():
        return False
    blocked = _blocked(padding)
    return bool((blocked[:, 1:] | ~blocked[:, :-1]).all())  # left-aligned: nothing seen after something left out
