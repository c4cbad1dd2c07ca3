"""Compressed files, and plain ones, as one kind of stream: by the last part of their name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
BUFFER = 1 << 18


def zstandard() -> Any:
    """The module of Zstandard: the standard library's from Python 3.14 on, before that its backport."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ModuleNotFoundError:
        raise needs("backports.zstd", "to read and write .zst files") from None
    return zstd


def needs(package: str, purpose: str) -> DataError:
    """For a package of the extra `data` that is not installed."""
    return DataError(f"the package {package} is needed {purpose}: pip install {package}, or fastlm's extra: .[data]")


def compression(path: Path) -> str:
    """The extension that says how a file is compressed; "" for a plain one."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def damages() -> tuple[type[BaseException], ...]:
    """What a damaged or truncated archive raises."""
    errors: tuple[type[BaseException], ...] = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
    for name in ("compression.zstd", "backports.zstd"):
        if name in sys.modules:
            errors += (sys.modules[name].ZstdError,)
    return errors


def one_line(error: BaseException) -> str:
    """An error's message without line ends."""
    return " ".join(str(error).split())


class Watched(io.RawIOBase):
    """A part of a file whose bytes are shown to `on_bytes` as they are read.

    Args:
        start, stop: where the part begins and ends; None for the file's end.
    """

    def __init__(self, path: Path, on_bytes: Callable[[bytes], object] | None, start: int = 0, stop: int | None = None):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        self._on_bytes = on_bytes
        self._start = start
        self._stop = sys.maxsize if stop is None else stop
        self._file.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset + (self._start if whence == os.SEEK_SET else 0), whence) - self._start

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._stop - self._file.tell())]
        count = self._file.readinto(view) or 0
        if self._on_bytes is not None:
            self._on_bytes(bytes(view[:count]))
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def open_bytes(
    path: Path,
    on_bytes: Callable[[bytes], object] | None = None,
    start: int = 0,
    stop: int | None = None,
    decompress: bool = True,
    buffer: int = BUFFER,
) -> Iterator[BinaryIO]:
    """A file's content, decompressed if its name says that it is compressed.

    Args:
        on_bytes: called with the file's own bytes, compressed ones as they are, in order.
        start, stop: a part of a plain file.
        decompress: False for the file's own bytes.
        buffer: how many are read at once.

    Raises:
        EOFError: for an archive without a byte, and from a read, where one ends before its content does; `damages()`
            lists what else it raises.
    """
    raw = Watched(path, on_bytes, start, stop)
    with raw, io.BufferedReader(raw, buffer) as file:
        if compression(path) and not file.peek(1):  # to most of the libraries an archive of nothing
            raise EOFError("it has no bytes")
        kind = compression(path) if decompress else ""
        if not kind:
            yield file
            return
        with _opener(kind)(file) as content:
            yield content


def _opener(kind: str) -> Callable[[Any], Any]:
    if kind == ".gz":
        return lambda file: gzip.GzipFile(fileobj=file, mode="rb")
    if kind == ".zst":
        return zstandard().ZstdFile
    return {".xz": lzma.LZMAFile, ".bz2": bz2.BZ2File}[kind]


def lines(file: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """The lines of a file with their ends; None for one of more than `limit` bytes."""
    while line := file.readline(limit + 2):
        if len(line) <= limit + 1 or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(BUFFER)) and not rest.endswith(b"\n"):
            pass
        yield None
