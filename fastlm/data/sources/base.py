"""What all sources share: how a file is to be read, and a row that cannot be."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import shown
from ..document import Document

TEXT_COLUMN = "text"


class Bad(NamedTuple):
    """In place of a document that cannot be read.

    Attributes:
        source, row: as of a `Document`; row 0 for the whole file.
        kind: few and fixed, so that they can be counted: undecodable, malformed, no column, not text, too long,
            truncated, damaged.
        message: what was got, and what was expected.
    """

    source: str
    row: int
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.source}: row {self.row}: {self.message}" if self.row else f"{self.source}: {self.message}"


Rows = Iterator["Document | Bad"]


@dataclass(frozen=True)
class SourceOptions:
    """How files are read; the names are those of `PrepareConfig`.

    Args:
        format: one of `FORMATS`, or "auto" to go by the file's name.
        text_column: of a table.
        meta_columns: of a table, kept in `Document.meta` under their names.
        id_column: of a table, kept as meta["id"].
        encoding, errors: of what is text in the file; errors is "strict" or "replace".
        document_separator: of plain text.
        line_endings: "keep", or "lf".
        normalize: "none", "nfc" or "nfkc".
        delimiter: of CSV; "" for a comma, or a tab in TSV.
        quoting: of CSV; "auto" for double quotes in CSV and none in TSV.
        header: whether the first row of CSV names the columns; else they are "1", "2" and so on.
        max_bytes: the most that a document may have.
        chunk_bytes: how much is read at once; nothing depends on it.
    """

    format: str = "auto"
    text_column: str = TEXT_COLUMN
    meta_columns: tuple[str, ...] = ()
    id_column: str = ""
    encoding: str = "utf-8"
    errors: str = "strict"
    document_separator: str = "none"
    line_endings: str = "keep"
    normalize: str = "none"
    delimiter: str = ""
    quoting: str = "auto"
    header: bool = True
    max_bytes: int = 1 << 25
    chunk_bytes: int = 1 << 20

    @property
    def columns(self) -> list[str]:
        """The columns of a table that are read, each once."""
        return list(dict.fromkeys([self.text_column, *self.meta_columns, *filter(None, [self.id_column])]))


def document(record: Mapping[str, Any], source: str, row: int, options: SourceOptions) -> Document | Bad:
    """A document of one row of a table; a text that is null is empty.

    A column of meta that the row lacks is None, since few files of JSON lines have all keys in all rows.
    """
    for column in filter(None, (options.text_column, options.id_column)):
        if column not in record:
            return Bad(source, row, "no column", missing_column(column, list(record)))
    text = record[options.text_column]
    if isinstance(text, bytes):
        try:
            text = text.decode(options.encoding, options.errors)
        except UnicodeError as error:
            return Bad(source, row, "undecodable", f"column {options.text_column!r} is not {options.encoding}: {error}")
    text = "" if text is None else text
    if not isinstance(text, str):
        kind = type(text).__name__
        return Bad(source, row, "not text", f"column {options.text_column!r} holds {kind} {shown(text)}, expected text")
    meta = {column: plain(record.get(column)) for column in options.meta_columns}
    if options.id_column:
        meta["id"] = plain(record[options.id_column])
    return checked(Document(text, source, row, meta), options)


def checked(found: Document, options: SourceOptions) -> Document | Bad:
    """The document, if it is short enough and text that has bytes: JSON and UTF-7 can spell half a surrogate pair."""
    text = found.text
    if options.line_endings == "lf" and "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        found = found._replace(text=text)
    if options.normalize != "none" and not text.isascii():
        text = unicodedata.normalize("NFC" if options.normalize == "nfc" else "NFKC", text)
        found = found._replace(text=text)
    if len(text) * 4 <= options.max_bytes and text.isascii():
        return found
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        if options.errors == "strict":
            return Bad(found.source, found.row, "undecodable", f"character {error.start} is a lone surrogate")
        found = found._replace(text=text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        size = len(found.text.encode())
    return found if size <= options.max_bytes else too_long(found.source, found.row, options)


def too_long(source: str, row: int, options: SourceOptions) -> Bad:
    """For a document of more than `max_bytes`."""
    return Bad(source, row, "too long", f"has more than {options.max_bytes} bytes, the most that a document may have")


def missing_column(column: str, there: Sequence[str]) -> str:
    """The message for a column that a table does not have."""
    listed = ", ".join(map(shown, there[:8])) + (", ..." if len(there) > 8 else "")
    return f"has no column {column!r}, but {listed or 'none'}"


def is_missing(found: Bad, column: str) -> bool:
    """Whether the column that `found` says is missing is that one."""
    return found.kind == "no column" and found.message.startswith(f"has no column {column!r}, but ")


def plain(value: Any) -> Any:
    """A value as JSON can hold it: of other types, their text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
