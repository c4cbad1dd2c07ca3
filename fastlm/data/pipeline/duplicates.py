"""Duplicates over all shards: what each shard keeps for them, and which documents stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..._core.files import replacing
from ..dedup import (
    ExactOptions,
    LineFilter,
    LineOptions,
    NearOptions,
    Shards,
    fingerprint,
    line_hashes,
    repeated_lines,
    resolve,
    save,
    signatures,
)
from .shards import Shard, read_shard


@dataclass(frozen=True)
class Duplicates:
    """What counts as a duplicate; None for kinds that are not looked for.

    Lines that occur too often are taken out of what is left; documents are compared with these lines in them.
    """

    exact: ExactOptions | None = None
    near: NearOptions | None = None
    lines: LineOptions | None = None

    def key(self) -> Any:
        """Equal where shards would keep the same."""
        signed = fingerprint(self.exact, self.near) if self.exact or self.near else ""
        return signed, asdict(self.lines) if self.lines else None

    def sign(self, shard: Shard) -> None:
        """Write what is needed of a shard."""
        if self.exact or self.near:
            save(shard.signatures_path, signatures(_texts(shard), self.exact, self.near))
        if self.lines:
            save(shard.lines_path, line_hashes(_texts(shard), self.lines))

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {name: asdict(value) for name in ("exact", "near", "lines") if (value := getattr(self, name))}


NO_DUPLICATES = Duplicates()


@dataclass
class Kept:
    """Which documents of all shards stay, and what stays of them."""

    reasons: np.ndarray | None
    lines: LineFilter | None
    counts: dict[str, int]

    @property
    def dropped(self) -> int:
        """How many documents do not stay."""
        return 0 if self.reasons is None else int(np.count_nonzero(self.reasons))

    def text(self, number: int, text: str) -> str | None:
        """What stays of a document, known by its number in the corpus; None for nothing."""
        if self.reasons is not None and self.reasons[number]:
            return None
        return text if self.lines is None else self.lines.filter(number, text)


def find_duplicates(
    options: Duplicates, shards: Sequence[Shard], counts: Sequence[int], pairs: Path | None = None
) -> Kept:
    """Look for duplicates over all shards.

    Args:
        counts: the documents of each shard.
        pairs: a file for a line of JSON about each document that is dropped.
    """
    reasons, lines = None, None
    found: dict[str, int] = {}
    folder = shards[0].folder
    if options.exact or options.near:
        with ExitStack() as stack:
            output: IO[str] | None = None
            if pairs is not None:
                temporary = stack.enter_context(replacing(pairs))
                output = stack.enter_context(open(temporary, "w", encoding="utf-8"))
            texts = Shards(lambda number: _texts(shards[number]), counts)
            files = [shard.signatures_path for shard in shards]
            reasons, found = resolve(files, texts, options.exact, options.near, folder=folder, pairs=output)
    if options.lines:
        path = folder / "lines.npy"
        found["repeated lines"] = repeated_lines([shard.lines_path for shard in shards], counts, options.lines, path)
        lines = LineFilter(path, options.lines)
    return Kept(reasons, lines, found)


def _texts(shard: Shard) -> Iterator[str]:
    return (found.text for found in read_shard(shard.path))
