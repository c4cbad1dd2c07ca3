"""Which tokens make up a word, so that an objective can mask whole words, those of Chinese among them.

Of scripts with blanks between words, a word is a pre-token of the tokenizer, as WordPiece's and byte-level BPE's rules
cut it; where a tokenizer's rules cut otherwise (SentencePiece's, single characters), a run of letters and digits, or a
mark. Of scripts without blanks it is a character, or what jieba finds.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
import weakref
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from tokenizers import models

from ..errors import ConfigError, DataError
from .clean.words import encodable, has_unspaced, jieba_tokenizer, unspaced
from .compression import needs
from .library import special_names
from .tokenizer import Tokenizer

Segmenter = Literal["none", "jieba"]
_BLANKS = np.array([code for code in range(0x3001) if chr(code).isspace()], np.uint32)
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_MARK = "▁"  # SentencePiece's blank


def word_ids(tokenizer: Tokenizer, text: str | Sequence[int] | np.ndarray, segmenter: Segmenter = "none") -> np.ndarray:
    """The number of the word that each token belongs to, (tokens,) int64, from 0 on; -1 for special tokens.

    Words are whole runs of tokens. A token with parts of two words joins them: where a byte-level BPE has learned a
    token across two words of jieba's, both are one. A blank belongs to the word after it. The unknown token is a word.

    Args:
        tokenizer: of the tokens.
        text: whose tokens, as `Tokenizer.encode` gives them, are numbered; or ids, as a file of tokens holds them.
            From ids, what the tokenizer drops is not known: a BERT's, upper case and blanks within Chinese.
        segmenter: "jieba": Chinese by its words, those in traditional characters by the words of the simplified text,
            which are what jieba's dictionary has; "none": each character is a word.

    Raises:
        ConfigError: another segmenter.
        DataError: an id outside the vocabulary, a text that the tokenizer cannot express, or jieba or OpenCC is not
            installed.

    Source: Cui et al. 2021, "Pre-Training with Whole Word Masking for Chinese BERT".
    """
    if segmenter not in get_args(Segmenter):
        raise ConfigError(f"segmenter={segmenter!r}, expected one of {', '.join(get_args(Segmenter))}")
    kind = _kind(tokenizer)
    if isinstance(text, str):
        tokenizer.encode(text)  # raises where a character cannot be expressed
        encoding = tokenizer._backend.encode(text, add_special_tokens=False)
        pretoken = np.array(encoding.word_ids, np.int64) if kind.cuts_words else None
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return _number(text, spans, pretoken, segmenter)
    ids = np.asarray(text, np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        bad = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
        raise DataError(f"token id {bad} is outside the vocabulary of {tokenizer.vocab_size}")
    numbers = np.full(len(ids), -1, np.int64)
    plain = np.flatnonzero(~kind.special[ids])
    first = 0
    for run in np.split(plain, np.flatnonzero(np.diff(plain) > 1) + 1):
        if len(run):
            numbers[run] = first + _number(*kind.read(ids[run]), segmenter)
            first = int(numbers[run[-1]]) + 1
    return numbers


class _Surface(NamedTuple):
    """Ids as text: what `_number` takes."""

    text: str
    spans: np.ndarray
    pretoken: np.ndarray | None


class _Kind:
    """What a tokenizer's ids look like as text.

    Attributes:
        special: (vocabulary,) whether an id is of a special token, the unknown one aside.
        cuts_words: whether its pre-tokens are words and marks.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._backend = backend = tokenizer._backend
        self._wordpiece = isinstance(backend.model, models.WordPiece)
        names = set(special_names(backend))
        self._bytes = [b"\xff"] * tokenizer.vocab_size
        self._goes_on = np.zeros(tokenizer.vocab_size, np.bool_)
        self._blank_between = np.zeros(tokenizer.vocab_size, np.bool_)
        self.special = np.zeros(tokenizer.vocab_size, np.bool_)
        letters = _byte_of_letter() if '"ByteLevel"' in _state(backend.decoder) else None
        marks = _MARK in _state(backend.decoder)
        prefix = backend.model.continuing_subword_prefix if self._wordpiece else ""
        for name, number in backend.get_vocab(with_added_tokens=True).items():
            self.special[number] = name in names and number != tokenizer.unknown_id
            self._goes_on[number] = bool(prefix) and name.startswith(prefix)
            if number == tokenizer.unknown_id:
                continue
            if letters is not None and all(letter in letters for letter in name):
                self._bytes[number] = bytes(map(letters.__getitem__, name))
            elif found := _BYTE.fullmatch(name) if marks else None:
                self._bytes[number] = bytes([int(found[1], 16)])
            else:
                name = name.replace(_MARK, " ") if marks else name.removeprefix(prefix)
                self._bytes[number] = name.encode("utf-8", "replace")
                self._blank_between[number] = name.isalnum() and not has_unspaced(name)
        self.cuts_words = _cuts(backend.pre_tokenizer)

    def read(self, ids: np.ndarray) -> _Surface:
        """Ids without special ones as text."""
        parts = [self._bytes[number] for number in ids.tolist()]
        before = np.zeros(len(ids), np.int64)  # blanks that are put before a token
        if self._wordpiece:
            before[1:] = ~self._goes_on[ids[1:]] & self._blank_between[ids[1:]] & self._blank_between[ids[:-1]]
            parts = [b" " + part if blank else part for part, blank in zip(parts, before, strict=True)]
        text = b"".join(parts).decode("utf-8", "surrogateescape")
        codes = _codes(text)
        lost = (codes >= 0xDC80) & (codes < 0xDD00)  # a byte by itself
        width = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        character = np.repeat(np.arange(len(codes)), np.where(lost, 1, width))
        ends = np.cumsum([len(part) for part in parts])
        starts = np.concatenate([[0], ends[:-1]]) + before
        spans = np.stack([character[np.minimum(starts, len(character) - 1)], character[ends - 1] + 1], axis=1)
        text = encodable(text)
        return _Surface(text, spans, self._pretokens(text, ids, spans))

    def _pretokens(self, text: str, ids: np.ndarray, spans: np.ndarray) -> np.ndarray | None:
        if not self.cuts_words:
            return None
        if self._wordpiece:
            return np.cumsum(~self._goes_on[ids])
        starts = [span[0] for _, span in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        return np.searchsorted(starts, spans[:, 0], side="right")


_KINDS: weakref.WeakKeyDictionary[Tokenizer, _Kind] = weakref.WeakKeyDictionary()


def _kind(tokenizer: Tokenizer) -> _Kind:
    if tokenizer not in _KINDS:
        _KINDS[tokenizer] = _Kind(tokenizer)
    return _KINDS[tokenizer]


def _number(text: str, spans: np.ndarray, pretoken: np.ndarray | None, segmenter: Segmenter) -> np.ndarray:
    """Numbers of words of the tokens that take these spans of characters of a text."""
    if len(spans) < 2:
        return np.zeros(len(spans), np.int64)
    codes = _codes(text)
    blank = np.isin(codes, _BLANKS)
    # For each pair of neighbours, the last character of the one and the first of the other.
    last, first = np.maximum(spans[:-1, 1] - 1, 0), np.minimum(spans[1:, 0], len(codes) - 1)
    if pretoken is None:
        letter = np.array([character.isalnum() or unicodedata.category(character)[0] == "M" for character in text])
        same = (letter[last] & letter[first]) | (blank[last] & ~blank[first])
    else:
        same = pretoken[:-1] == pretoken[1:]
        same &= blank[last] | ~blank[first]
    if has_unspaced(text):
        word = _jieba_words(text) if segmenter == "jieba" else np.arange(len(text))
        chinese = unspaced(codes)
        decides = (chinese[last] | chinese[first]) & ~blank[last]
        same = np.where(decides, word[last] == word[first], same)
    same |= last == first  # parts of one character
    return np.cumsum(np.concatenate([[False], ~same]))


def _jieba_words(text: str) -> np.ndarray:
    """The number of the word of jieba's that each character belongs to."""
    try:
        segment = jieba_tokenizer().cut
        lengths = [len(word) for line in text.splitlines(keepends=True) for word in segment(_simplified(line))]
    except ModuleNotFoundError as error:
        raise needs(error.name or "jieba", "for the words of Chinese") from None
    return np.repeat(np.arange(len(lengths)), lengths)


def _simplified(line: str) -> str:
    """In simplified characters where that changes no length."""
    line = encodable(line)
    if not has_unspaced(line):
        return line
    found = _opencc().convert(line)
    return found if len(found) == len(line) else line


@functools.cache
def _opencc():
    import opencc

    return opencc.OpenCC("tw2s")  # as t2s, but for characters that Taiwan alone writes so


def _cuts(pre_tokenizer) -> bool:
    """Whether these rules part words and marks."""
    if pre_tokenizer is None:
        return False
    ends = [span[1] for _, span in pre_tokenizer.pre_tokenize_str("ab, cd")]
    return ends == [2, 3, 6]


def _state(part) -> str:
    return "" if part is None else json.dumps(json.loads(part.__getstate__()), ensure_ascii=False)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    from .tokenizers.tiktoken import byte_letters

    return {letter: byte for byte, letter in enumerate(byte_letters())}
