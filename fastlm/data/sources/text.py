"""Plain text, cut into documents at a separator, and whole HTML pages."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...errors import DataError
from .. import reading
from ..document import Document
from .base import Bad, Rows, SourceOptions, checked, too_long

_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([a-zA-Z0-9_:.\-]+)", re.I)
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# What browsers read under these names (the Encoding Standard of the WHATWG): supersets of what the names say.
_READ_AS = {
    "gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "shift_jis": "cp932", "euc_kr": "cp949",
    "iso8859-1": "cp1252", "ascii": "cp1252", "iso8859-9": "cp1254", "tis-620": "cp874",
}  # fmt: skip


def read_text(file: BinaryIO, path: Path, options: SourceOptions) -> Rows:
    """The documents of plain text."""
    name, row = str(path), 1
    errors = "replace" if options.errors == "replace" else "strict"
    texts = reading.decode(file, path, options.encoding, errors, options.chunk_bytes)
    if options.line_endings == "lf":
        texts = reading.unix_line_endings(texts)
    try:
        for row, pieces in enumerate(reading.documents(reading.cut(texts, options.document_separator)), start=1):
            text = _joined(pieces, options.max_bytes)
            yield too_long(name, row, options) if text is None else checked(Document(text, name, row), options)
    except DataError as error:
        yield Bad(name, row, "undecodable", str(error).removeprefix(f"{name}: "))


def _joined(pieces: Iterator[str], limit: int) -> str | None:
    """The text, or None if it has more than `limit` characters."""
    kept, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > limit:
            return None
        kept.append(piece)
    return "".join(kept)


def read_html(file: BinaryIO, path: Path, options: SourceOptions) -> Rows:
    """A page as it stands, tags and all; meta["media_type"] tells steps what it is."""
    name = str(path)
    data = file.read(options.max_bytes + 1)
    if len(data) > options.max_bytes:
        yield too_long(name, 1, options)
        return
    declared = "" if options.encoding == "utf-8" else options.encoding
    yield decode_page(data, name, 1, options, declared, {"media_type": "text/html"})


def decode_page(
    data: bytes, source: str, row: int, options: SourceOptions, declared: str, meta: dict
) -> Document | Bad:
    """A page of the web as a document.

    It is in the encoding of its byte order mark, else the declared one, else the one that it names itself, else UTF-8.
    """
    encoding = _page_encoding(data, declared)
    try:
        text = data.decode(encoding, "replace" if options.errors == "replace" else "strict")
    except UnicodeError as error:
        return Bad(source, row, "undecodable", f"is not {encoding} text ({error})")
    return checked(Document(text.removeprefix("\ufeff"), source, row, meta), options)


def _page_encoding(data: bytes, declared: str) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    named = _CHARSET.search(data[:1024])
    for name in (declared, named[1].decode("ascii") if named else ""):
        try:
            encoding = codecs.lookup(name).name
            b"a".decode(encoding)
        except (LookupError, ValueError):
            continue
        if encoding.startswith("utf-16") and named:  # a page whose own name for it can be read is not UTF-16
            return "utf-8"
        return _READ_AS.get(encoding, encoding)
    return "utf-8"
