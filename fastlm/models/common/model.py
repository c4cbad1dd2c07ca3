"""What whole models share: how they are drawn and counted, and the forward pass of those that continue text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..._core.dispatch import autocast_dtype
from ...nn._fused import apply_norm, head_loss, norms_within_reach
from ...nn._plain import plain
from ...ops._tied_embedding import tied_embedding
from ...ops.cross_entropy import IGNORE_INDEX
from ...ops.linear_cross_entropy import linear_cross_entropy
from .checks import check_ids, check_same_shape, check_tokens
from .documents import Documents

if TYPE_CHECKING:
    from .cache import KVCache


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products run in: the norms write it, so that autocast has nothing left to cast."""
    return autocast_dtype(x.device.type) or x.dtype


class Model(nn.Module):
    """Base of the models: a `config`, and parameters of its sizes."""

    config: Any
    wte: nn.Embedding

    def num_parameters(self) -> int:
        """Number of trained values; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _initialise(self, residual: tuple[str, ...] = (), residual_std: float = 0.02) -> None:
        """Draw matrices from a normal of deviation 0.02, or `residual_std` where the name ends in one of `residual`.

        Biases are 0; norms stay as they are.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=residual_std if name.endswith(residual) else 0.02)


class CausalLM(Model):
    """A model that continues text: pre-norm blocks over embedded tokens, and a head that may be the embedding.

    A subclass makes `config`, `wte`, its blocks, and `lm_head` unless `config.tie_embeddings`; it has `logits`, and
    `blocks`, which goes through `_through`.
    """

    block: ClassVar[type[nn.Module]]
    lm_head: Any

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output projection, (V, C)."""
        return self.wte.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits, or the mean loss.

        Args:
            tokens: (B, T) int64 ids.
            targets: (B, T) int64 ids that follow each token; -100 leaves a position out of the loss.
            cache: holds the keys and values of the tokens before these, and takes up those of these.
            cu_seqlens: (texts + 1,) int32, where each of several texts in one row begins and, last, T; B is 1, each
                text may be as long as the context, and tokens attend to their own text alone. Without a cache.

        Returns:
            Logits (B, T, V); with `targets`, the mean cross-entropy in nats, a scalar, and the logits are
            never held. The residual stream stays in the parameters' dtype under autocast.

        Raises:
            ValueError: for a wrong rank, dtype or shape, a sequence longer than the context, or (on the
                CPU and outside torch.compile, where looking is free) an id outside the vocabulary.
        """
        if cu_seqlens is not None:
            cache = self._documents(tokens, cache, cu_seqlens)  # type: ignore[assignment]
        if targets is None:
            return self.logits(self.hidden(tokens, cache))
        name = type(self).__name__
        check_same_shape(name, "targets", targets, "tokens", tokens)
        check_ids(name, "targets", targets, self.config.vocab_size, IGNORE_INDEX)
        start = 0 if cache is None else cache.length
        if cu_seqlens is None:
            check_tokens(name, tokens, self.config, start)
        tied = self.config.tie_embeddings
        if tied and plain(self.wte, nn.Embedding):
            rows, head = tied_embedding(self.wte.weight, tokens)
        else:
            rows, head = self.wte(tokens), self.wte.weight
        hidden = self.blocks(rows, start, cache).flatten(0, 1)
        if tied:
            return linear_cross_entropy(hidden, head, targets.flatten())
        return head_loss(hidden, self.lm_head, targets.flatten())

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Output of the last norm, (B, T, C), for int64 `tokens` (B, T); see `forward`."""
        start = 0 if cache is None else cache.length
        if not isinstance(cache, Documents):
            check_tokens(type(self).__name__, tokens, self.config, start)
        return self.blocks(self.wte(tokens), start, cache)

    def _documents(self, tokens: Tensor, cache: KVCache | None, cu_seqlens: Tensor) -> Documents:
        name = type(self).__name__
        if cache is not None:
            raise ValueError(f"{name}: cu_seqlens and a cache are given, expected one of them")
        if tokens.dim() != 2 or tokens.shape[0] != 1:
            raise ValueError(f"{name}: tokens has shape {tuple(tokens.shape)}, expected (1, length) with cu_seqlens")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32:
            raise ValueError(
                f"{name}: cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}, "
                "expected (texts + 1,) and torch.int32"
            )
        check_ids(name, "tokens", tokens, self.config.vocab_size)
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            lengths = cu_seqlens.diff()
            if cu_seqlens[0] or cu_seqlens[-1] != tokens.shape[1] or (lengths < 0).any():
                raise ValueError(f"{name}: cu_seqlens must rise from 0 to the length, {tokens.shape[1]}")
            if lengths.max() > self.config.context_length:
                raise ValueError(
                    f"{name}: cu_seqlens has a text of {int(lengths.max())} tokens, "
                    f"which does not fit the context of {self.config.context_length}"
                )
        return Documents(cu_seqlens, tokens.shape[1])

    def blocks(self, rows: Tensor, start: int, cache: KVCache | None) -> Tensor:
        """From the tokens' embeddings (B, T, C), the first at position `start`, to the last norm's output."""
        raise NotImplementedError

    def outgrows(self, before: int, after: int) -> bool:
        """Whether keys that were cached of `before` tokens are not those of a sequence of `after`."""
        return False

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states (..., C) to logits (..., V)."""
        raise NotImplementedError

    def _through(
        self,
        blocks: nn.ModuleList,
        first_norm: str,
        last: nn.Module,
        x: Tensor,
        cache: KVCache | None,
        *others: Any,
    ) -> Tensor:
        """The residual stream x (B, T, C) through every block, and the `last` norm of it.

        Args:
            first_norm: the blocks' name of the norm that they begin with.
            others: what each block takes besides.
        """
        normed = None
        for block, norm in zip(blocks, norms_within_reach(blocks, self.block, first_norm, last), strict=True):
            normed, x = block(normed, x, norm, *others, cache)
        if cache is not None:
            cache.advance(x.shape[1])
        return apply_norm(x, last, product_dtype(x)) if normed is None else normed
