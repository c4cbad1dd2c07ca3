"""The encoder-decoder Transformer of "Attention Is All You Need" (Vaswani et al. 2017) on fastlm's fused ops.

Sinusoidal or learned positions, post-norm as in the paper or pre-norm, one embedding matrix for source, target
and output or three. Shapes: B source rows, S source length, N source tokens that are no padding, R target rows
(B, or K beams for each source row), T target tokens of this call, C = n_embd, H = n_head, D = C / H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn._fused import apply_norm, residual_chain
from ..nn.embedding import sinusoid_angles
from ..nn.feed_forward import feed_forward
from ..nn.linear import Linear
from ..ops.attention import scaled_dot_product_attention
from ..ops.cross_entropy import IGNORE_INDEX
from ..ops.linear import layer_linear
from ..ops.linear_cross_entropy import linear_cross_entropy
from .common.attention import SelfAttention
from .common.checks import check_ids, check_same_shape, check_tokens
from .common.config import ModelConfig
from .common.model import Model
from .common.positions import learned_positions
from .common.unpad import Packing

if TYPE_CHECKING:
    from .common.decoder_cache import DecoderCache

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class Seq2SeqConfig(ModelConfig):
    """The sizes and rates that define an encoder-decoder Transformer.

    Attributes:
        vocab_size, context_length, n_encoder_layer, n_decoder_layer, n_head, n_embd: sizes; n_head divides n_embd,
            and context_length bounds source and target each.
        n_inner: hidden size of the MLPs; None means 4 n_embd.
        source_vocab_size: None means vocab_size.
        dropout, attention_dropout: rates on embeddings and residual branches, and on the attention weights.
        activation: "relu" (the paper's), "gelu" or "silu".
        norm_first: whether LayerNorm stands before each sublayer (and once more at the end) or, as in the paper,
            behind the residual addition.
        positions: "sinusoidal" (sines in the first half, cosines in the second) or "learned".
        scale_embeddings: whether embeddings are multiplied by sqrt(n_embd).
        tie_embeddings: whether source, target and output share one matrix; else there are three.
        output_bias: whether the logits have a bias.
        label_smoothing: share of the target's probability that is spread over the vocabulary, in training.
        layer_norm_eps: added to the variance in every LayerNorm.
        pad_id, start_id, end_id: ids of padding, of what the decoder begins with, and of the end of a sequence.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    families: ClassVar[tuple[str, ...]] = ("marian",)

    vocab_size: int
    context_length: int
    n_encoder_layer: int = 6
    n_decoder_layer: int = 6
    n_head: int = 8
    n_embd: int = 512
    n_inner: int = None  # type: ignore[assignment]  # resolved below
    source_vocab_size: int = None  # type: ignore[assignment]  # resolved below
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation: str = "relu"
    norm_first: bool = False
    positions: str = "sinusoidal"
    scale_embeddings: bool = True
    tie_embeddings: bool = True
    output_bias: bool = False
    label_smoothing: float = 0.0
    layer_norm_eps: float = 1e-5
    pad_id: int = 0
    start_id: int = 1
    end_id: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_inner is None and isinstance(self.n_embd, int):
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        if self.source_vocab_size is None:
            object.__setattr__(self, "source_vocab_size", self.vocab_size)
        self._check_sizes(
            "vocab_size", "context_length", "n_encoder_layer", "n_decoder_layer", "n_head", "n_embd", "n_inner",
            "source_vocab_size",
        )  # fmt: skip
        self._check_multiple("n_embd", "n_head")
        if self.n_embd % 2 and self.positions == "sinusoidal":
            self._refuse("n_embd", "an even number, for sinusoidal positions")
        self._check_rates("dropout", "attention_dropout", "label_smoothing")
        self._check_positive("layer_norm_eps")
        self._check_choice("activation", tuple(ACTIVATIONS))
        self._check_choice("positions", ("sinusoidal", "learned"))
        self._check_flags("norm_first", "scale_embeddings", "tie_embeddings", "output_bias")
        self._check_ids(self.vocab_size, "pad_id", "start_id", "end_id")
        if self.tie_embeddings and self.source_vocab_size != self.vocab_size:
            self._refuse("source_vocab_size", f"vocab_size {self.vocab_size}, as the embeddings are tied")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_layer(self) -> int:
        """Layers that a decoder's cache holds."""
        return self.n_decoder_layer


@dataclass
class Memory:
    """What the encoder leaves: states (B, S, C), and which of them are no padding, (B, 1, 1, S), None for all."""

    states: Tensor
    mask: Tensor | None


def sinusoids(start: int, length: int, C: int, device: torch.device) -> Tensor:
    """The paper's position encodings of `length` positions from `start` on, (length, C) fp32: sines, then cosines."""
    angles = sinusoid_angles(torch.arange(start, start + length, dtype=torch.float32, device=device), C)
    return torch.cat([angles.sin(), angles.cos()], 1)


class CrossAttention(nn.Module):
    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.attention_dropout
        self.q = Linear(config.n_embd, config.n_embd)
        self.kv = Linear(config.n_embd, 2 * config.n_embd)
        self.out = Linear(config.n_embd, config.n_embd)

    def keys_values(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """The source's keys and values, (B, H, S, D) each: the same for every target token."""
        k, v = self.kv(memory.states).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x: Tensor, memory: Memory, held: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """(R, T, C) -> (R, T, C). The beams of a source row are queries side by side, so they share its keys.

        Args:
            held: a cache's place for the keys and values, which are computed where it is empty.
        """
        held = [] if held is None else held
        if not held:
            held.append(self.keys_values(memory))
        k, v = held[0]
        B, (R, T, _) = k.shape[0], x.shape
        q = self.q(x).view(B, R // max(B, 1) * T, self.n_head, k.shape[3]).transpose(1, 2)  # (B, H, R / B T, D)
        y = scaled_dot_product_attention(q, k, v, memory.mask, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    """What encoder and decoder layers share: the MLP, and how sublayers meet the residual stream."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.dropout, self.activation, self.norm_first = config.dropout, config.activation, config.norm_first
        self.up = Linear(config.n_embd, config.n_inner)
        self.down = Linear(config.n_inner, config.n_embd)
        self.mlp_norm = nn.LayerNorm(config.n_embd, config.layer_norm_eps)

    def mlp(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.up, ACTIVATIONS[self.activation], None, self.down)

    def chain(self, x: Tensor, *sublayers: tuple[Callable[[Tensor], Tensor], nn.Module]) -> Tensor:
        """The residual stream through sublayers, each with its norm."""
        dropout = self.dropout if self.training else 0.0
        every = [(function, dropout, norm) for function, norm in sublayers]
        return residual_chain(x, every, self.norm_first)


class EncoderLayer(Layer):
    def __init__(self, config: Seq2SeqConfig, layer: int):
        super().__init__(config)
        self.attention = SelfAttention(config.n_embd, config.n_head, config.attention_dropout, layer)
        self.attention_norm = nn.LayerNorm(config.n_embd, config.layer_norm_eps)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        return self.chain(
            x, (lambda x: self.attention.encode(x, packing), self.attention_norm), (self.mlp, self.mlp_norm)
        )


class DecoderLayer(Layer):
    def __init__(self, config: Seq2SeqConfig, layer: int):
        super().__init__(config)
        self.layer = layer
        self.attention = SelfAttention(config.n_embd, config.n_head, config.attention_dropout, layer)
        self.attention_norm = nn.LayerNorm(config.n_embd, config.layer_norm_eps)
        self.cross_attention = CrossAttention(config)
        self.cross_norm = nn.LayerNorm(config.n_embd, config.layer_norm_eps)

    def forward(self, x: Tensor, memory: Memory, cache: DecoderCache | None = None) -> Tensor:
        held = None if cache is None else cache.memory[self.layer]
        return self.chain(
            x,
            (lambda x: self.attention.decode(x, cache), self.attention_norm),
            (lambda x: self.cross_attention(x, memory, held), self.cross_norm),
            (self.mlp, self.mlp_norm),
        )


class Seq2Seq(Model):
    """The encoder-decoder Transformer.

    Args:
        config: the sizes. Weights are fp32 and drawn as in the paper's code: Xavier-uniform, embeddings from a
            normal of deviation n_embd^-0.5; biases 0, norms 1.
    """

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.tie_embeddings:
            self.source_wte = nn.Embedding(config.source_vocab_size, config.n_embd)
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.positions == "learned":
            self.source_wpe = nn.Embedding(config.context_length, config.n_embd)
            self.target_wpe = nn.Embedding(config.context_length, config.n_embd)
        self.encoder = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.n_encoder_layer))
        self.decoder = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.n_decoder_layer))
        if config.norm_first:
            self.encoder_norm = nn.LayerNorm(config.n_embd, config.layer_norm_eps)
            self.decoder_norm = nn.LayerNorm(config.n_embd, config.layer_norm_eps)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.output_bias else None
        self._draw()

    def _draw(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "wte" in name or "wpe" in name:
                nn.init.normal_(parameter, std=self.config.n_embd**-0.5)
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output projection, (V, C)."""
        return self.wte.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Logits of what follows each target token.

        Args:
            source: (B, S) int64 ids.
            target: (B, T) int64 ids, `start_id` first.
            source_mask: (B, S), nonzero for tokens and 0 for padding; None means where source is not pad_id.

        Returns:
            (B, T, V).

        Raises:
            ValueError: for a wrong rank, dtype or shape, a sequence longer than the context, or (on the CPU
                and outside torch.compile) an id outside the vocabulary.
        """
        return self.logits(self.decode(target, self.encode(source, source_mask)))

    def loss(self, source: Tensor, targets: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats, with the label smoothing of the configuration in training.

        Args:
            source, source_mask: see `forward`.
            targets: (B, T) int64 ids without `start_id`, `end_id` last; pad_id and -100 do not count.

        Raises:
            ValueError: as `forward`.
        """
        c = self.config
        known = targets.masked_fill(targets == IGNORE_INDEX, c.pad_id)
        target = F.pad(known[:, :-1], (1, 0), value=c.start_id)
        hidden = self.decode(target, self.encode(source, source_mask))
        counted = known.masked_fill(known == c.pad_id, IGNORE_INDEX).flatten()
        check_ids("Seq2Seq", "targets", known, c.vocab_size)
        smoothing = c.label_smoothing if self.training else 0.0
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.head_weight, counted, self.output_bias, label_smoothing=smoothing
        )

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Memory:
        """The encoder's states; padding costs nothing. See `forward`."""
        c = self.config
        check_tokens("Seq2Seq", source, c, name="source", vocab_size=c.source_vocab_size)
        if source_mask is None:
            source_mask = source != c.pad_id
        check_same_shape("Seq2Seq", "source_mask", source_mask, "source", source)
        packing = Packing.of(source_mask, (source.shape[0], source.shape[1]))
        table = self.wte if c.tie_embeddings else self.source_wte
        positions = self.source_wpe if c.positions == "learned" else None
        x = packing.pack(self._embed(source, table, positions, 0))
        for layer in self.encoder:
            x = layer(x, packing)
        if c.norm_first:
            x = apply_norm(x, self.encoder_norm)
        mask = None if packing.rows is packing.mask is None else (source_mask != 0)[:, None, None, :]
        return Memory(packing.unpack(x), mask)

    def decode(self, target: Tensor, memory: Memory, cache: DecoderCache | None = None) -> Tensor:
        """Hidden states (R, T, C) of `target` (R, T), which follows what `cache` holds; R is B, or K for each of B."""
        c = self.config
        start = 0 if cache is None else cache.length
        check_tokens("Seq2Seq", target, c, start, name="target")
        x = self._embed(target, self.wte, self.target_wpe if c.positions == "learned" else None, start)
        for layer in self.decoder:
            x = layer(x, memory, cache)
        if cache is not None:
            cache.advance(target.shape[1])
        return apply_norm(x, self.decoder_norm) if c.norm_first else x

    def _embed(self, tokens: Tensor, table: nn.Embedding, positions: nn.Embedding | None, start: int) -> Tensor:
        T, C = tokens.shape[1], self.config.n_embd
        x = table(tokens) * (math.sqrt(C) if self.config.scale_embeddings else 1.0)
        if positions is None:
            x = x + sinusoids(start, T, C, x.device).to(x.dtype)
        else:
            x = x + learned_positions(positions, start, T, x.device)
        return F.dropout(x, self.config.dropout, self.training)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states (..., C) to logits (..., V)."""
        return layer_linear(hidden, self.head_weight, self.output_bias)
