"""What is counted of a pipeline's documents, and the examples that are kept: sums, so that shards can be added up."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..clean.balance import Balance
from ..document import Document
from ..sources import Bad

EXAMPLES = 3  # a step and reason
EXAMPLE_CHARS = 400
BEFORE_CHARS, AROUND_CHARS = 100, 200  # of an example, ahead of the first change and from it on
ELLIPSIS = "\u2026"
BAD_LISTED = 20


class Tally:
    """Counts of one shard, step by step.

    Of all documents that meet the same fate, those whose names have the smallest hashes are the examples: so they come
    from everywhere, and are the same however the work is divided.

    Args:
        steps: their names.
        keys: what documents are counted by, see `Balance`.
        mask: takes personal data out of the text of an example, where a step takes it out of the documents.
    """

    def __init__(
        self, steps: Sequence[str], keys: Sequence[str] = (), mask: Callable[[str], str] | None = None
    ) -> None:
        self.read = self.read_bytes = self.empty = self.kept = self.kept_bytes = self.kept_chars = 0
        self._mask = mask
        self.steps = [_StepTally(name, mask) for name in steps]
        self.masked: Counter[str] = Counter()
        self.balance_read, self.balance_cleaned = Balance(keys), Balance(keys)
        self.bad: Counter[str] = Counter()
        self.bad_listed: list[str] = []
        self.missing: Counter[str] = Counter()
        self.kept_examples: list[list[Any]] = []

    def add_bad(self, bad: Bad) -> None:
        """Count a row that could not be read."""
        self.bad[bad.kind] += 1
        if len(self.bad_listed) < BAD_LISTED:
            self.bad_listed.append(str(bad))

    def add_read(self, found: Document) -> None:
        """Count a document as it was read."""
        self.read += 1
        self.read_bytes += size_of(found.text)
        self.balance_read.add(found)
        for column, value in found.meta.items():
            if value is None:
                self.missing[column] += 1

    def add_kept(self, found: Document) -> None:
        """Count a document that passed all steps."""
        self.kept += 1
        self.kept_chars += len(found.text)
        self.kept_bytes += size_of(found.text)
        self.balance_cleaned.add(found)
        masked = found.meta.get("masked")
        if isinstance(masked, dict):  # what the step personal_data counts
            self.masked.update(masked)
        _note(self.kept_examples, found, None, self._mask)

    def report(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "documents_read": self.read,
            "bytes_read": self.read_bytes,
            "empty": self.empty,
            "documents_cleaned": self.kept,
            "bytes_cleaned": self.kept_bytes,
            "chars_cleaned": self.kept_chars,
            "bad": dict(self.bad),
            "bad_listed": self.bad_listed,
            "missing_meta": dict(self.missing),
            "steps": [step.report() for step in self.steps],
            "kept_examples": self.kept_examples,
            "masked": dict(self.masked),
            "balance_read": self.balance_read.to_dict(),
            "balance_cleaned": self.balance_cleaned.to_dict(),
        }


class _StepTally:
    def __init__(self, name: str, mask: Callable[[str], str] | None) -> None:
        self.name = name
        self._mask = mask
        self.seen = self.changed = self.bytes_in = self.bytes_out = 0
        self.dropped: Counter[str] = Counter()
        self.dropped_examples: dict[str, list[list[Any]]] = {}
        self.changed_examples: list[list[Any]] = []

    def add(self, before: Document, after: Document) -> None:
        self.seen += 1
        size = size_of(before.text)
        self.bytes_in += size
        if after.text == before.text:
            self.bytes_out += size
        else:
            self.bytes_out += size_of(after.text)
            self.changed += 1
            _note(self.changed_examples, before, after, self._mask)

    def add_dropped(self, before: Document, reason: str) -> None:
        self.seen += 1
        self.bytes_in += size_of(before.text)
        self.dropped[reason] += 1
        _note(self.dropped_examples.setdefault(reason, []), before, None, self._mask)

    def report(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "documents": self.seen,
            "changed": self.changed,
            "dropped": dict(self.dropped),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "dropped_examples": self.dropped_examples,
            "changed_examples": self.changed_examples,
        }


def size_of(text: str) -> int:
    """Its bytes in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def merged(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The reports of several shards as one."""
    total: dict[str, Any] = {}
    for report in reports:
        _add(total, report)
    return total


def _add(total: dict[str, Any], report: dict[str, Any]) -> None:
    for name, value in report.items():
        if name not in total:
            total[name] = _copy(value)
        elif isinstance(value, dict):
            _add(total[name], value)
        elif isinstance(value, list):
            total[name] = _together(total[name], value)
        elif not isinstance(value, str):  # the name of a step is the same in all
            total[name] += value


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(child) for name, child in value.items()}
    return [_copy(child) for child in value] if isinstance(value, list) else value


def _together(ours: list[Any], theirs: list[Any]) -> list[Any]:
    """Lists of steps step by step; of examples the smallest; of lines the first."""
    kind = type((ours or theirs or [None])[0])
    if kind is dict:
        for step, other in zip(ours, theirs, strict=True):
            _add(step, other)
        return ours
    return [*ours, *theirs][:BAD_LISTED] if kind is str else sorted([*ours, *theirs], key=_rank)[:EXAMPLES]


def _rank(example: Sequence[Any]) -> str:
    return example[0]


def _note(
    examples: list[list[Any]], before: Document, after: Document | None, mask: Callable[[str], str] | None
) -> None:
    digest = hashlib.blake2b(f"{before.source}\0{before.row}".encode("utf-8", "replace"), digest_size=8).hexdigest()
    if len(examples) == EXAMPLES and digest >= examples[-1][0]:
        return
    texts = before.text, before.text if after is None else after.text
    # The whole texts are masked: what is cut in two is not found.
    shown = texts if mask is None else (mask(texts[0]), mask(texts[1]))
    first = _first_difference(*(texts if shown[0] == shown[1] else shown))
    one, other = (_excerpt(text, first) for text in shown)
    examples.append([digest, before.source, before.row, one, None if after is None else other])
    examples.sort(key=_rank)
    del examples[EXAMPLES:]


def _first_difference(one: str, other: str) -> int:
    """Index of the first character in which two texts differ; 0 where they are equal."""
    if one == other:
        return 0
    equal, length = 0, min(len(one), len(other))
    while equal < length:  # by parts: a character at a time takes a second for a long document
        part = slice(equal, equal + EXAMPLE_CHARS)
        if one[part] != other[part]:
            return next((i for i in range(equal, length) if one[i] != other[i]), length)
        equal += EXAMPLE_CHARS
    return length


def _excerpt(text: str, place: int) -> str:
    """What is shown of a text: its start, or what is around a place further on."""
    start = place - BEFORE_CHARS if place + AROUND_CHARS > EXAMPLE_CHARS else 0
    return ELLIPSIS * (start > 0) + text[max(start, 0) : max(start, 0) + EXAMPLE_CHARS]
