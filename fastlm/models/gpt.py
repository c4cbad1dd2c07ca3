"""GPT-2 on fastlm's fused ops.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; parameter names follow
OpenAI's release, so a state dict lines up with Hugging Face's. Shapes: B batch, T tokens of this call,
S tokens attended to, C = n_embd, H = n_head, D = C / H, V = vocab_size.

The residual additions run inside the LayerNorm that follows them, so a block takes the normed stream and
the raw one, and is told which LayerNorm comes next, unless that is a block's whose call somebody may see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn._fused import add_norm, apply_linear, apply_norm, linear_gelu
from ..ops.linear import layer_linear
from .common.attention import causal_attention
from .common.config import ModelConfig
from .common.documents import Documents
from .common.model import CausalLM, product_dtype
from .common.positions import learned_positions

if TYPE_CHECKING:
    from .common.cache import KVCache


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """The sizes and rates that define a GPT.

    Attributes:
        vocab_size, context_length, n_layer, n_head, n_embd: sizes; n_head divides n_embd.
        dropout: rate on the embeddings, the attention weights and both residual branches.
        layer_norm_eps: added to the variance in every LayerNorm.
        n_inner: hidden size of the MLP; None means 4 n_embd.
        tie_embeddings: whether the output head is the token embedding.

    Raises:
        ConfigError: for a size below 1, a rate outside [0, 1), or n_embd not divisible by n_head.
    """

    families: ClassVar[tuple[str, ...]] = ("gpt2",)

    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    n_inner: int | None = None
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes("vocab_size", "context_length", "n_layer", "n_head", "n_embd")
        if self.n_inner is not None:
            self._check_sizes("n_inner")
        self._check_multiple("n_embd", "n_head")
        self._check_rates("dropout")
        self._check_positive("layer_norm_eps")
        self._check_flags("tie_embeddings")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.head_size = layer, config.n_head, config.head_size
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = apply_linear(x, self.c_attn).view(B, T, 3, self.n_head, self.head_size)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, T, D), views of the projection
        y = causal_attention(q, k, v, self.layer, cache, self.dropout if self.training else 0.0)
        return apply_linear(y.transpose(1, 2).reshape(B, T, C), self.c_proj)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inner)
        self.c_proj = nn.Linear(inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(linear_gelu(x, self.c_fc, "tanh"), self.c_proj)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, normed: Tensor | None, x: Tensor, next_norm: nn.Module | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Take ln_1(x), if it is there, and x, both (B, T, C); return next_norm(y), if it is given, and y."""
        dtype, dropout = product_dtype(x), self.dropout if self.training else 0.0
        normed = apply_norm(x, self.ln_1, dtype) if normed is None else normed
        normed, x = add_norm(self.attn(normed, cache), x, self.ln_2, dropout, dtype)
        return add_norm(self.mlp(normed), x, next_norm, dropout, dtype)


class GPT(CausalLM):
    """GPT-2: learned positions, pre-norm blocks, tanh-GELU, output head tied to the token embedding.

    Args:
        config: the sizes. Parameters are fp32 and drawn as GPT-2's: weights and embeddings from a normal
            of deviation 0.02, those that write to the residual stream from 0.02 / sqrt(2 n_layer), since
            2 n_layer of them add up there; biases 0.
    """

    block = Block

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._initialise(("c_proj.weight",), 0.02 / math.sqrt(2 * config.n_layer))

    def blocks(self, rows: Tensor, start: int, cache: KVCache | None) -> Tensor:
        if isinstance(cache, Documents):
            positions = self.wpe(cache.positions)
        else:
            positions = learned_positions(self.wpe, start, rows.shape[1], rows.device)
        x = F.dropout(rows + positions, self.config.dropout, self.training)  # (B, T, C)
        return self._through(self.h, "ln_1", self.ln_f, x, cache)

    def product_weights(self) -> list[Tensor]:
        """The matrices of all products, each once."""
        weights = [layer.weight for layer in self.modules() if isinstance(layer, nn.Linear)] + [self.head_weight]
        return list(dict.fromkeys(weights))

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states (..., C) to logits (..., V)."""
        return layer_linear(hidden, self.wte.weight) if self.config.tie_embeddings else self.lm_head(hidden)

    def flops_per_token(self, context: int | None = None) -> int:
        """Floating-point operations that one training step (forward and backward) spends on a token.

        6 N + 12 L T C, with N the parameters that multiply something (all but the embedding tables that
        are only looked up) and T = `context`: Chowdhery et al. 2022, "PaLM", appendix B. It counts the
        attention scores in full, as that source does, though a causal kernel skips half of them.

        Args:
            context: tokens a sequence; None means the context length.
        """
        context = self.config.context_length if context is None else context
        looked_up = self.wpe.weight.numel() + (0 if self.config.tie_embeddings else self.wte.weight.numel())
        attention = 12 * self.config.n_layer * context * self.config.n_embd
        return 6 * (self.num_parameters() - looked_up) + attention

    @classmethod
    def from_huggingface(cls, folder: str | PathLike[str], dropout: float | None = None) -> GPT:
        """Load a Hugging Face GPT-2 folder: config.json and model.safetensors, whole or sharded.

        Args:
            folder: where the files lie.
            dropout: replaces the folder's three rates; needed where these are not one and the same.

        Returns:
            The model on the CPU, in fp32, in training mode.

        Raises:
            CheckpointError: for missing or damaged files, a setting that this architecture does not have,
                and missing, extra or misshapen tensors, by name.
        """
        from ..formats.hf.layout import load

        return load(folder, dropout, model=cls)  # type: ignore[return-value]

    def save_huggingface(self, folder: str | PathLike[str], eot_id: int | None = None) -> None:
        """Write config.json and model.safetensors for `transformers.GPT2LMHeadModel.from_pretrained`.

        Args:
            folder: made if it is not there. Both files are complete before either replaces an older one.
            eot_id: the id that begins and ends a text; None leaves what the model's own folder named.

        Raises:
            CheckpointError: if the files cannot be written; older ones are then untouched.
        """
        from ..formats.hf.layout import save

        save(self, folder, **({} if eot_id is None else {"bos_token_id": eot_id, "eos_token_id": eot_id}))
