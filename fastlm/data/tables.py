"""Tables of examples: rows with a text, perhaps a second one, and a label; some of them held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .sources import Bad, SourceOptions, find, read_file

GLOBS = tuple(f"*.{ending}" for ending in ("csv", "tsv", "jsonl", "parquet", "arrow"))


class Row(NamedTuple):
    """An example.

    Attributes:
        text, pair: what is read; pair is None where there is no such column.
        label: as the file has it: a text, a number, a list; None if there is none.
        place: file and row, for a message.
    """

    text: str
    pair: str | None
    label: Any
    place: str

    @property
    def content(self) -> bytes:
        """What is read, as bytes that no other text has."""
        parts = (self.text,) if self.pair is None else (self.text, self.pair)
        return b"".join(len(data := part.encode()).to_bytes(8, "little") + data for part in parts)


def read_rows(
    names: Sequence[str], text_column: str, pair_column: str = "", label_column: str = "", header: bool = True
) -> list[Row]:
    """The rows of tables (CSV, TSV, JSON lines, Parquet, Arrow), in order.

    Args:
        names: files, folders or patterns.
        text_column, pair_column, label_column: the latter two may be "", for none.
        header: whether the first row of CSV names the columns; else they are "1", "2" and so on.

    Raises:
        DataError: for nothing there, a column that is missing, or a row that cannot be read.
    """
    others = tuple(filter(None, (pair_column, label_column)))
    options = SourceOptions(text_column=text_column, meta_columns=others, header=header)
    rows = []
    for file in find([Path(name) for name in names], GLOBS):
        if file.is_text or file.format == "warc":
            raise DataError(f"{file.path}: is {file.format}, expected a table: CSV, TSV, JSON lines, Parquet or Arrow")
        for found in read_file(file, options):
            if isinstance(found, Bad):
                raise DataError(str(found))
            place = f"{found.source}: row {found.row}"
            pair = found.meta.get(pair_column) if pair_column else None
            if pair_column and not isinstance(pair, str):
                raise DataError(f"{place}: column {pair_column!r} holds {pair!r:.80}, expected text")
            rows.append(Row(found.text, pair, found.meta.get(label_column), place))
    if not rows:
        raise DataError(f"{', '.join(names)}: has no row")
    return rows


def split_rows(rows: Iterable[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and those held out, by a hash of what is read: rows with equal texts are on one side."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    salt = seed.to_bytes(8, "little")
    for row in rows:
        digest = hashlib.blake2b(row.content, digest_size=8, salt=salt).digest()
        sides[int.from_bytes(digest, "little") < share * 2**64].append(row)
    return sides


def overlap(rows: Iterable[Row], held_out: Iterable[Row]) -> int:
    """How many held-out rows have what is read in a row of training."""
    seen = {row.content for row in rows}
    return sum(row.content in seen for row in held_out)


def digest_of(rows: Iterable[Row]) -> str:
    """sha256 of what is read and of the labels, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.content + repr(row.label).encode() + b"\0")
    return digest.hexdigest()
