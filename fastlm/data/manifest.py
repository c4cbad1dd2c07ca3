"""The manifest of a prepared folder, and the checked way to its tokens."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError, shown
from .files import sha256_file

FORMAT_VERSION = 1
SPLITS = ("train", "val")
COUNTS = ("tokens", "documents", "bytes", "chars")  # of a split
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass
class Manifest:
    """What a prepared folder holds.

    Args:
        dtype: "uint16" or "uint32", little-endian.
        vocab_size: number of token ids, of which a model needs at least as many.
        tokenizer_fingerprint: sha256 of tokenizer.json.
        eot_id: the token written after each document, if the tokenizer has one.
        splits: for "train" and "val": tokens, documents, sha256 of the file, and the bytes (as UTF-8) and
            chars of the text that the tokens encode.
        sources: path, bytes and sha256 of each file read.
        preparation: the options, and what they did.
    """

    dtype: str
    vocab_size: int
    tokenizer_fingerprint: str
    eot_id: int | None
    splits: dict[str, dict[str, Any]]
    sources: list[dict[str, Any]]
    preparation: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "manifest.json") -> Manifest:
        """Read the text of a manifest.json; DataError if it is not one of this version."""
        values = _parse(text, source)
        version = values.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise DataError(f"{source}: format_version is {shown(version)}, expected {FORMAT_VERSION}")
        missing = [f.name for f in fields(cls) if f.name not in values]
        if missing:
            raise DataError(f"{source}: the entry {missing[0]!r} is missing")
        manifest = cls(**{f.name: values[f.name] for f in fields(cls)})
        _check_values(manifest, source)
        return manifest

    def hashes(self) -> dict[str, str]:
        """sha256 of each split's tokens."""
        return {split: self.splits[split]["sha256"] for split in SPLITS}


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except RecursionError:
        raise DataError(f"{source}: not a manifest (nested too deeply)") from None
    except ValueError as error:  # not JSON, or a number of too many digits
        raise DataError(f"{source}: not a manifest ({error})") from None
    if not isinstance(values, dict):
        raise DataError(f"{source}: not a manifest (a {type(values).__name__}, expected an object)")
    return values


def _check_values(manifest: Manifest, source: str) -> None:
    dtype = manifest.dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DataError(f"{source}: dtype is {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    largest = 1 << 8 * DTYPES[dtype].itemsize
    if not _is_count(manifest.vocab_size) or not 0 < manifest.vocab_size <= largest:
        raise DataError(f"{source}: vocab_size is {shown(manifest.vocab_size)}, expected 1 to {largest} for {dtype}")
    eot = manifest.eot_id
    if eot is not None and (not _is_count(eot) or eot >= manifest.vocab_size):
        raise DataError(f"{source}: eot_id is {shown(eot)}, expected null or less than {manifest.vocab_size}")
    for name, kind, word in (
        ("tokenizer_fingerprint", str, "text"), ("splits", dict, "an object"), ("sources", list, "a list"),
        ("preparation", dict, "an object"),
    ):  # fmt: skip
        value = getattr(manifest, name)
        if not isinstance(value, kind):
            raise DataError(f"{source}: {name} is {shown(value)}, expected {word}")
    for split in SPLITS:
        _check_split(manifest.splits, split, source)


def _check_split(splits: dict[str, Any], split: str, source: str) -> None:
    if split not in splits:
        raise DataError(f"{source}: the entry {split!r} is missing")
    entry = splits[split]
    if not isinstance(entry, dict):
        raise DataError(f"{source}: {split} is {shown(entry)}, expected an object")
    for name in COUNTS:
        if name not in entry:
            raise DataError(f"{source}: the entry {name!r} of {split} is missing")
        if not _is_count(entry[name]):
            raise DataError(f"{source}: {split} has {shown(entry[name])} {name}, expected a count")
    if entry["tokens"] and not (entry["bytes"] and entry["chars"]):
        raise DataError(f"{source}: {split} has {entry['tokens']} tokens of no text")
    if not isinstance(entry.get("sha256"), str):
        raise DataError(f"{source}: sha256 of {split} is {shown(entry.get('sha256'))}, expected text")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def load_manifest(folder: str | os.PathLike[str], verify: bool | Literal["changed"] = False) -> Manifest:
    """Read a prepared folder's manifest and check that the folder matches it.

    Args:
        verify: also compare the sha256 of the token files, which reads them; "changed": of those alone that were
            written, or whose times were set, after the manifest, which `prepare` writes last.

    Raises:
        DataError: a file is missing, of another length, of other content, or the tokenizer is another one.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(f"{folder}: not a prepared folder (manifest.json is missing); make one with: fastlm prepare")
    manifest = Manifest.from_json(path.read_text(encoding="utf-8", errors="replace"), str(path))
    for split in SPLITS:
        file = folder / f"{split}.bin"
        _check_length(file, manifest, split)
        if verify is True or (verify and _later(file, path)):
            _check_content(file, manifest, split)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise DataError(f"{tokenizer}: missing")
    got = sha256_file(tokenizer)
    if got != manifest.tokenizer_fingerprint:
        raise DataError(
            f"{tokenizer}: its fingerprint is {got[:16]}, but the tokens were made with"
            f" {manifest.tokenizer_fingerprint[:16]}; prepare the data again or put that tokenizer back"
        )
    return manifest


def manifest_beside(path: Path) -> Manifest | None:
    """The manifest of a prepared folder, or of the one that a file lies in; None where there is none to be read."""
    found = (path if path.is_dir() else path.parent) / "manifest.json"
    try:
        return Manifest.from_json(found.read_text(encoding="utf-8"), str(found))
    except (OSError, UnicodeDecodeError, DataError):
        return None


def _later(file: Path, other: Path) -> bool:
    """Whether a file was written after another, or anything was done to it that left an older time of writing."""
    one, two = file.stat(), other.stat()
    return one.st_mtime_ns > two.st_mtime_ns or one.st_ctime_ns > two.st_ctime_ns


def load_tokens(folder: str | os.PathLike[str], split: str) -> np.memmap:
    """The token ids of a split: (tokens,) uint16 or uint32, memory-mapped, read-only.

    Raises:
        DataError: as `load_manifest`; or no such split, or an empty one.
    """
    if split not in SPLITS:
        raise DataError(f"split={split!r}, expected one of {', '.join(SPLITS)}")
    manifest = load_manifest(folder)
    path = Path(folder) / f"{split}.bin"
    if manifest.splits[split]["tokens"] == 0:
        raise DataError(f"{path}: the split is empty (prepared with val_fraction=0?)")
    return np.memmap(path, dtype=DTYPES[manifest.dtype], mode="r")


def _check_length(path: Path, manifest: Manifest, split: str) -> None:
    if not path.is_file():
        raise DataError(f"{path}: missing")
    tokens = manifest.splits[split]["tokens"]
    want = tokens * DTYPES[manifest.dtype].itemsize
    got = path.stat().st_size
    if got != want:
        raise DataError(
            f"{path}: {got} bytes, expected {want} ({tokens} tokens of {manifest.dtype});"
            " the file was cut short or replaced"
        )


def _check_content(path: Path, manifest: Manifest, split: str) -> None:
    if sha256_file(path) != manifest.splits[split]["sha256"]:
        raise DataError(f"{path}: its sha256 is not the manifest's; the file was changed")
