"""Columns of numbers on the disk, of which parts are read."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from ..._core.files import replacing
from ...errors import DataError


def save(path: str | os.PathLike[str], columns: np.ndarray) -> None:
    """Write (columns, rows) of uint64, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, columns)


class Stored:
    """What `save` wrote. Parts of it are read, not mapped: mapped pages would count as the process's memory.

    Raises:
        DataError: the file is missing, damaged, or has another number of columns than is expected.
    """

    def __init__(self, path: str | os.PathLike[str], columns: int | None = None) -> None:
        self.path = Path(path)
        try:
            with open(path, "rb") as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                self._start = file.tell()
            whole = (
                len(shape) == 2
                and dtype == np.uint64
                and self.path.stat().st_size == self._start + 8 * math.prod(shape)
            )
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not readable as signatures ({error})") from None
        if not whole:
            raise DataError(f"{path}: not readable as signatures (damaged)")
        self.columns, self.count = shape
        if columns not in (None, self.columns):
            raise DataError(f"{path}: has {self.columns} columns, expected {columns}: made with other options")

    def read(self, column: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Rows of one column."""
        end = self.count if end is None else end
        return np.fromfile(self.path, np.uint64, end - start, offset=self._start + 8 * (self.count * column + start))

    def search(self, column: int, value: int) -> int:
        """How many rows of a column that ascends are below a value."""
        low, high = 0, self.count
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if int(self.read(column, middle, middle + 1)[0]) < value else (low, middle)
        return low
