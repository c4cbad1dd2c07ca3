"""Llama and its relatives (Mistral, Qwen2) on fastlm's fused ops.

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models"; Jiang et al. 2023, "Mistral 7B";
Yang et al. 2024, "Qwen2 Technical Report". Pre-norm blocks of RMSNorm, rotary positions, grouped-query
attention and SwiGLU, without biases but where the configuration says so. Shapes: B batch, T tokens of this
call, S tokens attended to, C = n_embd, H = n_head, K = n_kv_head, D = head_size, V = vocab_size.

The residual additions run inside the RMSNorm that follows them, as in gpt.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ..nn._fused import add_norm, apply_linear, apply_norm
from ..nn.embedding import rotary_rates
from ..ops.linear import layer_linear
from ..ops.rotary import rotary
from ..ops.swiglu import swiglu
from .common.attention import causal_attention
from .common.config import ModelConfig
from .common.documents import Documents
from .common.model import CausalLM

if TYPE_CHECKING:
    from .common.cache import KVCache


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """The sizes that define a Llama.

    Attributes:
        vocab_size, context_length, n_layer, n_head, n_embd, n_inner: sizes; n_inner is the SwiGLU's.
        n_kv_head: heads of keys and values, a divisor of n_head; None means n_head.
        head_size: elements of a head, even; None means n_embd / n_head.
        rms_norm_eps: added to the mean square in every RMSNorm.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: None, or how the wavelengths were stretched for a longer context: "linear" (divided by
            rope_factor; Chen et al. 2023) or "llama3" (long waves are, short ones stay, those between are mixed).
        rope_factor, rope_low_freq_factor, rope_high_freq_factor, rope_original_context: of the scaling.
        qkv_bias, output_bias, mlp_bias: whether these projections have biases (Qwen2: qkv_bias).
        sliding_window: tokens that each one sees, itself included; None means all before it.
        first_window_layer: the first layer with the window.
        dropout: rate on the attention weights in training.
        tie_embeddings: whether the output head is the token embedding.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2")
    scalings: ClassVar[tuple[str | None, ...]] = (None, "linear", "llama3")

    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int
    n_kv_head: int = None  # type: ignore[assignment]  # resolved below
    head_size: int = None  # type: ignore[assignment]  # resolved below
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: str | None = None
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_context: int = 8192
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    first_window_layer: int = 0
    dropout: float = 0.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes("vocab_size", "context_length", "n_layer", "n_head", "n_embd", "n_inner")
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if self.head_size is None:
            self._check_multiple("n_embd", "n_head")
            object.__setattr__(self, "head_size", self.n_embd // self.n_head)
        self._check_sizes("n_kv_head", "head_size", "rope_original_context")
        if self.n_head % self.n_kv_head:
            self._refuse("n_kv_head", f"a divisor of n_head {self.n_head}")
        if self.head_size % 2:
            self._refuse("head_size", "an even number")
        self._check_positive(
            "rms_norm_eps", "rope_theta", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"
        )
        if self.rope_scaling not in self.scalings:
            *others, last = map(str, self.scalings)
            self._refuse("rope_scaling", f"{', '.join(others)} or {last}")
        if self.sliding_window is not None:
            self._check_sizes("sliding_window")
        self._check_sizes("first_window_layer", low=0)
        self._check_rates("dropout")
        self._check_flags("qkv_bias", "output_bias", "mlp_bias", "tie_embeddings")

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the queries, keys and values in the fused projection."""
        shared = self.n_kv_head * self.head_size
        return self.n_head * self.head_size, shared, shared

    @property
    def rotary_size(self) -> int:
        """Elements of a head that turn, an even number; the rest stay."""
        return self.head_size


def rotary_frequencies(config: LlamaConfig) -> Tensor:
    """Radians a token for each pair of a head's elements that turn, (R,) fp32."""
    frequencies = rotary_rates(config.rotary_size, config.rope_theta, torch.float32)
    if config.rope_scaling is None:
        return frequencies
    stretched = frequencies / config.rope_factor
    if config.rope_scaling == "linear":
        return stretched
    # Llama 3: the number of turns within the original context tells long waves from short ones.
    turns = config.rope_original_context * frequencies / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(stretched, frequencies, share)


def rotations(frequencies: Tensor, start: int, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (T, R) fp32, of the angles at positions `start` to `start + T`, for `frequencies` (R,)."""
    positions = torch.arange(start, start + T, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies.to(device))
    return angles.cos(), angles.sin()


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.config = layer, config
        self.window = config.sliding_window if layer >= config.first_window_layer else None
        self.qkv = nn.Linear(config.n_embd, sum(config.qkv_sizes), bias=config.qkv_bias)
        self.out = nn.Linear(config.qkv_sizes[0], config.n_embd, bias=config.output_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, _ = x.shape
        heads = self.config.n_head, self.config.n_kv_head, self.config.n_kv_head
        qkv = self.qkv(x).view(B, T, sum(heads), self.config.head_size).transpose(1, 2)  # (B, H + 2 K, T, D)
        q, k, v = qkv.split(heads, 1)
        q, k = self.rotate(q, k, cos, sin)
        dropout = self.config.dropout if self.training else 0.0
        y = causal_attention(q, k, v, self.layer, cache, dropout, self.window, grouped=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, (B, H, T, D) and (B, K, T, D), turned by their positions."""
        return rotary(q, cos, sin), rotary(k, cos, sin)


class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_inner, bias=config.mlp_bias)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(swiglu(gate, up))


class LlamaBlock(nn.Module):
    attention_kind: ClassVar[type[LlamaAttention]] = LlamaAttention
    dropout = 0.0  # on the residual branches

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.n_embd, config.rms_norm_eps)
        self.attention = self.attention_kind(config, layer)
        self.mlp_norm = nn.RMSNorm(config.n_embd, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        normed: Tensor | None,
        x: Tensor,
        next_norm: nn.Module | None,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """As `Block` of gpt.py, with attention_norm for ln_1."""
        dropout = self.dropout if self.training else 0.0
        normed = apply_norm(x, self.attention_norm) if normed is None else normed
        normed, x = add_norm(self.attention(normed, cos, sin, cache), x, self.mlp_norm, dropout)
        return add_norm(self.mlp(normed), x, next_norm, dropout)


class Llama(CausalLM):
    """Llama: rotary positions, pre-norm blocks, grouped-query attention, SwiGLU.

    Args:
        config: the sizes. Parameters are fp32: weights and embeddings from a normal of deviation 0.02, those
            that write to the residual stream from 0.02 / sqrt(2 n_layer); norms 1, biases 0.
    """

    block: ClassVar[type[LlamaBlock]] = LlamaBlock

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(self.block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.rms_norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._initialise(("attention.out.weight", "mlp.down.weight"), 0.02 / math.sqrt(2 * config.n_layer))

    def blocks(self, rows: Tensor, start: int, cache: KVCache | None) -> Tensor:
        if isinstance(cache, Documents):
            cos, sin = (x[cache.positions] for x in self.rotations(0, cache.longest(), rows.device))
        else:
            cos, sin = self.rotations(start, rows.shape[1], rows.device)
        return self._through(self.layers, "attention_norm", self.norm, rows, cache, cos, sin)

    def rotations(self, start: int, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (T, R) fp32, of the angles at positions `start` to `start + T`; 2 R = rotary_size."""
        return rotations(rotary_frequencies(self.config), start, T, device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states (..., C) to logits (..., V)."""
        tied = self.config.tie_embeddings
        return layer_linear(hidden, self.wte.weight) if tied else apply_linear(hidden, self.lm_head)
