"""BERT and RoBERTa on fastlm's fused ops, without spending anything on padding.

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"; Liu et
al. 2019, "RoBERTa". Post-norm encoder layers: every LayerNorm takes in the residual addition before it.
Shapes: B batch, T length, N tokens that are no padding, C = n_embd, H = n_head, D = C / H, V = vocab_size.

Padding is dropped at the input (Zeng et al. 2022, "Boosting Distributed Training Performance of the Unpadded
BERT Model"): layers see (N, C) packed tokens, and attention is told where each sequence begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn._fused import apply_norm, linear_gelu, residual_chain
from ..nn._plain import plain
from ..nn.linear import Linear
from ..ops.cross_entropy import IGNORE_INDEX, cross_entropy
from ..ops.linear import layer_linear
from ..ops.linear_cross_entropy import linear_cross_entropy
from .common.attention import SelfAttention
from .common.checks import check_ids, check_same_shape, check_tokens
from .common.config import ModelConfig
from .common.model import Model
from .common.positions import learned_positions
from .common.unpad import Packing

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
HEADS = ("none", "masked-lm", "pretraining", "classification")


@dataclass(frozen=True)
class BERTConfig(ModelConfig):
    """The sizes and rates that define a BERT.

    Attributes:
        vocab_size, context_length, n_layer, n_head, n_embd: sizes; n_head divides n_embd.
        n_inner: hidden size of the MLP; None means 4 n_embd.
        n_token_type: segments that a token can belong to.
        dropout, attention_dropout, head_dropout: rates on embeddings and residual branches, on the attention
            weights, and before a classification head (None means `dropout`).
        layer_norm_eps: added to the variance in every LayerNorm.
        activation: "none" for the exact GELU, "tanh" for its approximation.
        head: what stands on the encoder: "none" (hidden states), "masked-lm", "pretraining" (masked-lm and
            next sentence) or "classification".
        n_class: classes of a classification head; 1 for regression.
        labels: their names; None where nobody has said.
        problem_type: what a classification head tells: "single_label_classification", "multi_label_classification" or
            "regression"; None means the first, or the last for one class.
        pooler: whether the first token's hidden state has a layer of its own (the next-sentence and
            classification heads of BERT need it; RoBERTa's classification head brings its own).
        position_offset: 0 for BERT. RoBERTa counts its positions from 2 on, those without padding only.
        tie_decoder: whether the masked-lm head's output weight is the token embedding.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    families: ClassVar[tuple[str, ...]] = ("bert", "roberta", "xlm-roberta")

    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int = None  # type: ignore[assignment]  # resolved below
    n_token_type: int = 2
    dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float | None = None
    layer_norm_eps: float = 1e-12
    activation: str = "none"
    head: str = "masked-lm"
    n_class: int = 2
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    pooler: bool = False
    position_offset: int = 0
    tie_decoder: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_inner is None and isinstance(self.n_embd, int):
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        self._check_sizes(
            "vocab_size", "context_length", "n_layer", "n_head", "n_embd", "n_inner", "n_token_type", "n_class"
        )
        self._check_multiple("n_embd", "n_head")
        self._check_rates("dropout", "attention_dropout")
        if self.head_dropout is not None:
            self._check_rates("head_dropout")
        self._check_positive("layer_norm_eps")
        self._check_choice("activation", ("none", "tanh"))
        self._check_choice("head", HEADS)
        self._check_choice("problem_type", (None, *PROBLEM_TYPES))
        if self.labels is not None:
            texts = isinstance(self.labels, (list, tuple)) and all(isinstance(name, str) for name in self.labels)
            if not texts or len(self.labels) != self.n_class:
                self._refuse("labels", f"{self.n_class} texts")
            object.__setattr__(self, "labels", tuple(self.labels))
        self._check_sizes("position_offset", low=0)
        self._check_flags("pooler", "tie_decoder")
        if self.head in ("pretraining", "classification") and not self.pooler:
            self._refuse("pooler", f"true for the head {self.head}")


class BERTLayer(nn.Module):
    def __init__(self, config: BERTConfig):
        super().__init__()
        self.dropout, self.activation = config.dropout, config.activation
        self.attention = SelfAttention(config.n_embd, config.n_head, config.attention_dropout)
        self.attention_norm = nn.LayerNorm(config.n_embd, config.layer_norm_eps)
        self.up = Linear(config.n_embd, config.n_inner)
        self.down = Linear(config.n_inner, config.n_embd)
        self.mlp_norm = nn.LayerNorm(config.n_embd, config.layer_norm_eps)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        attention = (lambda x: self.attention(x, packing)), dropout, self.attention_norm
        return residual_chain(x, (attention, (self.mlp, dropout, self.mlp_norm)), norm_first=False)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(linear_gelu(x, self.up, self.activation))


