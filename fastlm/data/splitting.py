"""Which text trains and which validates: whole documents where there are many, else a span of each."""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from .reading import Events, documents

# Below this many expected validation documents, a choice among whole ones is too coarse.
MIN_DOCUMENTS = 10
_LINE_SLACK = 1000
_ROW = struct.Struct("<16sQ?")
IN_MEMORY = 1 << 25  # bytes: 1.3 million documents


class Row(NamedTuple):
    """What the scan notes of one document: the digest of its text, its length, and whether it is used."""

    digest: bytes
    chars: int
    kept: bool


class Plan:
    """A split that depends on the seed and on each document's own text, so not on the order of files.

    The rows of the documents are kept in memory up to `IN_MEMORY` bytes, and beyond in a file without a name.

    Args:
        fraction: share of the text that validates.
        seed: another seed, another choice.
        rule: "documents" (each whole one goes to one side; equal ones to the same), "spans" (of each, one
            contiguous span at a place drawn by the seed validates, cut at line ends where lines are short),
            or "auto" until `resolve` chooses.
        folder: where the file is made; None for the system's folder of temporary files.
    """

    def __init__(self, fraction: float, seed: int, rule: str = "auto", folder: Path | None = None) -> None:
        self.fraction, self.seed, self.rule = fraction, seed, rule
        self.documents = self.chars = self.kept = 0
        self._folder = folder
        self._file = self._new_file()

    def close(self) -> None:
        """Forget everything, and remove the file."""
        self._file.close()

    def add(self, digest: bytes, chars: int, kept: bool) -> None:
        """Note one document, known by the 16 bytes that are the digest of its text."""
        self._file.write(_ROW.pack(digest, chars, kept))
        self._count(chars, kept, 1)

    def truncate(self, count: int) -> None:
        """Forget all documents but the first `count`."""
        for row in self.rows(count):
            self._count(row.chars, row.kept, -1)
        self._file.seek(count * _ROW.size)
        self._file.truncate()

    def resolve(self) -> None:
        """Choose the rule, once all documents are known."""
        if self.rule == "auto":
            self.rule = "documents" if self.fraction * self.kept >= MIN_DOCUMENTS else "spans"

    def rows(self, first: int = 0) -> Iterator[Row]:
        """The documents from number `first` on, in the order in which they were added."""
        at = first * _ROW.size
        while True:
            self._file.seek(at)
            data = self._file.read(4096 * _ROW.size)
            if not data:
                return
            at += len(data)
            yield from map(Row._make, _ROW.iter_unpack(data))

    def place(self, row: Row) -> float:
        """Where in [0, 1) a document's draw fell."""
        return _uniform(self.seed, row.digest)

    def segments(self, row: Row, texts: Iterable[str]) -> Iterator[tuple[str, Iterator[str]]]:
        """One document's text as (split, texts): each to be read before the next."""
        if not row.kept:
            return
        place = self.place(row)
        if self.rule == "documents":
            yield ("val" if place < self.fraction else "train"), iter(texts)
            return
        span = round(row.chars * self.fraction)
        start = int(place * (row.chars - span + 1))
        cuts = [start, start + span] if span else []
        parts = documents(split_at(texts, cuts, slack=min(_LINE_SLACK, span // 10)))
        yield from zip(("train", "val", "train"), parts, strict=False)

    def _new_file(self) -> IO[bytes]:
        return tempfile.SpooledTemporaryFile(IN_MEMORY, dir=None if self._folder is None else str(self._folder))

    def _count(self, chars: int, kept: bool, sign: int) -> None:
        self.documents += sign
        self.chars += sign * chars
        self.kept += sign * kept


def split_at(texts: Iterable[str], cuts: list[int], slack: int) -> Events:
    """Put an end of document at each position of `cuts`, or after the first line end within `slack` of it."""
    waiting = deque(cuts)
    buffer, passed = "", 0
    for text in texts:
        buffer += text
        while waiting and passed + len(buffer) >= waiting[0] + slack:
            at = _line_end(buffer, waiting.popleft() - passed, slack)
            yield buffer[:at]
            yield None
            buffer, passed = buffer[at:], passed + at
        free = min(waiting[0] - passed, len(buffer)) if waiting else len(buffer)
        yield buffer[:free]
        buffer, passed = buffer[free:], passed + free
    for cut in waiting:
        at = _line_end(buffer, cut - passed, slack)
        yield buffer[:at]
        yield None
        buffer, passed = buffer[at:], passed + at
    yield buffer
    yield None


def _line_end(text: str, position: int, slack: int) -> int:
    newline = text.find("\n", position, position + slack)
    return position if newline < 0 else newline + 1


def _uniform(seed: int, digest: bytes) -> float:
    """A number in [0, 1) from the seed and a digest."""
    bits = hashlib.blake2b(digest, digest_size=8, salt=seed.to_bytes(16, "little", signed=True)).digest()
    return (int.from_bytes(bits, "little") >> 11) * 2.0**-53
