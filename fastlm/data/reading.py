"""Reading text in bounded chunks: find files, decode, clean, and split into documents."""

from __future__ import annotations

import codecs
import io
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import BinaryIO, Literal

from ..errors import ConfigError, DataError
from .compression import BUFFER, damages, one_line, open_bytes
from .pieces import PieceCutter

LONGEST_BLANK = 1 << 16
_SURROGATE = re.compile("[\ud800-\udfff]")

# In a stream of events a string is text and None is the end of a document.
Events = Iterator["str | None"]


def find_files(inputs: Sequence[Path], globs: Sequence[str]) -> list[Path]:
    """The files that `inputs` name, each once: files as given, folders searched recursively and sorted.

    Raises:
        DataError: an input does not exist, or a folder holds no file that matches `globs`.
        ConfigError: one of `globs` is not a pattern of names in a folder.
    """
    found: dict[Path, Path] = {}
    for path in inputs:
        files = _in_folder(path, globs) if path.is_dir() else [path]
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if not path.is_dir() and not path.is_file():
            raise DataError(f"{path}: not a regular file; it is read more than once, so a pipe will not do")
        if not files:
            raise DataError(f"{path}: no file in this folder matches {' or '.join(globs)}")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _in_folder(folder: Path, globs: Sequence[str]) -> list[Path]:
    found: set[Path] = set()
    for glob in globs:
        try:
            found.update(file for file in folder.rglob(glob) if file.is_file())
        except (NotImplementedError, ValueError) as error:  # an absolute one, or ** beside other characters
            raise ConfigError(f"glob is {glob!r}, expected a pattern of names in a folder: {error}") from None
    return sorted(found)


def check_encoding(name: str) -> None:
    """Raise ConfigError unless Python can decode text of this encoding in chunks."""
    try:
        codecs.getincrementaldecoder(name)
        b"a".decode(name)
    except UnicodeDecodeError:
        pass  # half a character of a known encoding
    except (LookupError, ValueError):  # of a name with a null character, and of the codec "undefined"
        raise ConfigError(f"encoding={name!r} is not a text encoding that Python knows") from None


def read_text(
    path: Path,
    encoding: str = "utf-8",
    errors: str = "strict",
    chunk_bytes: int = 1 << 20,
    on_bytes: Callable[[bytes], None] = lambda data: None,
) -> Iterator[str]:
    """Decode a file, which may be compressed, chunk by chunk.

    Args:
        errors: "strict", or "replace" for U+FFFD in place of what cannot be decoded.
        on_bytes: called with the file's own bytes as they are read.

    Raises:
        DataError: names the file and the offset of the first byte that cannot be decoded.
    """
    try:
        with open_bytes(path, on_bytes, buffer=min(chunk_bytes, BUFFER)) as file:
            yield from decode(file, path, encoding, errors, chunk_bytes)
    except damages() as error:
        raise DataError(f"{path}: the compressed file is damaged or cut short ({one_line(error)})") from None


def decode(file: BinaryIO, path: Path, encoding: str, errors: str, chunk_bytes: int) -> Iterator[str]:
    """Decode an open file; `path` is for messages, else as `read_text`."""
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    may_be_lone = codecs.lookup(encoding).name != "utf-8"  # unicode_escape and utf-7 give lone surrogates
    end = chars = 0
    while True:
        data = file.read(chunk_bytes)
        end += len(data)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # The error's object ends where this chunk ends, but may begin with bytes of the one before.
            offset = end - len(error.object) + error.start
            raise DataError(
                f"{path}: byte {offset} ({error.object[error.start]:#04x}) is not {encoding} text"
                f" ({error.reason}); give the file's encoding, or errors=replace"
            ) from None
        except UnicodeError as error:  # no byte order mark, for one
            raise DataError(f"{path}: not {encoding} text ({error}); give the file's encoding") from None
        if may_be_lone and not text.isascii() and (lone := _SURROGATE.search(text)):
            if errors == "strict":
                raise DataError(f"{path}: character {chars + lone.start()} ({lone[0]!a}) is a lone surrogate")
            text = _SURROGATE.sub("\ufffd", text)
        chars += len(text)
        if text:
            yield text
        if not data:
            return


def unix_line_endings(texts: Iterable[str]) -> Iterator[str]:
    """Turn CR LF and lone CR into LF, also where a chunk ends between CR and LF."""
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for text in texts:
        yield decoder.decode(text)
    yield decoder.decode("", final=True)


def normalized(texts: Iterable[str], form: Literal["NFC", "NFKC"]) -> Iterator[str]:
    """Unicode normalisation in pieces; the same as of the whole text."""

    def normalize(text: str) -> str:
        return unicodedata.normalize(form, text)

    return map(normalize, PieceCutter(normalize)(texts))


class Separator:
    """What stands between two documents of one file: a string, or "blank-line" for blank lines.

    Of blank lines, `LONGEST_BLANK` characters at most are one separator, so that no text makes a reader wait for more.
    """

    def __init__(self, text: str) -> None:
        self._blank_line = text == "blank-line"
        self._length = LONGEST_BLANK if self._blank_line else len(text)
        # Not a repeated group, which would keep a place to return to for every line: 100 bytes a line.
        blank = rf"\n[ \t\r\n]{{0,{LONGEST_BLANK - 2}}}\n"
        self.pattern = re.compile(blank if self._blank_line else re.escape(text))

    def final(self, text: str) -> int:
        """Length of the part of `text` in which no later text can begin or extend a separator."""
        near = max(0, len(text) - self._length + 1)
        if not self._blank_line:
            return near
        begins = text.find("\n", max(near, len(text.rstrip(" \t\r\n"))))
        return len(text) if begins < 0 else begins


def split_documents(texts: Iterable[str], separator: Separator | None) -> Events:
    """Cut a file's text at a separator, which is dropped; without one the whole file is a document."""
    buffer = ""
    for text in texts:
        if separator is None:
            yield text
            continue
        buffer += text
        final = separator.final(buffer)
        start = 0
        for match in separator.pattern.finditer(buffer):
            if match.start() >= final:
                break  # later text may extend this one
            yield buffer[start : match.start()]
            yield None
            start = match.end()
        if final > start:
            yield buffer[start:final]
            start = final
        buffer = buffer[start:]
    last = separator.pattern.split(buffer) if separator else [buffer]
    for text in last:
        yield text
        yield None


def cut(texts: Iterable[str], separator: str) -> Events:
    """Cut a file's text at what `PrepareConfig.document_separator` names."""
    text = separator.replace("\\n", "\n").replace("\\t", "\t")
    return split_documents(texts, None if text == "none" else Separator(text))


def documents(events: Events) -> Iterator[Iterator[str]]:
    """The texts of each document in turn; what a caller leaves unread of one is skipped."""
    for first in events:
        rest = takewhile(lambda event: event is not None, events)
        texts = iter(()) if first is None else chain((first,), rest)
        yield texts  # type: ignore[misc]
        deque(texts, maxlen=0)
