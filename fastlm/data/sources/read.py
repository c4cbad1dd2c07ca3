"""One file, or a part of one, as documents: the reader of its format, over its decompressed bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .. import compression
from . import arrow, table, text, warc
from .base import Bad, Rows, SourceOptions
from .find import File


def read_file(
    file: File,
    options: SourceOptions,
    on_bytes: Callable[[bytes], object] | None = None,
    start: int = 0,
    stop: int | None = None,
    first_row: int = 1,
) -> Rows:
    """The documents of a file, and `Bad` for rows that cannot be read; damage to the file itself ends it.

    Args:
        on_bytes: called with the file's own bytes as they are read; Parquet's are not read in order, nor all.
        start, stop, first_row: a part of it, as `cut` gives: bytes of JSON lines, row groups of Parquet.

    Raises:
        DataError: a package is missing.
        OSError: the file cannot be opened or read.
    """
    row = first_row - 1
    part = (start, stop) if file.format == "jsonl" else (0, None)
    decompress = not (file.format == "warc" and compression.compression(file.path) == ".gz")
    try:
        with compression.open_bytes(file.path, on_bytes, *part, decompress) as content:
            for found in _reader(file, options, content, start, stop, first_row):
                row = found.row
                yield found
    except EOFError:
        reason = f"the file ends in the middle: it was cut short; {_lost(file, row + 1, stop)}"
        yield Bad(str(file.path), row + 1, "truncated", reason)
    except Exception as error:
        if not _is_damage(error):
            raise
        reason = f"not a sound {file.format} file ({compression.one_line(error)}); {_lost(file, row + 1, stop)}"
        yield Bad(str(file.path), row + 1, "damaged", reason)


def _lost(file: File, row: int, stop: int | None) -> str:
    """How much damage costs that is met before a row is read."""
    last = arrow.last_row(file.path, stop) if file.format == "parquet" else None
    if last is None or last < row:
        return f"everything from row {row} on is lost"
    return f"everything from row {row} to row {last} is lost, {last - row + 1:,} rows"


def _reader(
    file: File, options: SourceOptions, content: BinaryIO, start: int, stop: int | None, first_row: int
) -> Rows:
    path = file.path
    if file.format == "jsonl":
        return table.read_jsonl(content, path, options, first_row)
    if file.format == "parquet":
        return arrow.read_parquet(content, path, options, None if stop is None else range(start, stop), first_row)
    if file.format in ("csv", "tsv"):
        return table.read_csv(content, path, options, tabs=file.format == "tsv")
    readers: dict[str, Callable[[BinaryIO, Path, SourceOptions], Rows]] = {
        "text": text.read_text, "html": text.read_html, "arrow": arrow.read_arrow, "warc": warc.read_warc,
    }  # fmt: skip
    return readers[file.format](content, path, options)


def _is_damage(error: Exception) -> bool:
    """Whether an error tells of a file's content; bz2, pyarrow and fastwarc raise OSErrors without a number for it."""
    known = compression.damages() + (arrow.damages() if "pyarrow" in sys.modules else ())
    return isinstance(error, known) or (isinstance(error, OSError) and error.errno is None)
