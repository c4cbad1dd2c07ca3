"""Tables for people and for pipes: drawn by rich in a terminal, aligned plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", left: int = 1, stream: TextIO | None = None
) -> None:
    """Print a table.

    Args:
        headers, rows: cells as text, one a column.
        title: a line above.
        left: columns that are aligned to the left, from the first on; the others are numbers.
        stream: standard output by default.
    """
    stream = stream or sys.stdout
    if stream.isatty():
        _print_rich(headers, rows, title, left, stream)
    else:
        stream.write(plain_table(headers, rows, title, left))


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", left: int = 1) -> str:
    """The table as aligned text, each line ended."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        parts = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(parts).rstrip()

    lines = [title] if title else []
    lines += [line(headers), *(line(row) for row in rows)]
    return "\n".join(lines) + "\n"


def _print_rich(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str, left: int, stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left")
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i < left else "right", no_wrap=i < left)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(file=stream).print(table)
