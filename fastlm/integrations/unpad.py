"""BERT-type encoders without their padding: tokens of all sequences run packed, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._core.dispatch import must_trace
from ..models.common.unpad import kept_rows, sequence_bounds, spread
from ..nn._plain import plain
from ..ops.attention import OBSERVERS


def unpadded_forward(original: Any) -> Callable[..., Any]:
    """The forward of an encoder that takes (hidden_states, attention_mask) and hands keywords on to its layers."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if not _servable(self, hidden_states, attention_mask, args, kwargs):
            return original.forward(self, hidden_states, attention_mask, *args, **kwargs)
        assert attention_mask is not None  # for the type checker
        B, T, C = hidden_states.shape
        seen = attention_mask[:, 0, 0]  # (B, T)
        rows = kept_rows(seen)
        packed = hidden_states.reshape(B * T, C)[rows].unsqueeze(0)
        output = original.forward(self, packed, None, *args, cu_seq_lens_q=sequence_bounds(seen), **kwargs)
        output.last_hidden_state = spread(output.last_hidden_state.squeeze(0), rows, (B, T))
        return output

    return forward


def _servable(self: Any, hidden_states: Tensor, mask: Tensor | None, args: tuple, kwargs: dict) -> bool:
    """Whether the mask only leaves keys out, fastlm attends, and nothing looks at attention or a layer's states.

    Asking the 230 modules of BERT base takes 0.2 ms.
    """
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.stride(2) != 0:
        return False
    if self.config._attn_implementation != "fastlm" or must_trace(hidden_states) or OBSERVERS:
        return False
    if any(x is not None for x in args) or any(kwargs.get(name) is not None for name in _OTHERS):
        return False
    if any(kwargs.get(name) or getattr(self.config, name, False) for name in _LOOKING):
        return False
    return all(_packs(module) for module in self.modules())


def _packs(module: nn.Module) -> bool:
    """Whether nobody sees that a part of the encoder is called with packed tokens.

    Its class has to be of a library whose layers take each token by itself, or attend as `cu_seq_lens_q` says.
    """
    cls = type(module)
    return cls.__module__.partition(".")[0] in ("torch", "transformers", "fastlm") and plain(module, cls)


_OTHERS = ("encoder_hidden_states", "past_key_values", "cu_seq_lens_q")
_LOOKING = ("output_hidden_states", "output_attentions")
