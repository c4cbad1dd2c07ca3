"""Which kind of tokenizer lies at a path, and its definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ...errors import DataError
from ..library import check_vocabulary, library_errors, quiet_panics
from . import bert, sentencepiece, tiktoken
from .special import END_OF_TEXT

_GPT2_PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_NAMES = ("vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.model", "*.tiktoken")
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def read_definition(path: Path) -> tuple[str, str]:
    """The text of a tokenizer.json for what lies at a path, and what to call it in errors.

    Raises:
        DataError: nothing there, or not a tokenizer.
    """
    for vocabulary, merges in _GPT2_PAIRS:
        folder = path.parent if path.name == vocabulary else path
        has_json = path.is_dir() and (path / "tokenizer.json").exists()
        if not has_json and (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _read_gpt2_pair(folder / vocabulary, folder / merges), str(folder)
    if path.is_dir():
        path = next(
            (found for found in (path / "tokenizer.json", *_others(path)) if found.is_file()), path / "tokenizer.json"
        )
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer; wanted a tokenizer.json, vocab.txt, .model or .tiktoken file,"
            " or a folder with one"
        )
    return _reader(path)(path), str(path)


def _others(folder: Path) -> list[Path]:
    return [path for name in _NAMES for path in sorted(folder.glob(name))]


def _reader(path: Path) -> Callable[[Path], str]:
    if path.suffix == ".txt":
        return lambda path: _checked(bert.definition, path, path)
    if path.suffix in (".model", ".tiktoken"):
        data = path.read_bytes()
        kind = tiktoken if path.suffix == ".tiktoken" or tiktoken.is_tiktoken(data) else sentencepiece
        return lambda path: _checked(kind.definition, path, data, str(path))
    return _read_json


def _checked(read: Callable[..., str], path: Path, *arguments: object) -> str:
    with quiet_panics(), library_errors(f"{path}: not a tokenizer"):
        return read(*arguments)


def _read_json(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a tokenizer.json (byte {error.start} is not UTF-8)") from None


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """GPT-2's rules around a BPE."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = BYTE_LEVEL
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_gpt2_pair(vocabulary: Path, merges: Path) -> str:
    with quiet_panics(), library_errors(f"{vocabulary} and {merges.name}: not a byte-level BPE"):
        backend = byte_level(models.BPE.from_file(str(vocabulary), str(merges)))
        check_vocabulary(backend.get_vocab(), str(vocabulary))  # to_str goes through all ids up to the largest
        if backend.token_to_id(END_OF_TEXT) is not None:
            backend.add_special_tokens([END_OF_TEXT])
    return backend.to_str(pretty=True)
