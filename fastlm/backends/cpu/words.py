"""Token ids of texts by their words, in C++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .. import cpu


class BpeParts(NamedTuple):
    """A byte-level BPE; csrc/cpu/words_bpe.h says what the members are."""

    pieces: list[int]
    classes: bytes
    byte_ids: list[int]
    merges: list[tuple[int, int, int]]
    whole: list[tuple[bytes, int]]


class WordTable:
    """Remembers the ids of words, and finds those of texts by them, on several threads.

    Args:
        cut: where words end, csrc/cpu/words.h's Cut.
        encode: ids of several texts, for words that are neither known nor of `bpe`.
        dtype: of the ids, of 2 or 4 bytes.
        most_bytes: of the table, about; then it begins anew.
        bpe: encodes words here; None leaves all to `encode`.
    """

    def __init__(
        self,
        cut: int,
        encode: Callable[[Sequence[str]], list[list[int]]],
        dtype: np.dtype,
        most_bytes: int,
        bpe: BpeParts | None = None,
    ) -> None:
        self._words = cpu._cpu.Words(cut, dtype.itemsize, most_bytes, None if bpe is None else tuple(bpe))
        self._encode, self._dtype = encode, dtype

    def __len__(self) -> int:
        return len(self._words)

    @property
    def bytes(self) -> int:
        """What the words and their ids take."""
        return self._words.bytes()

    def cut(self, text: str) -> list[str]:
        """The words of a text."""
        return self._words.cut(text)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, (tokens,)."""
        try:
            found, given = self._words.find(texts, cpu._cpu.omp_threads())
        except UnicodeEncodeError:  # a lone surrogate, of which the library says what it says
            return [np.array(ids, self._dtype) for ids in self._encode(texts)]
        if found is not None:
            given = self._words.fill(found, [np.array(ids, self._dtype).tobytes() for ids in self._encode(given)])
        return [np.frombuffer(ids, self._dtype) for ids in given]
