"""Tokens of text by its words: each is encoded once and remembered, since most of a text is words seen before.

A word here is what lies between two places that no token and no rule of a tokenizer reaches across. The tokenizers
library takes about 2 us for a word that it knows; looking one up here takes a tenth of that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from ..backends import cpu
from ..backends.cpu.words import BpeParts, WordTable

MOST_BYTES = 1 << 26  # of what is remembered, about
_ENTRY = 256  # of an entry beside its text: two objects, and their place in the table

# Where a word ends: at one of four blanks after what is no white space to anyone (Python's includes Unicode's). Other
# white space is left alone: some of it is removed by BERT's rules, some is none to the tokenizers library.
_BLANKS = r"\s*\S+(?:[^\S \t\r\n]\s*\S*)*|\s+"
_BLANKS_NOT_LINES = r"\s*\S+(?:(?:[^\S \t\r\n]|(?<![A-Za-z0-9])[\r\n])\s*\S*)*|\s+"
_SPACES = r"\s*\S+(?:[^\S ]\s*\S*)*|\s+"


def _letters_before(ends: str) -> str:
    """Letters of ASCII, which end before these characters too: half as many words to know as with their marks."""
    return rf" ?[A-Za-z]+(?=[{ends}])|"


_ANY_OTHER = r"\x00-&(-@\[-`{-\x7f"  # of ASCII, but for the apostrophe, which may begin an ending
# From the one that cuts most to that which cuts least.
_PATTERNS = [
    re.compile(_letters_before(_ANY_OTHER) + _BLANKS),
    re.compile(_letters_before(_ANY_OTHER) + _BLANKS_NOT_LINES),
    re.compile(_letters_before(r" \n,.;:!?()\"-") + _BLANKS),
    re.compile(_SPACES),
]
_AFTER_LETTERS, _NOT_LINES, _AT_MARKS, _AT_SPACES = _PATTERNS

SUFFIX = {"(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"}
# Alternatives that never go from anything else to white space; of a pattern made of these alone no match does.
_WORDS = {
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", *SUFFIX, "'(?i:[sdmt]|ll|ve|re)",
    r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\p{N}", r"\p{N}{1,3}", r"\p{N}+", r"\s+(?!\S)", r"\s+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\s*[\r\n]+", r"\s*[\r\n]", "[\\r\\n\\t]",
}  # fmt: skip
CASES = [
    (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"),
    (r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"),
]
_WORDS |= {
    rf"[^\r\n\p{{L}}\p{{N}}]?{word}{suffix}"
    for suffix in ("", *(f"{suffix}?" for suffix in SUFFIX))
    for upper, lower in CASES
    for word in (f"{upper}*{lower}+", f"{upper}+{lower}*")
}
# Those that take line ends, after marks alone.
_MARKS = {
    r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
}  # fmt: skip
_FORMS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
_REMOVING = {"BertNormalizer", "StripAccents"}
_WITHOUT_BLANKS = {"BertPreTokenizer", "Whitespace"}


def word_pattern(backend: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """A pattern that cuts any text into words whose tokens, joined, are those of the text; None if none is known."""
    if any(not token.special for token in backend.get_added_tokens_decoder().values()):
        return None  # they are looked for in the whole text
    if isinstance(backend.model, models.BPE) and backend.model.dropout:
        return None
    steps = steps_of(backend.pre_tokenizer, "pretokenizers")
    forms = {step["type"] for step in steps_of(backend.normalizer, "normalizers")}
    if steps and steps[0]["type"] in _WITHOUT_BLANKS:
        return _AT_MARKS if forms <= _FORMS | _REMOVING else None
    found = [_pattern_of(step) for step in steps]
    cut = any(step["type"] != "Digits" and step.get("use_regex", True) for step in steps)
    if not cut or None in found or not forms <= _FORMS:
        return None
    return max(found, key=_PATTERNS.index)  # type: ignore[arg-type]


def _pattern_of(step: dict[str, Any]) -> re.Pattern[str] | None:
    """Where a step of cutting text cannot but cut, or leaves alone."""
    if step["type"] == "Metaspace":
        return _AT_SPACES if step.get("split", True) else None
    if step["type"] == "Split":
        kept = (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
        parts = set(alternatives(step["pattern"].get("Regex", "")))
        if not kept or not parts <= _WORDS | _MARKS:
            return None
        return _NOT_LINES if parts & _MARKS else _AFTER_LETTERS
    known = step["type"] == "Digits" or (step["type"] == "ByteLevel" and not step["add_prefix_space"])
    return _AFTER_LETTERS if known else None


def alternatives(pattern: str) -> list[str]:
    """A pattern's alternatives, at its top level."""
    parts, depth = [""], 0
    for part in re.findall(r"\\.|\[(?:\\.|[^\]])*\]|.", pattern, re.DOTALL):
        depth += {"(": 1, ")": -1}.get(part, 0)
        if part == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += part
    return parts


