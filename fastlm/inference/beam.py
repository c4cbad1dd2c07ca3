"""Greedy and beam search with an encoder-decoder model.

Beam search keeps the K likeliest beginnings (Graves 2012; Sutskever et al. 2014). A finished sequence of L
tokens, its end included, scores log p / L^length_penalty. Sequences and scores are those of transformers 5's
`generate`, and so are the rules for when to stop. Shapes: B source rows, K beams, V vocabulary.

What the folder of a loaded model says (`model.generation`) holds where an argument is None, and its penalties,
forbidden and forced tokens and shortest lengths always hold. What is said and cannot be followed, such as sampling, is
listed in one UserWarning.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models.common.decoder_cache import DecoderCache
from ..models.common.generation import FEW_TOKENS, Generation, generation_of
from .logits import Processor, Span, apply, processors

if TYPE_CHECKING:
    from ..models.seq2seq import Memory, Seq2Seq

EarlyStopping = bool | Literal["never"]

FEW_BEAMS = 4
# transformers takes it for minus infinity: a sum that holds it is behind every other, and still ordered.
FAR_BEHIND = -1.0e9


class Beams(NamedTuple):
    """Result of a beam search, best first.

    Attributes:
        tokens: (B, n_best, L) int64, without start_id; pad_id behind the end.
        scores: (B, n_best) fp32; -inf where fewer sequences exist.
    """

    tokens: Tensor
    scores: Tensor


class _Rules(NamedTuple):
    """What one call goes by."""

    start: int
    pad: int
    ends: Tensor
    max_new_tokens: int
    changes: list[Processor]


def greedy_search(
    model: Seq2Seq, source: Tensor, max_new_tokens: int | None = None, source_mask: Tensor | None = None
) -> Tensor:
    """The likeliest token at every step.

    Args:
        model: in evaluation mode for a result without dropout.
        source, source_mask: (B, S), see `Seq2Seq.forward`.
        max_new_tokens: tokens at most, the end included; None takes the folder's, or else 20.

    Returns:
        (B, L) int64, without start_id; pad_id behind the end.

    Raises:
        ConfigError: for a setting out of range.
        ValueError: for a source that the model refuses.
    """
    said = generation_of(model)
    said.warn_of_unfollowed("greedy_search", do_sample=(False,))
    rules = _rules(model, said, source, max_new_tokens)
    with torch.inference_mode():
        memory, cache = _begin(model, source, source_mask, 1, rules)
        tokens = source.new_full((source.shape[0], 1), rules.start)
        finished = torch.zeros(source.shape[0], dtype=torch.bool, device=source.device)
        while tokens.shape[1] <= rules.max_new_tokens and not finished.all():
            logits = _logits(model, tokens[:, -1:], memory, cache)
            new = apply(rules.changes, tokens, logits).argmax(-1)
            new = torch.where(finished, rules.pad, new)
            finished |= torch.isin(new, rules.ends)
            tokens = torch.cat([tokens, new[:, None]], 1)
    return tokens[:, 1:].clone()


def beam_search(
    model: Seq2Seq,
    source: Tensor,
    max_new_tokens: int | None = None,
    beams: int | None = None,
    *,
    length_penalty: float | None = None,
    n_best: int | None = None,
    source_mask: Tensor | None = None,
    early_stopping: EarlyStopping | None = None,
) -> Beams:
    """The likeliest sequences that `beams` beginnings at a time lead to.

    Args:
        model, source, max_new_tokens, source_mask: see `greedy_search`.
        beams: K, beginnings kept at every step; None takes the folder's, or else 4.
        length_penalty: 0 compares log-probabilities, 1 their mean over tokens; more favours long sequences. None takes
            the folder's, or else 1.
        n_best: sequences returned for each source row, up to K; None takes the folder's, or else 1.
        early_stopping: when a row ends. True: at K finished sequences. "never": when no beginning can still beat the
            worst of these, however long it becomes. False: when none would if it ended now, which may miss a better
            one. None takes the folder's, or else False.

    Raises:
        ConfigError: for a setting out of range.
        ValueError: for a source that the model refuses.
    """
    said = generation_of(model)
    s = said.settings
    beams = _given(beams, s.num_beams if said.said.get("num_beams") else FEW_BEAMS)
    n_best = _given(n_best, s.num_return_sequences)
    length_penalty = _given(length_penalty, s.length_penalty)
    early_stopping = _given(early_stopping, s.early_stopping)
    _check(beams, n_best, length_penalty, early_stopping)
    said.warn_of_unfollowed("beam_search", do_sample=(False,))
    rules = _rules(model, said, source, max_new_tokens)
    with torch.inference_mode():
        memory, cache = _begin(model, source, source_mask, beams, rules)
        search = _Search(rules, source, beams, length_penalty, early_stopping)
        while not search.over:
            tokens = search.tokens()
            log_p = _logits(model, tokens[:, -1:], memory, cache).log_softmax(-1)
            log_p = apply(rules.changes, tokens, log_p)
            cache.reorder(search.step(log_p.view(source.shape[0], beams, -1)))
    length = int(search.lengths[:, :n_best].max())
    scores = search.scores.masked_fill(search.lengths == 0, -math.inf)
    return Beams(search.finished[:, :n_best, :length].clone(), scores[:, :n_best].clone())


class _Search:
    """K running beginnings and the K best finished sequences of every source row."""

    def __init__(self, rules: _Rules, source: Tensor, beams: int, length_penalty: float, early_stopping: EarlyStopping):
        B, self.rules = source.shape[0], rules
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.length, self.over = 0, False
        self.running = source.new_full((B, beams, rules.max_new_tokens), rules.pad)
        self.finished = self.running.clone()
        self.lengths = source.new_zeros(B, beams)  # of the finished sequences; 0 where there is none yet
        self.scores = torch.full((B, beams), FAR_BEHIND, device=source.device)
        self.log_p = self.scores.clone()  # of the running beginnings
        self.log_p[:, 0] = 0.0  # all are the same at first: one of them counts
        self.hopeful = torch.ones(B, 1, dtype=torch.bool, device=source.device)  # rows that may still improve

    def tokens(self) -> Tensor:
        """The running beginnings with what they begin with, (B K, 1 + length)."""
        begun = self.running[:, :, : self.length].flatten(0, 1)
        return torch.nn.functional.pad(begun, (1, 0), value=self.rules.start)

    def step(self, log_p: Tensor) -> Tensor:
        """Take log-probabilities (B, K, V) of the next tokens; return which row each row continues."""
        _, K, V = log_p.shape
        self.length += 1
        # A beginning has as many ends as there are ids that end it; so K of these candidates go on.
        among = max(2, 1 + len(self.rules.ends)) * K
        candidates, ids = (self.log_p[:, :, None] + log_p).flatten(1).topk(min(among, K * V))
        parents, tokens = ids // V, ids % V
        sequences = _rows_of(self.running, parents)
        sequences[:, :, self.length - 1] = tokens
        ended = torch.isin(tokens, self.rules.ends) | (self.length == self.rules.max_new_tokens)
        going_on = candidates + FAR_BEHIND * ended
        order = going_on.topk(K).indices
        self._finish(candidates, sequences, ended)
        self.running, self.log_p = _rows_of(sequences, order), going_on.gather(1, order)
        self.over = self._is_over(ended)
        return DecoderCache.rows_of(parents.gather(1, order))

    def _finish(self, log_p: Tensor, sequences: Tensor, ended: Tensor) -> None:
        """Put sequences that have ended and are among the K likeliest where they beat the finished ones."""
        K = self.scores.shape[1]
        ended = ended.clone()
        ended[:, K:] = False
        full = (self.lengths > 0).all(1, keepdim=True) & (self.early_stopping is True)
        scores = log_p / self.length**self.length_penalty
        for unwanted in (full, ~self.hopeful, ~ended):
            scores = scores + FAR_BEHIND * unwanted
        self.scores, best = torch.cat([self.scores, scores], 1).topk(K)
        self.finished = _rows_of(torch.cat([self.finished, sequences], 1), best)
        self.lengths = torch.cat([self.lengths, self.length * ended], 1).gather(1, best)

    def _is_over(self, ended: Tensor) -> bool:
        longest = self.early_stopping == "never" and self.length_penalty > 0
        length = self.rules.max_new_tokens if longest else self.length
        hoped = self.log_p[:, :1] / length**self.length_penalty
        worst = torch.where(self.lengths > 0, self.scores.amin(1, keepdim=True), FAR_BEHIND)
        self.hopeful &= (hoped > worst).any(1, keepdim=True)
        full = self.early_stopping is True and bool((self.lengths > 0).all())
        return full or not self.hopeful.any() or bool(ended.all())


def _rows_of(sequences: Tensor, order: Tensor) -> Tensor:
    return sequences.gather(1, order[:, :, None].expand(-1, -1, sequences.shape[2]))


def _given(value, default):
    return default if value is None else value


def _check(beams: int, n_best: int, length_penalty: float, early_stopping: EarlyStopping) -> None:
    if beams < 1:
        raise ConfigError(f"beams is {beams}, expected at least 1")
    if not 1 <= n_best <= beams:
        raise ConfigError(f"n_best is {n_best}, expected 1 to the {beams} beams")
    if not math.isfinite(length_penalty):
        raise ConfigError(f"length_penalty is {length_penalty}, expected a finite number")
    if early_stopping not in (True, False, "never"):
        raise ConfigError(f"early_stopping is {early_stopping!r}, expected True, False or 'never'")


def _rules(model: Seq2Seq, said: Generation, source: Tensor, max_new_tokens: int | None) -> _Rules:
    c = model.config
    if max_new_tokens is None:
        max_new_tokens = _given(said.settings.new_tokens(1), FEW_TOKENS)
    if not 1 <= max_new_tokens <= c.context_length:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected 1 to the context of {c.context_length}")
    start = _given(said.token("decoder_start_token_id"), c.start_id)
    pad = _given(said.token("pad_token_id"), c.pad_id)
    ends = said.ends(c.vocab_size) or (c.end_id,)
    settings = said.settings
    if pad not in ends:  # padding is never drawn, unless it is how a sequence ends
        settings = dataclasses.replace(settings, suppress_tokens=(*settings.suppress_tokens, pad))
    changes = processors(settings, ends, Span(1, 1 + max_new_tokens), source)
    return _Rules(start, pad, source.new_tensor(ends), max_new_tokens, changes)


def _begin(
    model: Seq2Seq, source: Tensor, source_mask: Tensor | None, beams: int, rules: _Rules
) -> tuple[Memory, DecoderCache]:
    memory = model.encode(source, source_mask)
    return memory, DecoderCache(model, memory, beams, rules.max_new_tokens)


def _logits(model: Seq2Seq, last: Tensor, memory: Memory, cache: DecoderCache) -> Tensor:
    """Of the token after `last` (R, 1): (R, V) fp32."""
    return model.logits(model.decode(last, memory, cache)[:, -1]).float()
