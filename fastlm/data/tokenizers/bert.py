"""BERT's vocab.txt: a token a line, its id the line's number."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ...errors import DataError
from .special import TRAINED

UNKNOWN = "[UNK]"


def definition(path: Path) -> str:
    """The text of a tokenizer.json for a vocab.txt.

    Upper case is lowered unless tokenizer_config.json beside it says otherwise, or, without one, if no word of the
    vocabulary has any.

    Raises:
        DataError: not UTF-8, a token twice, or none for unknown words.
    """
    try:
        tokens = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a vocab.txt (byte {error.start} is not UTF-8)") from None
    tokens = [token.removesuffix("\r") for token in (tokens[:-1] if tokens[-1] == "" else tokens)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if UNKNOWN not in vocabulary:
        raise DataError(f"{path}: not a tokenizer.json, and as a BERT vocabulary it has no line {UNKNOWN}")
    if len(vocabulary) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocabulary[token] != number)
        raise DataError(f"{path}: the token {twice!r} is there twice")
    settings = _settings(path.parent / "tokenizer_config.json")
    cased = any(
        word != word.lower() for word in tokens if word not in TRAINED["masked"] and not word.startswith("[unused")
    )
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    as_bert(
        backend,
        lowercase=settings.get("do_lower_case", not cased),
        strip_accents=settings.get("strip_accents"),
        chinese=settings.get("tokenize_chinese_chars", True),
    )
    backend.add_special_tokens([token for token in TRAINED["masked"] if token in vocabulary])
    if "[CLS]" in vocabulary and "[SEP]" in vocabulary:
        backend.post_processor = processors.BertProcessing(
            ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
        )
    return backend.to_str()


def as_bert(
    backend: tokenizers.Tokenizer, lowercase: bool = True, strip_accents: bool | None = None, chinese: bool = True
) -> None:
    """Give a WordPiece BERT's rules: words and marks apart, each Chinese character by itself (Devlin et al. 2019)."""
    backend.normalizer = normalizers.BertNormalizer(True, chinese, strip_accents, lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()


def _settings(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    return found if isinstance(found, dict) else {}