def steps_of(part: Any, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return state[name] if state["type"] == "Sequence" else [state]


class _Ids(dict[str, bytes]):
    """Ids of words, and in `new` those that were asked for in vain."""

    def __init__(self) -> None:
        self.new: list[str] = []

    def __missing__(self, word: str) -> bytes:
        self.new.append(word)
        return b""


class WordCache:
    """Token ids of texts, by the words in them: in C++ where the CPU extension is there, else here; the same ids.

    Args:
        pattern: of `word_pattern`.
        encode: ids of several texts.
        dtype: of the ids.
        bpe: what lets C++ encode words by itself, if anything does; called once, when it is needed.
    """

    def __init__(
        self,
        pattern: re.Pattern[str],
        encode: Callable[[Sequence[str]], list[list[int]]],
        dtype: np.dtype,
        bpe: Callable[[], BpeParts | None] = lambda: None,
    ) -> None:
        self._pattern, self._encode, self._dtype, self._bpe = pattern, encode, dtype, bpe
        self._table: WordTable | PythonWords | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}  # which can be made again

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, (tokens,)."""
        if self._table is None:
            self._table = self._make_table()
        return self._table.encode(texts)

    def _make_table(self) -> WordTable | PythonWords:
        if cpu.missing_reason is not None:
            return PythonWords(self._pattern, self._encode, self._dtype)
        cut = _PATTERNS.index(self._pattern)
        return WordTable(cut, self._encode, self._dtype, MOST_BYTES, self._bpe())


class PythonWords:
    """Token ids of texts, by the words in them, where there is no CPU extension.

    Args:
        pattern: of `word_pattern`.
        encode: ids of several texts.
        dtype: of the ids.
    """

    def __init__(
        self, pattern: re.Pattern[str], encode: Callable[[Sequence[str]], list[list[int]]], dtype: np.dtype
    ) -> None:
        self._words, self._encode, self._dtype = pattern.findall, encode, dtype
        self._ids = _Ids()
        self._size = 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, (tokens,)."""
        if self._size > MOST_BYTES:
            self._ids.clear()
            self._size = 0
        data: list[bytes] = []
        incomplete: dict[int, list[str]] = {}  # words of texts with new ones
        for index, text in enumerate(texts):
            before, words = len(self._ids.new), self._words(text)
            data.append(b"".join(map(self._ids.__getitem__, words)))
            if len(self._ids.new) > before:
                incomplete[index] = words
        try:
            if incomplete:
                self._learn(list(dict.fromkeys(self._ids.new)))
        finally:
            self._ids.new.clear()
        for index, words in incomplete.items():
            data[index] = b"".join(map(self._ids.__getitem__, words))
        return [np.frombuffer(ids, self._dtype) for ids in data]

    def _learn(self, words: list[str]) -> None:
        for word, ids in zip(words, self._encode(words), strict=True):
            self._ids[word] = np.array(ids, self._dtype).tobytes()
        self._size += _ENTRY * len(words) + 6 * sum(map(len, words))
