"""Qwen 3: a Llama whose queries and keys are normalized, each head by itself, before they turn.

Yang et al. 2025, "Qwen3 Technical Report".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..nn._fused import apply_norm
from .llama import Llama, LlamaAttention, LlamaBlock, LlamaConfig


@dataclass(frozen=True)
class Qwen3Config(LlamaConfig):
    """The sizes that define a Qwen 3; see `LlamaConfig`."""

    families: ClassVar[tuple[str, ...]] = ("qwen3",)


class Qwen3Attention(LlamaAttention):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__(config, layer)
        self.q_norm = nn.RMSNorm(config.head_size, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_size, config.rms_norm_eps)

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return super().rotate(apply_norm(q, self.q_norm), apply_norm(k, self.k_norm), cos, sin)


class Qwen3Block(LlamaBlock):
    attention_kind = Qwen3Attention


class Qwen3(Llama):
    """Qwen 3: rotary positions, pre-norm blocks, grouped-query attention with normalized queries and keys, SwiGLU."""

    block = Qwen3Block
