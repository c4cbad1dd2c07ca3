"""Cleaning: named steps from document to document, each a pure function with options that are checked when it is made.

`make_step("length", min_words=50)` gives a function of a `Document`; `steps()` lists all with options and reasons. What
a step needs beside Python comes with the extra `data`, and is imported when the step first runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..document import Document, Dropped, Step
from . import boilerplate, c4, characters, gopher, html, language, length, personal  # noqa: F401 (each registers steps)
from .balance import Balance
from .registry import Range, StepInfo, make_step, step, steps

DEFAULT_STEPS = (
    "fix_unicode",
    "control_characters",
    "whitespace",
    "boilerplate",
    "length",
    "gopher_quality",
    "gopher_repetition",
    "personal_data",
)
"""For text from the web in any language, in the order in which they run; `language` and `html_page` go before them."""

__all__ = ["DEFAULT_STEPS", "Balance", "Range", "StepInfo", "chain", "make_step", "step", "steps"]


def chain(parts: Sequence[Step]) -> Step:
    """The steps one after the other, until one drops the document; it can be pickled where the steps can."""
    return _Chain(tuple(parts))


class _Chain:
    def __init__(self, parts: tuple[Step, ...]):
        self.parts = parts

    def __call__(self, document: Document) -> Document | Dropped:
        for part in self.parts:
            result = part(document)
            if isinstance(result, Dropped):
                return result
            document = result
        return document
