"""Greedy and beam search with an encoder-decoder model.

Beam search keeps the K likeliest beginnings (Graves 2012; Sutskever et al. 2014). A finished sequence of L
tokens, its end included, scores log p / L^length_penalty. Shapes: B source rows, K beams, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models.common.decoder_cache import DecoderCache

if TYPE_CHECKING:
    from ..models.seq2seq import Memory, Seq2Seq


class Beams(NamedTuple):
    """Result of a beam search, best first.

    Attributes:
        tokens: (B, n_best, L) int64, without start_id; pad_id behind end_id.
        scores: (B, n_best) fp32; -inf where fewer sequences exist.
    """

    tokens: Tensor
    scores: Tensor


def greedy_search(model: Seq2Seq, source: Tensor, max_new_tokens: int, source_mask: Tensor | None = None) -> Tensor:
    """The likeliest token at every step.

    Args:
        model: in evaluation mode for a result without dropout.
        source, source_mask: (B, S), see `Seq2Seq.forward`.
        max_new_tokens: tokens at most, `end_id` included.

    Returns:
        (B, L) int64, without start_id; pad_id behind end_id.

    Raises:
        ConfigError: for a setting out of range.
        ValueError: for a source that the model refuses.
    """
    with torch.inference_mode():
        memory, cache = _begin(model, source, source_mask, 1, max_new_tokens)
        c = model.config
        last = source.new_full((source.shape[0], 1), c.start_id)
        finished = torch.zeros(source.shape[0], dtype=torch.bool, device=source.device)
        tokens: list[Tensor] = []
        while len(tokens) < max_new_tokens and not finished.all():
            new = _log_probabilities(model, last, memory, cache).argmax(-1)
            new = torch.where(finished, c.pad_id, new)
            finished |= new == c.end_id
            tokens.append(new)
            last = new[:, None]
    return torch.stack(tokens, 1).clone()


def beam_search(
    model: Seq2Seq,
    source: Tensor,
    max_new_tokens: int,
    beams: int = 4,
    *,
    length_penalty: float = 1.0,
    n_best: int = 1,
    source_mask: Tensor | None = None,
) -> Beams:
    """The likeliest sequences that `beams` beginnings at a time lead to.

    It ends when no beginning can still beat the worst of K finished sequences, however long it becomes.

    Args:
        model, source, max_new_tokens, source_mask: see `greedy_search`.
        beams: K, beginnings kept at every step.
        length_penalty: 0 compares log-probabilities, 1 their mean over tokens; more favours long sequences.
        n_best: sequences returned for each source row, up to K.

    Raises:
        ConfigError: for a setting out of range.
        ValueError: for a source that the model refuses.
    """
    if beams < 1:
        raise ConfigError(f"beams is {beams}, expected at least 1")
    if not 1 <= n_best <= beams:
        raise ConfigError(f"n_best is {n_best}, expected 1 to the {beams} beams")
    if not math.isfinite(length_penalty):
        raise ConfigError(f"length_penalty is {length_penalty}, expected a finite number")
    with torch.inference_mode():
        memory, cache = _begin(model, source, source_mask, beams, max_new_tokens)
        search = _Search(model, source, beams, max_new_tokens, length_penalty)
        while not search.over():
            log_p = _log_probabilities(model, search.last(), memory, cache)
            cache.reorder(search.step(log_p.view(source.shape[0], beams, -1)))
    length = max(1, int((search.finished[:, :n_best] != model.config.pad_id).any(1).any(0).sum()))
    return Beams(search.finished[:, :n_best, :length].clone(), search.scores[:, :n_best].clone())


class _Search:
    """K running beginnings and the K best finished sequences of every source row."""

    def __init__(self, model: Seq2Seq, source: Tensor, beams: int, max_new_tokens: int, length_penalty: float):
        c, B = model.config, source.shape[0]
        self.end_id, self.start_id = c.end_id, c.start_id
        self.max_new_tokens, self.length_penalty = max_new_tokens, length_penalty
        self.length = 0
        self.running = source.new_full((B, beams, max_new_tokens), c.pad_id)
        self.finished = self.running.clone()
        self.scores = torch.full((B, beams), -math.inf, device=source.device)
        self.log_p = self.scores.clone()  # of the running beginnings
        self.log_p[:, 0] = 0.0  # all are the same at first: one of them counts

    def last(self) -> Tensor:
        """The last token of each row, (B K, 1)."""
        if not self.length:
            return self.running.new_full((self.log_p.numel(), 1), self.start_id)
        return self.running[:, :, self.length - 1].reshape(-1, 1)

    def step(self, log_p: Tensor) -> Tensor:
        """Take log-probabilities (B, K, V) of the next tokens; return which row each row continues."""
        _, K, V = log_p.shape
        self.length += 1
        # A beginning has one end, so 2 K candidates hold at least K that go on.
        candidates, ids = (self.log_p[:, :, None] + log_p).flatten(1).topk(min(2 * K, K * V))
        parents, tokens = ids // V, ids % V
        sequences = self.running.gather(1, parents[:, :, None].expand(-1, -1, self.max_new_tokens))
        sequences[:, :, self.length - 1] = tokens
        ended = tokens == self.end_id
        self._finish(candidates[:, :K], sequences[:, :K], ended[:, :K] | (self.length == self.max_new_tokens))
        self.log_p, order = candidates.masked_fill(ended, -math.inf).topk(K)
        self.running = sequences.gather(1, order[:, :, None].expand(-1, -1, self.max_new_tokens))
        return DecoderCache.rows_of(parents.gather(1, order))

    def _finish(self, log_p: Tensor, sequences: Tensor, ended: Tensor) -> None:
        scores = (log_p / self.length**self.length_penalty).masked_fill(~ended, -math.inf)
        self.scores, best = torch.cat([self.scores, scores], 1).topk(self.scores.shape[1])
        every = torch.cat([self.finished, sequences], 1)
        self.finished = every.gather(1, best[:, :, None].expand(-1, -1, self.max_new_tokens))

    def over(self) -> bool:
        if self.length == self.max_new_tokens:
            return True
        # log p only falls. Its mean is largest over the most tokens, or with a negative penalty over the fewest.
        longest = self.max_new_tokens if self.length_penalty > 0 else self.length + 1
        hoped = self.log_p[:, 0] / longest**self.length_penalty
        return bool((hoped <= self.scores[:, -1]).all())


def _begin(
    model: Seq2Seq, source: Tensor, source_mask: Tensor | None, beams: int, max_new_tokens: int
) -> tuple[Memory, DecoderCache]:
    if not 1 <= max_new_tokens <= model.config.context_length:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}, expected 1 to the context of {model.config.context_length}"
        )
    memory = model.encode(source, source_mask)
    return memory, DecoderCache(model, memory, beams, max_new_tokens)


def _log_probabilities(model: Seq2Seq, last: Tensor, memory: Memory, cache: DecoderCache) -> Tensor:
    """Of the token after `last` (R, 1): (R, V) fp32; padding is never drawn."""
    log_p = model.logits(model.decode(last, memory, cache)[:, -1]).float().log_softmax(-1)
    if model.config.pad_id != model.config.end_id:
        log_p[:, model.config.pad_id] = -math.inf
    return log_p
