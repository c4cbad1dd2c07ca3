"""The manifest of a prepared folder, and the checked way to its tokens."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .files import sha256_file

FORMAT_VERSION = 1
SPLITS = ("train", "val")
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
                raise DataError(f"{source}: format_version is {version}, expected {FORMAT_VERSION}")
            manifest = cls(**{f.name: values[f.name] for f in fields(cls)})
            for split in SPLITS:
                tokens = manifest.splits[split]["tokens"]
                if not isinstance(tokens, int) or tokens < 0:
                    raise DataError(f"{source}: {split} has {tokens!r} tokens, expected a count")
        except KeyError as error:
            raise DataError(f"{source}: the entry {error} is missing") from None
        except (json.JSONDecodeError, AttributeError, TypeError) as error:
            raise DataError(f"{source}: not a manifest ({error})") from None
        if manifest.dtype not in DTYPES:
            raise DataError(f"{source}: dtype is {manifest.dtype!r}, expected one of {', '.join(DTYPES)}")
        return manifest


def load_manifest(folder: str | os.PathLike[str], verify: bool = False) -> Manifest:
    """Read a prepared folder's manifest and check that the folder matches it.

    Args:
        verify: also compare the sha256 of the token files, which reads them.

    Raises:
        DataError: a file is missing, of another length, or the tokenizer is another one.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(f"{folder}: not a prepared folder (manifest.json is missing); make one with: fastlm prepare")
    manifest = Manifest.from_json(path.read_text(encoding="utf-8", errors="replace"), str(path))
    for split in SPLITS:
        _check_tokens(folder / f"{split}.bin", manifest, split, verify)
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


def _check_tokens(path: Path, manifest: Manifest, split: str, verify: bool) -> None:
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
    if verify and sha256_file(path) != manifest.splits[split]["sha256"]:
        raise DataError(f"{path}: its sha256 is not the manifest's; the file was changed")
