"""Which files are read, and as what."""

from __future__ import annotations

import glob as globbing
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import DataError
from .. import reading
from ..compression import COMPRESSIONS, compression

FORMATS = ("text", "html", "jsonl", "csv", "tsv", "parquet", "arrow", "warc")
EXTENSIONS = {
    ".html": "html", ".htm": "html", ".xhtml": "html", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow",
    ".feather": "arrow", ".ipc": "arrow", ".warc": "warc", ".wet": "warc",
}  # fmt: skip


class File(NamedTuple):
    """A file to read: its path as the user named it, and one of `FORMATS`."""

    path: Path
    format: str

    @property
    def is_text(self) -> bool:
        """Whether its documents are text as it stands, which can be read in pieces of a document."""
        return self.format in ("text", "html")


def find(inputs: Sequence[Path], globs: Sequence[str], form: str = "auto") -> list[File]:
    """The files that `inputs` name, each once, in order.

    Args:
        inputs: files; folders, searched for `globs` recursively and sorted; patterns such as "dumps/*.jsonl.gz"; and
            folders that the `datasets` library wrote, of which the Arrow files are read in its order.
        form: one of `FORMATS`, or "auto" to go by each file's name, where what is not known is text.

    Raises:
        DataError: an input does not exist or holds nothing that matches.
        ConfigError: one of `globs` is not a pattern of names in a folder.
    """
    paths: list[Path] = []
    for path in inputs:
        paths += _dataset(path) or _expanded(path)
    found: dict[Path, File] = {}
    for path in paths:
        for file in _named(path, globs):
            found.setdefault(file.resolve(), File(file, format_of(file) if form == "auto" else form))
    return list(found.values())


def format_of(path: Path) -> str:
    """The format that a file's name tells, beneath a compression; "text" where it tells none."""
    inner = path.with_suffix("") if compression(path) else path
    return EXTENSIONS.get(inner.suffix.lower(), "text")


def _expanded(path: Path) -> list[Path]:
    """The paths that a pattern matches; the path itself where it is none, or is there."""
    if path.exists() or not globbing.has_magic(str(path)):
        return [path]
    matches = [Path(name) for name in sorted(globbing.glob(str(path), recursive=True))]
    files = [match for match in matches if match.is_file()]
    if not files:
        raise DataError(f"{path}: no file matches this pattern")
    return files


def _named(path: Path, globs: Sequence[str]) -> list[Path]:
    try:
        return reading.find_files([path], globs)
    except DataError as error:
        if not path.is_dir():
            raise
        endings = sorted({_ending(file) for file in path.rglob("*") if file.is_file()} & _known_endings())
        there = " ".join(f"'*{ending}'" for ending in endings)
        raise DataError(f"{error}; for what is there, give --glob {there}" if there else str(error)) from None


def _ending(path: Path) -> str:
    return "".join(path.suffixes[-2:] if compression(path) else path.suffixes[-1:]).lower()


def _known_endings() -> set[str]:
    plain = {*EXTENSIONS, ".txt", ".md"}
    return plain | {ending + compressed for ending in plain for compressed in COMPRESSIONS}


def _dataset(path: Path) -> list[Path]:
    """The Arrow files of a folder that `datasets` saved, or of each split of one; none for another folder."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return [file for split in splits for file in _dataset(path / split)]
        if not (path / "state.json").is_file():
            return []
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path / entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a folder that datasets wrote ({type(error).__name__}: {error})") from None
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: missing, but named by {path / 'state.json'}")
    return files