class MaskedLMHead(nn.Module):
    """Dense layer, GELU, LayerNorm, then the vocabulary, whose weight is the token embedding where that is tied."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.activation = config.activation
        self.dense = Linear(config.n_embd, config.n_embd)
        self.norm = nn.LayerNorm(config.n_embd, config.layer_norm_eps)
        self.decoder = None if config.tie_decoder else Linear(config.n_embd, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        """Logits (..., V) by the token embedding `table`, if that is tied; else what makes them, (..., C)."""
        states = apply_norm(linear_gelu(hidden, self.dense, self.activation), self.norm)
        if table is None:
            return states
        if self.decoder is None or plain(self.decoder, Linear):
            return layer_linear(states, table if self.decoder is None else self.decoder.weight, self.bias)
        return self.decoder(states) + self.bias


def _counted(targets: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """(B, T) -> places (N,) among the packed tokens of those that have a target, and these targets (N,)."""
    flat = packing.pack(targets)
    if packing.mask is not None:
        flat = flat.masked_fill(~packing.mask.flatten(), IGNORE_INDEX)
    counted = (flat != IGNORE_INDEX).nonzero().squeeze(1)
    return counted, flat[counted]


class BERT(Model):
    """BERT: token, position and segment embeddings, post-norm encoder layers, and the heads that it was trained with.

    Args:
        config: the sizes. Weights and embeddings are fp32 draws of a normal of deviation 0.02; biases 0, norms 1.
    """

    head_modules = ("masked_lm", "next_sentence", "classifier")

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length + config.position_offset, config.n_embd)
        self.wse = nn.Embedding(config.n_token_type, config.n_embd)
        self.embedding_norm = nn.LayerNorm(config.n_embd, config.layer_norm_eps)
        self.layers = nn.ModuleList(BERTLayer(config) for _ in range(config.n_layer))
        if config.pooler:
            self.pooler = Linear(config.n_embd, config.n_embd)
        if config.head in ("masked-lm", "pretraining"):
            self.masked_lm = MaskedLMHead(config)
        if config.head == "pretraining":
            self.next_sentence = Linear(config.n_embd, 2)
        if config.head == "classification":
            self.classifier = Linear(config.n_embd, config.n_class)
        self._initialise()

    @property
    def head_weight(self) -> Tensor:
        """Weight of the masked-lm head's output projection, (V, C)."""
        decoder = self.masked_lm.decoder
        return self.wte.weight if decoder is None else decoder.weight

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Hidden states, or what the head makes of them.

        Args:
            tokens: (B, T) int64 ids.
            attention_mask: (B, T), nonzero for tokens and 0 for padding, on either side or in between;
                None where there is no padding.
            token_types: (B, T) int64 segments; None means 0.

        Returns:
            By `config.head`: hidden states (B, T, C); masked-lm logits (B, T, V), also of a pretraining head,
            whose `next_sentence_logits` are a method of their own; class logits (B, n_class). Padding has hidden
            states and logits of 0.

        Raises:
            ValueError: for a wrong rank, dtype or shape, a sequence longer than the context, or (on the CPU
                and outside torch.compile) an id out of range.
        """
        hidden, packing = self.encode(tokens, attention_mask, token_types)
        if self.config.head == "none":
            return packing.unpack(hidden)
        if self.config.head == "classification":
            return self.class_logits(self.pooled(hidden, packing))
        return packing.unpack(self.masked_lm(hidden, self.wte.weight))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
        next_sentence: Tensor | None = None,
    ) -> Tensor:
        """Mean loss in training, in nats.

        Args:
            tokens, attention_mask, token_types: see `forward`.
            targets: with a masked-lm or pretraining head (B, T) int64 ids, -100 for positions that do not count:
                only those that do reach the vocabulary. With a classification head (B,) int64 classes, or
                numbers to be regressed on; of several labels (B, n_class), 1 for those that are there.
            next_sentence: with a pretraining head (B,) int64, 0 where the second segment follows the first; its
                loss is added.

        Raises:
            ValueError: as `forward`; for targets that do not fit; for a model without a head.
        """
        hidden, packing = self.encode(tokens, attention_mask, token_types)
        if self.config.head == "none":
            raise ValueError("BERT: loss needs a head, and config.head is none")
        if self.config.head == "classification":
            return self._classification_loss(self.class_logits(self.pooled(hidden, packing)), targets)
        check_same_shape("BERT", "targets", targets, "tokens", tokens)
        check_ids("BERT", "targets", targets, self.config.vocab_size, IGNORE_INDEX)
        counted, found = _counted(targets, packing)
        if plain(self.masked_lm, MaskedLMHead) and (self.config.tie_decoder or plain(self.masked_lm.decoder, Linear)):
            states = self.masked_lm(hidden[counted])
            loss = linear_cross_entropy(states, self.head_weight, found, self.masked_lm.bias)
        else:
            loss = cross_entropy(self.masked_lm(hidden[counted], self.wte.weight), found)
        if next_sentence is not None:
            logits = self.next_sentence_logits(self.pooled(hidden, packing))
            loss = loss + F.cross_entropy(logits, next_sentence)
        return loss

    def masked_logits(
        self,
        tokens: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of the positions that have a target, (N, V), and these targets, (N,), in the order of the batch.

        Args:
            tokens, targets, attention_mask, token_types: as of `loss`, with a masked-lm or pretraining head.
        """
        hidden, packing = self.encode(tokens, attention_mask, token_types)
        check_same_shape("BERT", "targets", targets, "tokens", tokens)
        counted, found = _counted(targets, packing)
        return self.masked_lm(hidden[counted], self.wte.weight), found

    def encode(
        self, tokens: Tensor, attention_mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> tuple[Tensor, Packing]:
        """Hidden states of the tokens that are no padding, (N, C), and where they come from."""
        self._check(tokens, attention_mask, token_types)
        packing = Packing.of(attention_mask, (tokens.shape[0], tokens.shape[1]))
        x = self.wte(packing.pack(tokens)) + self.positions(tokens, attention_mask, packing)
        if token_types is None and plain(self.wse, nn.Embedding):
            x = x + self.wse.weight[0]
        else:
            x = x + self.wse(packing.pack(torch.zeros_like(tokens) if token_types is None else token_types))
        x = F.dropout(apply_norm(x, self.embedding_norm), self.config.dropout, self.training)
        for layer in self.layers:
            x = layer(x, packing)
        return x, packing

    def positions(self, tokens: Tensor, attention_mask: Tensor | None, packing: Packing) -> Tensor:
        """Position embeddings of the packed tokens, (N, C)."""
        T = tokens.shape[1]
        offset = self.config.position_offset
        if attention_mask is not None and offset:
            columns = (attention_mask != 0).long().cumsum(1) - 1
        elif packing.rows is None and plain(self.wpe, nn.Embedding):
            return learned_positions(self.wpe, offset, T, tokens.device).repeat(tokens.shape[0], 1)
        else:
            columns = torch.arange(T, device=tokens.device).expand_as(tokens)
        return self.wpe(packing.pack(columns + offset))

    def pooled(self, hidden: Tensor, packing: Packing) -> Tensor:
        """tanh of a layer on the first token's hidden state, (B, C), from what `encode` returns."""
        return torch.tanh(self.pooler(packing.first(hidden)))

    def next_sentence_logits(self, pooled: Tensor) -> Tensor:
        """(B, C) from `pooled` -> (B, 2): class 0 says that the second segment follows the first."""
        return self.next_sentence(pooled)

    def class_logits(self, pooled: Tensor) -> Tensor:
        """(B, C) from `pooled` -> (B, n_class)."""
        rate = self.config.dropout if self.config.head_dropout is None else self.config.head_dropout
        return self.classifier(F.dropout(pooled, rate, self.training))

    def _classification_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        problem = self.config.problem_type or ("regression" if self.config.n_class == 1 else PROBLEM_TYPES[0])
        wanted = logits.shape if problem == "multi_label_classification" else logits.shape[:1]
        if targets.shape != wanted:
            raise ValueError(f"BERT: targets has shape {tuple(targets.shape)}, expected {tuple(wanted)}")
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
        if problem == "regression":
            return F.mse_loss(logits.squeeze(1), targets.to(logits.dtype))
        return F.cross_entropy(logits, targets)

    def _check(self, tokens: Tensor, attention_mask: Tensor | None, token_types: Tensor | None) -> None:
        check_tokens("BERT", tokens, self.config)
        if attention_mask is not None:
            check_same_shape("BERT", "attention_mask", attention_mask, "tokens", tokens)
        if token_types is not None:
            check_same_shape("BERT", "token_types", token_types, "tokens", tokens)
            check_ids("BERT", "token_types", token_types, self.config.n_token_type)
