"""Texts' ids between the special tokens that a model of BERT's kind expects, cut where they are too long."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError
from .library import special_names
from .tokenizer import Tokenizer

TRUNCATIONS = ("end", "start", "middle", "drop", "refuse")


def special_token_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Ids of every special token, (tokens,) in order."""
    backend = tokenizer._backend
    return np.unique(np.array([backend.token_to_id(name) for name in special_names(backend)], np.int64))


def cut_to(ids: np.ndarray, room: int, truncation: str) -> np.ndarray:
    """The ids, or `room` of them: without what is at the "end", at the "start", or in the "middle"."""
    if len(ids) <= room:
        return ids
    if truncation == "start":
        return ids[len(ids) - room :]
    if truncation == "middle":
        head = (room + 1) // 2
        return np.concatenate([ids[:head], ids[len(ids) - (room - head) :]])
    return ids[:room]


class Framed(NamedTuple):
    """One or two texts as a model sees them.

    Attributes:
        tokens: (T,) int64 ids with the special ones.
        types: (T,) int64, 0 for the first text and 1 for the second.
    """

    tokens: np.ndarray
    types: np.ndarray


class Frame:
    """[CLS] text [SEP], or [CLS] text [SEP] pair [SEP].

    Args:
        tokenizer: with the special tokens of "masked".
        most_tokens: of a framed example.
        truncation: one of "end", "start" and "middle".
        double: two separators between the texts, as RoBERTa has them, and one type of tokens.

    Raises:
        DataError: the tokenizer lacks a special token.
        ConfigError: if no room is left for a text.
    """

    def __init__(self, tokenizer: Tokenizer, most_tokens: int, truncation: str = "end", double: bool = False):
        found = tokenizer.special_ids("masked")
        self.start, self.end = found["start"], found["end"]
        self.most_tokens, self.truncation, self.double = most_tokens, truncation, double
        if most_tokens < 6:
            raise ConfigError(f"context_length is {most_tokens}, expected at least 6: special tokens take up to 4")

    def room(self, pair: bool) -> int:
        """Tokens that are left for the text or, together, both."""
        return self.most_tokens - (3 + self.double if pair else 2)

    def fits(self, text: np.ndarray, pair: np.ndarray | None = None) -> bool:
        """Whether nothing would be cut."""
        return len(text) + (0 if pair is None else len(pair)) <= self.room(pair is not None)

    def __call__(self, text: np.ndarray, pair: np.ndarray | None = None) -> Framed:
        """Frame one or two texts' ids; of two that are too long the longer one is cut first."""
        room = self.room(pair is not None)
        if pair is None:
            text = cut_to(text, room, self.truncation)
            parts: list[Any] = [[self.start], text, [self.end]]
            first = len(text) + 2
        else:
            text = cut_to(text, max(room // 2, room - len(pair)), self.truncation)
            separators = [self.end] * (1 + self.double)
            parts = [[self.start], text, separators, cut_to(pair, room - len(text), self.truncation), [self.end]]
            first = 1 + len(text) + len(separators)
        tokens = np.concatenate(parts).astype(np.int64)
        types = np.zeros(len(tokens), np.int64)
        if not self.double:
            types[first:] = 1
        return Framed(tokens, types)


def padded(rows: list[np.ndarray], filler: int = 0) -> np.ndarray:
    """Rows of up to T integers as (rows, T) int64, filled up at the end."""
    table = np.full((len(rows), max(map(len, rows), default=0)), filler, np.int64)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table
