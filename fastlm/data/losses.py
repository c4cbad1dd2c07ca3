"""What a tokenizer does not give back of a corpus: found, counted, refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import DataError
from .scan import Source
from .tokenizer import Tokenizer, describe, same_form

if TYPE_CHECKING:
    from .config import PrepareConfig


class Piece(NamedTuple):
    """A part of a document: where it is from, its first character's number, and whether the document ends with it."""

    source: Source
    start: int
    split: str
    text: str
    last: bool


class Losses:
    """Encodes the pieces of a corpus and keeps count of what does not come back of them.

    `unknown` is the number of unknown tokens, `lost` that of characters of the text that decoding does not give;
    `first` and `first_unknown` are the places of the first of these.
    """

    def __init__(self, tokenizer: Tokenizer, config: PrepareConfig) -> None:
        self.tokenizer = tokenizer
        self.unknown = self.lost = 0
        self.first: str | None = None
        self.first_unknown: str | None = None
        self._worse = False  # whether anything but case and blanks was lost
        self._allowed = config.allow_lossy or tokenizer.unknown_id is not None
        self._known: dict[str, bool] = {}
        self._single = config.document_separator == "none"

    def encode(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Token ids of the pieces, of the tokenizer's dtype.

        Raises:
            DataError: the first character lost and its place, unless it is allowed or there is an unknown token.
        """
        texts = [piece.text for piece in pieces]
        try:
            encoded = self.tokenizer.encode_arrays(texts)
        except DataError as error:
            encoded = [np.array(self._encode_known(piece, error), self.tokenizer.dtype) for piece in pieces]
        changed = self.tokenizer.decode_changed(texts, encoded)
        unknown_id = self.tokenizer.unknown_id
        for piece, ids, other in zip(pieces, encoded, changed, strict=True):
            unknown = 0 if unknown_id is None else int(np.count_nonzero(ids == unknown_id))
            if other is not None or unknown:
                self._note(piece, unknown, piece.text if other is None else other)
        return encoded

    def report(self) -> dict[str, Any]:
        """For the manifest: the counts, the places of the first, and whether there is more to it than case."""
        return {
            "unknown_tokens": self.unknown,
            "characters_lost": self.lost,
            "first_lost": self.first,
            "first_unknown": self.first_unknown,
            "only_case_and_blanks": self.first is not None and not self._worse,
        }

    def _encode_known(self, piece: Piece, error: DataError) -> list[int]:
        """Token ids of a piece, of which, where it is allowed, the characters that the library refuses are left out."""
        with suppress(DataError):
            return self.tokenizer.encode_lossy([piece.text])[0]
        known = "".join(filter(self._is_known, piece.text))
        if self._allowed and known != piece.text:
            with suppress(DataError):
                return self.tokenizer.encode_lossy([known])[0]
        raise DataError(f"{self._place(piece, self.tokenizer.find_unknown(piece.text, normalized=True))}: {error}")

    def _is_known(self, character: str) -> bool:
        if character not in self._known:
            try:
                self.tokenizer.encode_lossy([character])
                self._known[character] = True
            except DataError:
                self._known[character] = False
        return self._known[character]

    def _note(self, piece: Piece, unknown: int, other: str) -> None:
        if self.first is None:
            self.first = self._place(piece, self.tokenizer.find_unknown(piece.text))
        if unknown and self.first_unknown is None:  # what the normalizer changes is not unknown
            self.first_unknown = self._place(piece, self.tokenizer.first_unknown(piece.text))
        self._worse = self._worse or bool(unknown) or _letters(piece.text) != _letters(other)
        if not self._allowed:
            why = ", which has no unknown token for it" if self._worse else " (only case and blanks differ)"
            raise DataError(
                f"{self.first} does not come back from the tokenizer{why};"
                " take another, or give --allow-lossy to lose it"
            )
        self.unknown += unknown
        self.lost += (Counter(same_form(piece.text)) - Counter(same_form(other))).total()

    def _place(self, piece: Piece, index: int | None) -> str:
        path, number = piece.source
        document = "the document" if self._single else f"document {number}"
        index = index or 0
        return f"{path}: {describe(piece.text[index])} at character {piece.start + index} of {document}"


def _letters(text: str) -> str:
    """Equal for texts that differ in case and blanks alone."""
    return same_form("".join(text.split()).casefold())
