"""A corpus cut into units of work, by position alone: the same cuts whoever does the work, and however many do."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..compression import BUFFER, compression
from ..document import Document
from .arrow import row_groups
from .base import Bad, SourceOptions
from .find import File
from .read import read_file

UNIT_BYTES = 1 << 23  # of content
UNIT_FILES = 1024
ROW_BYTES = 256  # as much does a row count for beside its text


class Span(NamedTuple):
    """A file, or a part of one as `read_file` takes it."""

    file: File
    start: int = 0
    stop: int | None = None
    first_row: int = 1


class Unit(NamedTuple):
    """What becomes one shard.

    Attributes:
        number: units are numbered from 0 on, in the order of the corpus.
        spans: what is to be read; or
        rows: what was read already, of a file that cannot be entered in the middle.
        identity: equal for units of the same content, as far as the files' sizes and times tell.
        size: bytes of the files' own, of all units together those of all files.
        ends: the files that end with this unit.
    """

    number: int
    spans: tuple[Span, ...]
    rows: tuple[Document | Bad, ...]
    identity: str
    size: int
    ends: tuple[File, ...]

    @property
    def place(self) -> str:
        """For a message: where it begins."""
        if self.rows:
            return f"{self.rows[0].source} from row {self.rows[0].row} on"
        first = self.spans[0]
        return f"{first.file.path} from row {first.first_row} on" if first.stop is not None else str(first.file.path)


def cut(files: Sequence[File], options: SourceOptions, size: int = 0) -> Iterator[Unit]:
    """The units of a corpus, in order, lazily: small files in groups, large ones in parts.

    Parts of plain JSON lines and of Parquet are read by whoever does the unit; of any other large file, here.

    Args:
        size: bytes of a unit; 0 for `UNIT_BYTES`.
    """
    size = size or UNIT_BYTES
    number = 0
    group: list[tuple[File, os.stat_result]] = []
    held = 0
    for file in files:
        status = file.path.stat()
        large = status.st_size * (8 if compression(file.path) else 1) >= size
        if group and (large or held + status.st_size > size or len(group) == UNIT_FILES):
            yield _of_files(number, group)
            number, group, held = number + 1, [], 0
        if not large:
            group.append((file, status))
            held += status.st_size * (8 if compression(file.path) else 1)
            continue
        for unit in _of_large(file, status, options, size):
            yield unit._replace(number=number)
            number += 1
    if group:
        yield _of_files(number, group)


def _of_files(number: int, group: list[tuple[File, os.stat_result]]) -> Unit:
    spans = tuple(Span(file) for file, _ in group)
    identity = _identity(*(_version(file, status) for file, status in group))
    size = sum(status.st_size for _, status in group)
    return Unit(number, spans, (), identity, size, tuple(file for file, _ in group))


def _of_large(file: File, status: os.stat_result, options: SourceOptions, size: int) -> Iterator[Unit]:
    if file.format == "parquet" and not compression(file.path):
        return _of_row_groups(file, status, size)
    if file.format == "jsonl" and not compression(file.path):
        return _of_lines(file, status, size)
    return _of_rows(file, status, options, size)


def _of_row_groups(file: File, status: os.stat_result, size: int) -> Iterator[Unit]:
    try:
        parts = list(row_groups(file.path, size))
    except Exception:  # damaged, which is for the reader to say
        parts = []
    if not parts:
        yield _of_files(0, [(file, status)])
        return
    total, done, passed = sum(held for _, _, held in parts), 0, 0
    for index, (groups, first_row, held) in enumerate(parts):
        passed += held
        end = status.st_size * passed // max(total, 1) if index < len(parts) - 1 else status.st_size
        span = Span(file, groups.start, groups.stop, first_row)
        last = index == len(parts) - 1
        yield Unit(0, (span,), (), _identity(_version(file, status), groups), end - done, (file,) if last else ())
        done = end


def _of_lines(file: File, status: os.stat_result, size: int) -> Iterator[Unit]:
    """Parts of at least `size` bytes that end with a line."""
    start = at = 0
    first_row = row = 1
    version = _version(file, status)
    with open(file.path, "rb", buffering=0) as content:
        while data := content.read(min(size, BUFFER)):
            end = data.rfind(b"\n") + 1
            if end and at + end - start >= size and at + end < status.st_size:
                span = Span(file, start, at + end, first_row)
                yield Unit(0, (span,), (), _identity(version, start), at + end - start, ())
                start, first_row = at + end, row + data.count(b"\n")
            row += data.count(b"\n")
            at += len(data)
    yield Unit(0, (Span(file, start, at, first_row),), (), _identity(version, start), at - start, (file,))


def _of_rows(file: File, status: os.stat_result, options: SourceOptions, size: int) -> Iterator[Unit]:
    """Rows of about `size` bytes together."""
    read = 0

    def count(data: bytes) -> None:
        nonlocal read
        read = min(read + len(data), status.st_size)  # formats that are not read in order come to some bytes twice

    version, done, index = _version(file, status), 0, 0
    rows: list[Document | Bad] = []
    held = 0
    for row in read_file(file, options, count):
        rows.append(row)
        held += ROW_BYTES + (len(row.text.encode()) if isinstance(row, Document) else 0)
        if held >= size:
            yield Unit(0, (), tuple(rows), _identity(version, index), read - done, ())
            rows, held, done, index = [], 0, read, index + 1
    yield Unit(0, (), tuple(rows), _identity(version, index), status.st_size - done, (file,))


def _version(file: File, status: os.stat_result) -> tuple[object, ...]:
    return str(file.path), file.format, status.st_size, status.st_mtime_ns


def _identity(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()
