"""A document on its way from a source to tokens, and what a step of cleaning makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Document(NamedTuple):
    """A text and where it is from.

    Attributes:
        text: the whole text.
        source: the file as the user named it.
        row: which document of that file it is, from 1 on.
        meta: what else is known of it: columns kept, "language", "label", "url"; values that JSON can hold.
    """

    text: str
    source: str
    row: int
    meta: dict[str, Any] = {}  # noqa: RUF012 (never written to: a step gives a document of its own)


class Dropped(NamedTuple):
    """In place of a document that a step leaves out; reasons are few and fixed, so that they can be counted."""

    reason: str


Step = Callable[[Document], "Document | Dropped"]
"""Pure: the same document gives the same result in any process, in any order."""
