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
        try:
            values = json.loads(text)
            version = values.get("format_version")
            if version != FORMAT_VERSION:
                raise DataError(f"{source}: format_version is {shown(version)}, expected {FORMAT_VERSION}")
            manifest = cls(**{f.name: values[f.name] for f in fields(cls)})
            for split in SPLITS:
                _check_split(manifest.splits[split], f"{source}: {split}")
        except KeyError as error:
            raise DataError(f"{source}: the entry {error} is missing") from None
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise DataError(f"{source}: not a manifest ({error})") from None
        if manifest.dtype not in list(DTYPES):
            raise DataError(f"{source}: dtype is {shown(manifest.dtype)}, expected one of {', '.join(DTYPES)}")
        ids = 1 << 8 * DTYPES[manifest.dtype].itemsize
        if type(manifest.vocab_size) is not int or not 1 <= manifest.vocab_size <= ids:
            raise DataError(
                f"{source}: vocab_size is {shown(manifest.vocab_size)}, expected 1 to the {ids} of {manifest.dtype}"
            )
        if not isinstance(manifest.tokenizer_fingerprint, str):
            raise DataError(
                f"{source}: tokenizer_fingerprint is {shown(manifest.tokenizer_fingerprint)}, expected text"
            )
        return manifest

    def hashes(self) -> dict[str, str]:
        """sha256 of each split's tokens."""
        return {split: self.splits[split]["sha256"] for split in SPLITS}


def _check_split(entry: dict[str, Any], name: str) -> None:
    """Raise DataError unless a split's entry has what is read and divided by; KeyError where it lacks it."""
    for key in COUNTS:
        if type(entry[key]) is not int or not 0 <= entry[key] < 1 << 63:
            raise DataError(f"{name} has {shown(entry[key])} {key}, expected a count")
    if not isinstance(entry["sha256"], str):
        raise DataError(f"{name} has the sha256 {shown(entry['sha256'])}, expected text")
    if entry["tokens"] and not (entry["bytes"] and entry["chars"]):
        raise DataError(f"{name} has {entry['tokens']} tokens of no text")


def load_manifest(folder: str | os.PathLike[str], verify: bool | Literal["changed"] = False) -> Manifest:
    """Read a prepared folder's manifest and check that the folder matches it.

    Args:
        verify: also compare the sha256 of the token files, which reads them; "changed": of those alone that were
            written after the manifest, which `prepare` writes last.

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
        if verify is True or (verify and file.stat().st_mtime_ns > path.stat().st_mtime_ns):
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
