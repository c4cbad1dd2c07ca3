"""Parquet and Arrow, a few rows at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..compression import BUFFER, compression, needs
from .base import Bad, Rows, SourceOptions, document, missing_column

BATCH_BYTES = 1 << 22  # of text, turned into Python's objects at once
MOST_ROWS = 1024


def pyarrow() -> Any:
    """The pyarrow module."""
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise needs("pyarrow", "to read Parquet and Arrow files") from None
    return pyarrow


def damages() -> tuple[type[BaseException], ...]:
    """What a damaged file makes pyarrow raise; an OSError of its own has no number."""
    return (pyarrow().ArrowException,)


def read_parquet(
    file: BinaryIO, path: Path, options: SourceOptions, groups: Sequence[int] | None = None, first_row: int = 1
) -> Rows:
    """One document a row.

    Args:
        groups: the row groups to read; None for all.
        first_row: the number of the first row of these.
    """
    pyarrow()
    from pyarrow import parquet

    with _seekable(file, path) as whole, parquet.ParquetFile(whole) as table:
        if missing := _missing(table.schema_arrow.names, path, options):
            yield missing
            return
        meta = table.metadata
        chosen = list(range(meta.num_row_groups) if groups is None else groups)
        row = first_row
        for group in chosen:
            size = _rows_at_once(meta.row_group(group).total_byte_size, meta.row_group(group).num_rows)
            batches = table.iter_batches(size, row_groups=[group], columns=options.columns, use_threads=False)
            for batch in batches:
                yield from _documents(batch, path, options, row)
                row += batch.num_rows


def row_groups(path: Path, size: int) -> Iterator[tuple[range, int, int]]:
    """Groups of about `size` bytes when decompressed, as (row groups, number of the first row, bytes)."""
    pyarrow()
    from pyarrow import parquet

    meta = parquet.read_metadata(path)
    begun = first = rows = held = 0
    for group in range(meta.num_row_groups):
        held += meta.row_group(group).total_byte_size
        rows += meta.row_group(group).num_rows
        if held >= size or group == meta.num_row_groups - 1:
            yield range(begun, group + 1), first + 1, held
            begun, first, held = group + 1, rows, 0


def last_row(path: Path, stop: int | None) -> int | None:
    """The number of the last row of the row groups before `stop`; None where the file does not say."""
    if compression(path):
        return None
    from pyarrow import ArrowException, parquet

    try:
        meta = parquet.read_metadata(path)
        return sum(meta.row_group(group).num_rows for group in range(meta.num_row_groups if stop is None else stop))
    except (ArrowException, OSError):
        return None


def read_arrow(file: BinaryIO, path: Path, options: SourceOptions) -> Rows:
    """One document a row of an Arrow file (Feather, version 2) or stream, which `datasets` writes."""
    arrow = pyarrow()
    start = file.read(6)
    file.seek(0)
    if start == b"ARROW1":
        with _seekable(file, path) as whole:
            reader = arrow.ipc.open_file(whole)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            yield from _all(batches, reader.schema.names, path, options)
        return
    reader = arrow.ipc.open_stream(file)
    yield from _all(reader, reader.schema.names, path, options)


def _all(batches: Iterable[Any], names: list[str], path: Path, options: SourceOptions) -> Rows:
    if missing := _missing(names, path, options):
        yield missing
        return
    row = 1
    for batch in batches:
        held = batch.select(options.columns)
        size = _rows_at_once(held.get_total_buffer_size(), batch.num_rows)
        for start in range(0, batch.num_rows, size):
            yield from _documents(held.slice(start, size), path, options, row + start)
        row += batch.num_rows


def _documents(batch: Any, path: Path, options: SourceOptions, row: int) -> Rows:
    names = batch.schema.names
    columns = [column.to_pylist() for column in batch.columns]
    for number, values in enumerate(zip(*columns, strict=True), start=row):
        yield document(dict(zip(names, values, strict=True)), str(path), number, options)


def _missing(names: list[str], path: Path, options: SourceOptions) -> Bad | None:
    column = next((column for column in options.columns if column not in names), None)
    return None if column is None else Bad(str(path), 0, "no column", missing_column(column, names))


def _rows_at_once(size: int, rows: int) -> int:
    return max(1, min(MOST_ROWS, BATCH_BYTES * rows // max(size, 1)))


@contextmanager
def _seekable(file: BinaryIO, path: Path) -> Iterator[Any]:
    """The file, of a compressed one a decompressed copy without a name: these formats are read from their end."""
    if not compression(path):
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        while data := file.read(BUFFER):
            copy.write(data)
        copy.seek(0)
        yield copy
