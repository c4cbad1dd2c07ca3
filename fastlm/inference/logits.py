"""What a folder's generation settings do to the logits before a token is chosen.

A processor takes the tokens so far (R, L), int64, and the scores of the next one (R, V), fp32, and returns scores.
Names, order and results are those of transformers 5's `generate`, whose `LogitsProcessor`s are the reference of the
tests. Scores are logits where one sequence is followed, and log-probabilities in beam search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..models.common.generation import Settings

Processor = Callable[[Tensor, Tensor], Tensor]


class Span(NamedTuple):
    """Lengths of one call, in tokens of the sequence that grows: of what is there first, and at most in the end."""

    begin: int
    longest: int


def processors(settings: Settings, ends: Sequence[int], span: Span, source: Tensor | None = None) -> list[Processor]:
    """The processors that `settings` ask for, in the order in which they apply.

    Args:
        settings: of the model's folder and of the call.
        ends: ids that end a sequence.
        span: lengths of this call.
        source: (B, S) ids that an encoder has read; each belongs to R / B rows.
    """
    s, made = settings, list[Processor]()
    if s.sequence_bias:
        made.append(lambda tokens, scores: _biased(tokens, scores, s.sequence_bias))
    if s.encoder_repetition_penalty != 1 and source is not None:
        made.append(lambda tokens, scores: _penalized(_rows(source, scores), scores, 1 / s.encoder_repetition_penalty))
    if s.repetition_penalty != 1:
        made.append(lambda tokens, scores: _penalized(tokens, scores, s.repetition_penalty))
    if n := s.no_repeat_ngram_size:
        made.append(lambda tokens, scores: _without_repeats(tokens, tokens, scores, n))
    if (m := s.encoder_no_repeat_ngram_size) and source is not None:
        made.append(lambda tokens, scores: _without_repeats(_rows(source, scores), tokens, scores, m))
    if s.bad_words_ids:
        banned = [(word, -math.inf) for word in s.bad_words_ids if len(word) > 1 or word[0] not in ends]
        made.append(lambda tokens, scores: _biased(tokens, scores, banned))
    if (shortest := s.shortest(span.begin)) and ends:
        made.append(lambda tokens, scores: _without(scores, ends) if tokens.shape[1] < shortest else scores)
    if s.forced_bos_token_id is not None:
        made.append(_at(1, _only, (s.forced_bos_token_id,)))
    if s.forced_eos_token_id is not None:
        made.append(_at(span.longest - 1, _only, s.forced_eos_token_id))
    if s.remove_invalid_values:
        largest = torch.finfo(torch.float32).max
        made.append(lambda tokens, scores: scores.nan_to_num(0.0, posinf=largest, neginf=-largest))
    if s.exponential_decay_length_penalty is not None and ends:
        start, factor = s.exponential_decay_length_penalty
        made.append(lambda tokens, scores: _hastened(tokens, scores, ends, span.begin + start, factor))
    if s.suppress_tokens:
        made.append(lambda tokens, scores: _without(scores, s.suppress_tokens))
    if s.begin_suppress_tokens:
        # A forced first token is not the beginning that is meant.
        forced = span.begin == 1 and s.forced_bos_token_id is not None
        made.append(_at(span.begin + forced, _without, s.begin_suppress_tokens))
    if s.renormalize_logits:
        made.append(lambda tokens, scores: scores.log_softmax(-1))
    return made


def _at(length: int, change: Callable[[Tensor, Sequence[int]], Tensor], ids: Sequence[int]) -> Processor:
    """A change where so many tokens are there."""
    return lambda tokens, scores: change(scores, ids) if tokens.shape[1] == length else scores


def apply(made: Sequence[Processor], tokens: Tensor, scores: Tensor) -> Tensor:
    """Scores after every processor."""
    for process in made:
        scores = process(tokens, scores)
    return scores


def _rows(source: Tensor, scores: Tensor) -> Tensor:
    return source.repeat_interleave(scores.shape[0] // source.shape[0], 0)


def _inside(ids: Sequence[int], scores: Tensor) -> Tensor:
    """Those of `ids` that have a score."""
    return torch.tensor([token for token in ids if 0 <= token < scores.shape[1]], device=scores.device).long()


def _without(scores: Tensor, ids: Sequence[int]) -> Tensor:
    return scores.index_fill(1, _inside(ids, scores), -math.inf)


def _only(scores: Tensor, ids: Sequence[int]) -> Tensor:
    return torch.full_like(scores, -math.inf).index_fill(1, _inside(ids, scores), 0.0)


def _penalized(seen: Tensor, scores: Tensor, penalty: float) -> Tensor:
    """Keskar et al. 2019, "CTRL": scores of ids that were there before move away from 0, or down to it."""
    old = scores.gather(1, seen)
    return scores.scatter(1, seen, torch.where(old < 0, old * penalty, old / penalty))


def _without_repeats(seen: Tensor, tokens: Tensor, scores: Tensor, n: int) -> Tensor:
    """No id that would end an n-gram of `seen` once more."""
    if min(seen.shape[1], tokens.shape[1] + 1) < n:
        return scores
    ngrams = seen.unfold(1, n, 1)
    met = (ngrams[..., :-1] == tokens[:, None, tokens.shape[1] + 1 - n :]).all(-1)
    spare = scores.shape[1]  # a column past the vocabulary for n-grams that do not begin so
    banned = scores.new_zeros(scores.shape[0], spare + 1, dtype=torch.bool)
    banned.scatter_(1, ngrams[..., -1].masked_fill(~met, spare), True)
    return scores.masked_fill(banned[:, :spare], -math.inf)


def _biased(tokens: Tensor, scores: Tensor, biases: Sequence[tuple[Sequence[int], float]]) -> Tensor:
    """A bias on the last id of each sequence of ids whose others have just been."""
    total = torch.zeros_like(scores)
    for (*before, last), bias in biases:
        if len(before) <= tokens.shape[1] and 0 <= last < scores.shape[1]:
            met = (tokens[:, tokens.shape[1] - len(before) :] == tokens.new_tensor(before)).all(1)
            total[:, last] += torch.where(met, bias, 0.0)
    return scores + total


def _hastened(tokens: Tensor, scores: Tensor, ends: Sequence[int], start: int, factor: float) -> Tensor:
    """Ends gain by a factor that grows with every token after `start`."""
    late = tokens.shape[1] - start
    if late <= 0:
        return scores
    columns = _inside(ends, scores)
    old = scores[:, columns]
    gain = (old.abs() * (factor**late - 1)).masked_fill(~old.isfinite(), 0.0)
    return scores.index_copy(1, columns, old + gain)
