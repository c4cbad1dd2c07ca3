"""WARC, the format of web crawls: pages as they were sent, and text already taken out of them (WET)."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, BinaryIO

from ..compression import BUFFER, compression, needs
from ..document import Document
from .base import Bad, Rows, SourceOptions, too_long
from .text import decode_page

PAGES = ("text/html", "application/xhtml+xml", "text/plain")
MOST_HEADERS = 1 << 16  # bytes of HTTP before the page
END = b"\r\n\r\n"  # of every record


def fastwarc() -> Any:
    """The module that parses WARC."""
    try:
        from fastwarc import warc
    except ModuleNotFoundError:
        raise needs("fastwarc", "to read WARC files") from None
    return warc


def read_warc(file: BinaryIO, path: Path, options: SourceOptions) -> Rows:
    """One document for each page that was sent with status 200, and for each record of text; others are passed over.

    A row's number counts all records of these types. meta has "url", "date" and "media_type".

    Args:
        file: the file's content; of a .gz its own bytes, which the library decompresses three times as fast as gzip,
            a record being an archive of its own.
    """
    warc = fastwarc()
    kinds = warc.WarcRecordType.response | warc.WarcRecordType.resource | warc.WarcRecordType.conversion
    zipped = compression(path) == ".gz"
    row = last = size = 0
    for row, record in enumerate(warc.ArchiveIterator(file, kinds, parse_http=False, stream_detect=zipped), start=1):
        last, size = record.stream_pos, record.content_length
        most = min(record.content_length, options.max_bytes + MOST_HEADERS)
        block = record.reader.read(most)
        if len(block) < most:
            raise EOFError
        if found := _from_record(record, block, path, row, options):
            yield found
    if not _ends_whole(path, last):
        cut = row + bool(size or not row)  # of one that is cut in its header the library makes a record without content
        yield Bad(str(path), cut, "truncated", "ends in the middle of a record: it was cut short")


def _from_record(record: Any, block: bytes, path: Path, row: int, options: SourceOptions) -> Document | Bad | None:
    name, status, charset = str(path), 200, "utf-8"
    media = record.headers.get("Content-Type") or ""
    if record.is_http:
        record.set_bytes_content(block)
        try:
            record.parse_http(auto_decode="all")
            block = record.reader.read()
        except OSError as error:
            return Bad(name, row, "malformed", f"is not HTTP ({error})")
        media, charset = record.http_content_type or "", record.http_charset or ""
        status = record.http_headers.status_code if record.http_headers else 0
    media = media.split(";")[0].strip().lower()
    if media not in PAGES or status != 200:
        return None
    if len(block) > options.max_bytes or record.content_length > options.max_bytes + MOST_HEADERS:
        return too_long(name, row, options)
    headers = record.headers
    meta = {"url": headers.get("WARC-Target-URI"), "date": headers.get("WARC-Date"), "media_type": media}
    return decode_page(block, name, row, options, charset, meta)


def _ends_whole(path: Path, start: int) -> bool:
    """Whether the records from position `start` of a file on are whole, of which the library says nothing."""
    if compression(path) not in ("", ".gz"):
        return True  # the stream has said so
    with open(path, "rb") as file:
        if not compression(path):
            file.seek(max(start, path.stat().st_size - len(END)))
            return file.read() in (END, b"")
        file.seek(start)
        member = zlib.decompressobj(31)
        while data := file.read(BUFFER):
            while data:
                if member.eof:
                    member = zlib.decompressobj(31)
                member.decompress(data)
                data = member.unused_data
        return member.eof or file.tell() == start
