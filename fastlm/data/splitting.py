"""Which text trains and which validates: whole documents where there are many, else a span of each."""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .reading import Events, documents

# Below this many expected validation documents, a choice among whole ones is too coarse.
MIN_DOCUMENTS = 10
_LINE_SLACK = 1000


@dataclass
class Plan:
    """A split that depends on the seed and on each document's own text, so not on the order of files.

    Args:
        fraction: share of the text that validates.
        seed: another seed, another choice.
        rule: "documents" (each whole one goes to one side; equal ones to the same), "spans" (of each, one
            contiguous span at a place drawn by the seed validates, cut at line ends where lines are short),
            or "auto" until `settle` chooses.
        chars: length of each document.
        places: for each document, where in [0, 1) its draw fell.
        kept: for each document, 0 if it is dropped.
    """

    fraction: float
    seed: int
    rule: str = "auto"
    chars: array[int] = field(default_factory=lambda: array("Q"))
    places: array[float] = field(default_factory=lambda: array("d"))
    kept: bytearray = field(default_factory=bytearray)

    def add(self, digest: bytes, chars: int, kept: bool) -> None:
        """Note one document, known by the digest of its text."""
        self.chars.append(chars)
        self.places.append(_uniform(self.seed, digest))
        self.kept.append(kept)

    def truncate(self, count: int) -> None:
        """Forget all documents but the first `count`."""
        for column in (self.chars, self.places, self.kept):
            del column[count:]

    def settle(self) -> None:
        """Choose the rule, once all documents are known."""
        if self.rule == "auto":
            self.rule = "documents" if self.fraction * sum(self.kept) >= MIN_DOCUMENTS else "spans"

    def stretches(self, index: int, texts: Iterable[str]) -> Iterator[tuple[str, Iterator[str]]]:
        """One document's text as (split, texts): each to be read before the next."""
        if not self.kept[index]:
            return
        if self.rule == "documents":
            yield ("val" if self.places[index] < self.fraction else "train"), iter(texts)
            return
        span = round(self.chars[index] * self.fraction)
        start = int(self.places[index] * (self.chars[index] - span + 1))
        cuts = [start, start + span] if span else []
        parts = documents(carve(texts, cuts, slack=min(_LINE_SLACK, span // 10)))
        yield from zip(("train", "val", "train"), parts, strict=False)


def carve(texts: Iterable[str], cuts: list[int], slack: int) -> Events:
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
