"""Shards: JSON lines in Zstandard, one document a line, and beside each what was counted when it was made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._core.files import replace_bytes, replacing
from ..compression import open_bytes, zstandard
from ..document import Document

LEVEL = 1
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Shard:
    """The files of one unit."""

    folder: Path
    number: int

    @property
    def path(self) -> Path:
        """The documents."""
        return self.folder / f"documents-{self.number:05d}.jsonl.zst"

    @property
    def record_path(self) -> Path:
        """What was counted; written after the documents, so that where it is, they are."""
        return self.folder / f"documents-{self.number:05d}.json"

    @property
    def signatures_path(self) -> Path:
        """What its documents are compared with others by."""
        return self.folder / f"documents-{self.number:05d}.signatures.npy"

    @property
    def lines_path(self) -> Path:
        """The hashes of its lines."""
        return self.folder / f"documents-{self.number:05d}.lines.npy"

    @property
    def _parts(self) -> list[Path]:
        return [self.path, self.signatures_path, self.lines_path]

    def load(self, key: str) -> dict[str, Any] | None:
        """What was counted, if the shard is there, whole, and was made under `key`."""
        try:
            record = json.loads(self.record_path.read_bytes())
            there = record["key"] == key and record["parts"] == self._sizes()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if there else None

    def write(self, documents: Iterable[Document], finish: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Write all documents, then what `finish`, which may write the other parts, says once they are there."""
        self.remove()
        with replacing(self.path) as temporary, zstandard().ZstdFile(temporary, "wb", level=LEVEL) as file:
            file.write(b"")  # else nothing at all is written where no document comes
            for found in documents:
                file.write(_line(found))
        counted = finish() | {"parts": self._sizes()}
        replace_bytes(self.record_path, (json.dumps(counted, ensure_ascii=False) + "\n").encode())
        return counted

    def remove(self) -> None:
        """Remove all its files."""
        for path in (self.record_path, *self._parts):
            path.unlink(missing_ok=True)

    def _sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self._parts if path.exists()}


def read_shard(path: Path, on_bytes: Callable[[bytes], object] | None = None) -> Iterator[Document]:
    """The documents of a shard, in order."""
    with open_bytes(path, on_bytes) as file:
        for line in file:
            yield Document(**json.loads(line))


def shards(folder: Path) -> list[Shard]:
    """The shards that are there, by number."""
    names = sorted(path.name for path in folder.glob("documents-*.json"))
    return [Shard(folder, int(name[len("documents-") : -len(".json")])) for name in names]


def _line(found: Document) -> bytes:
    return _ENCODER.encode(found._asdict()).encode() + b"\n"
