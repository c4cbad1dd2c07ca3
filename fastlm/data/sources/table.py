"""JSON lines and CSV: one document a row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...errors import shown
from ..compression import lines
from ..document import Document
from .base import Bad, Rows, SourceOptions, document, missing_column, too_long

_MARK = b"\xef\xbb\xbf"


def read_jsonl(file: BinaryIO, path: Path, options: SourceOptions, first_row: int = 1) -> Rows:
    """One document for each line that is a JSON object; a row's number is its line's, empty ones counted."""
    name = str(path)
    for row, line in enumerate(lines(file, 2 * options.max_bytes), start=first_row):
        if line is None:
            yield too_long(name, row, options)
            continue
        line = line.removeprefix(_MARK) if row == 1 else line
        if line.strip():
            yield _from_json(line, name, row, options)


def _from_json(line: bytes, name: str, row: int, options: SourceOptions) -> Document | Bad:
    try:
        value = json.loads(line.decode(options.encoding, options.errors))
    except UnicodeError as error:
        return Bad(name, row, "undecodable", f"is not {options.encoding} text ({error})")
    except (ValueError, RecursionError) as error:
        return Bad(name, row, "malformed", f"is not JSON ({error})")
    if not isinstance(value, dict):
        return Bad(name, row, "malformed", f"is {shown(value)}, expected a JSON object")
    return document(value, name, row, options)


def read_csv(file: BinaryIO, path: Path, options: SourceOptions, tabs: bool = False) -> Rows:
    """One document for each row after the header; a row's number counts the rows after it.

    CSV is read as RFC 4180 has it, double quotes around what holds delimiters; TSV without quotes, as IANA has it.
    """
    name = str(path)
    quoted = options.quoting == "minimal" or (options.quoting == "auto" and not tabs)
    previous = csv.field_size_limit(2 * options.max_bytes)
    try:
        text = _Decoded(file, options)
        rows = csv.reader(
            text,
            delimiter=options.delimiter or ("\t" if tabs else ","),
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            strict=True,
        )
        yield from _from_rows(rows, text, name, options)
    finally:
        csv.field_size_limit(previous)


def _from_rows(rows: Iterator[list[str]], text: _Decoded, name: str, options: SourceOptions) -> Rows:
    header: list[str] | None = None
    row = 0
    while True:
        text.problem = None
        try:
            values = next(rows, None)
        except csv.Error as error:
            row += header is not None
            yield Bad(name, row, "too long" if "field limit" in str(error) else "malformed", f"is not CSV ({error})")
            if header is None:
                return
            continue
        if values is None:
            return
        if not values:
            continue
        if header is None:
            header = values if options.header else [str(column) for column in range(1, len(values) + 1)]
            missing = next((column for column in options.columns if column not in header), None)
            if text.problem or missing:
                message = text.problem or missing_column(missing or "", header)
                yield Bad(name, 0, "undecodable" if text.problem else "no column", message)
                return
            if options.header:
                continue
        row += 1
        if text.problem:
            yield Bad(name, row, "undecodable", text.problem)
        elif len(values) != len(header):
            yield Bad(name, row, "malformed", f"has {len(values)} fields, expected the {len(header)} of the header")
        else:
            yield document(dict(zip(header, values, strict=True)), name, row, options)


class _Decoded:
    """The lines of a file as text for `csv.reader`; `problem` says what did not decode since it was last reset."""

    def __init__(self, file: BinaryIO, options: SourceOptions) -> None:
        self._encoding, self._errors = options.encoding, options.errors
        self.problem: str | None = None
        self._limit = 2 * options.max_bytes
        plain = "\n".encode(self._encoding)[-1:] == b"\n" and len("\n\n".encode(self._encoding).lstrip(_MARK)) == 2
        if plain:
            self._lines: Iterator[bytes | str | None] = lines(file, self._limit)
        else:  # UTF-16 and UTF-32: a line's end has several bytes
            self._lines = iter(io.TextIOWrapper(file, self._encoding, "replace", newline=""))
        self._first = True

    def __iter__(self) -> _Decoded:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if line is None:
            self.problem = f"has a line of more than {self._limit} bytes"
            return "\n"
        if isinstance(line, bytes):
            line = self._decode(line)
        line = line.removeprefix("\ufeff") if self._first else line
        self._first = False
        return line

    def _decode(self, line: bytes) -> str:
        try:
            return line.decode(self._encoding, self._errors)
        except UnicodeError as error:
            self.problem = f"is not {self._encoding} text ({error})"
            return line.decode(self._encoding, "replace")
