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
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.dispatch import autocast_dtype
from ..nn._fused import add, add_norm, apply_linear, apply_norm, head_loss, linear_gelu, norms_within_reach
from ..nn._plain import plain
from ..ops._products import linear, tied_embedding
from ..ops.attention import scaled_dot_product_attention
from ..ops.linear_cross_entropy import linear_cross_entropy
from .common.checks import check_ids, check_same_shape, check_tokens
from .common.config import ModelConfig

if TYPE_CHECKING:
    from .common.cache import KVCache

IGNORED_TARGET = -100


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
        self._check_sizes("vocab_size", "context_length", "n_layer", "n_head", "n_embd")
        if self.n_inner is not None:
            self._check_sizes("n_inner")
        if self.n_embd % self.n_head:
            self._refuse("n_embd", f"a multiple of n_head {self.n_head}")
        self._check_rates("dropout")
        self._check_positive("layer_norm_eps")
        self._check_flags("tie_embeddings")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products run in: the norms write it, so that autocast has nothing left to cast."""
    return autocast_dtype(x.device.type) or x.dtype


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.head_size = layer, config.n_head, config.head_size
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = apply_linear(x, self.c_attn, linear).view(B, T, 3, self.n_head, self.head_size)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, T, D), views of the projection
        mask, is_causal = None, T > 1
        if cache is not None and cache.length:
            mask, is_causal = cache.mask(T), False
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D)
        dropout = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=is_causal)
        return apply_linear(y.transpose(1, 2).reshape(B, T, C), self.c_proj, linear)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inner)
        self.c_proj = nn.Linear(inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(linear_gelu(x, self.c_fc, "tanh", product=linear), self.c_proj, linear)


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
        branch = self.mlp(normed)
        return (None, add(branch, x, dropout)) if next_norm is None else add_norm(branch, x, next_norm, dropout, dtype)


class GPT(nn.Module):
    """GPT-2: learned positions, pre-norm blocks, tanh-GELU, output head tied to the token embedding.

    Args:
        config: the sizes. Parameters are fp32 and drawn as GPT-2's: weights and embeddings from a normal
            of deviation 0.02, those that write to the residual stream from 0.02 / sqrt(2 n_layer), since
            2 n_layer of them add up there; biases 0.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=residual_std if name.endswith("c_proj.weight") else 0.02)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output projection, (V, C)."""
        return self.wte.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Next-token logits, or the mean loss.

        Args:
            tokens: (B, T) int64 ids.
            targets: (B, T) int64 ids that follow each token; -100 leaves a position out of the loss.
            cache: holds the keys and values of the tokens before these, and takes up those of these.

        Returns:
            Logits (B, T, V); with `targets`, the mean cross-entropy in nats, a scalar, and the logits are
            never held. The residual stream stays in the parameters' dtype under autocast.

        Raises:
            ValueError: for a wrong rank, dtype or shape, a sequence longer than the context, or (on the
                CPU and outside torch.compile, where looking is free) an id outside the vocabulary.
        """
        if targets is not None:
            check_same_shape("GPT", "targets", targets, "tokens", tokens)
            check_ids("GPT", "targets", targets, self.config.vocab_size, IGNORED_TARGET)
        if targets is None:
            return self.logits(self.hidden(tokens, cache))
        start = 0 if cache is None else cache.length
        check_tokens("GPT", tokens, self.config, start)
        if self.config.tie_embeddings and plain(self.wte, nn.Embedding):
            rows, head = tied_embedding(self.wte.weight, tokens)
        else:
            rows, head = self.wte(tokens), self.wte.weight
        hidden = self._blocks(rows, start, cache).flatten(0, 1)
        if self.config.tie_embeddings:
            return linear_cross_entropy(hidden, head, targets.flatten())
        return head_loss(hidden, self.lm_head, targets.flatten())

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Output of the last LayerNorm, (B, T, C), for int64 `tokens` (B, T); see `forward`."""
        start = 0 if cache is None else cache.length
        check_tokens("GPT", tokens, self.config, start)
        return self._blocks(self.wte(tokens), start, cache)

    def _blocks(self, rows: Tensor, start: int, cache: KVCache | None) -> Tensor:
        """From the tokens' embeddings (B, T, C), the first at position `start`, to the last LayerNorm's output."""
        T = rows.shape[1]
        if plain(self.wpe, nn.Embedding):
            positions = self.wpe.weight[start : start + T]
        else:
            positions = self.wpe(torch.arange(start, start + T, device=rows.device))
        x = F.dropout(rows + positions, self.config.dropout, self.training)  # (B, T, C)
        normed = None
        for block, next_norm in zip(self.h, norms_within_reach(self.h, Block, "ln_1", self.ln_f), strict=True):
            normed, x = block(normed, x, next_norm, cache)
        if cache is not None:
            cache.advance(T)
        return apply_norm(x, self.ln_f, product_dtype(x)) if normed is None else normed

    def product_weights(self) -> list[Tensor]:
        """The matrices of all products, each once."""
        weights = [layer.weight for layer in self.modules() if isinstance(layer, nn.Linear)] + [self.head_weight]
        return list(dict.fromkeys(weights))

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states (..., C) to logits (..., V)."""
        return linear(hidden, self.wte.weight) if self.config.tie_embeddings else self.lm_head(hidden)

    def num_parameters(self) -> int:
        """Number of trained values; a tied output head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

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
