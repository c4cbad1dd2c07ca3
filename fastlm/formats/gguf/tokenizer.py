"""The tokenizer that a GGUF file holds: a byte-level BPE as the tokenizer.json that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ...data import Tokenizer
from ...errors import CheckpointError, DataError
from .model import read_fields

SPECIAL_TYPES = (3, 4)  # control tokens, and those that a user added
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _words(digits: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", digits)), "isolated"), _bytes(use_regex=False)]
    )


# How text is cut into words that no merge crosses, under llama.cpp's names.
CUTS = {
    "gpt-2": lambda: _bytes(use_regex=True),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _bytes(use_regex=True)]),
    "llama-bpe": lambda: _words("{1,3}"),
    "qwen2": lambda: _words(""),
}


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file; its end of text is the one that the file names.

    Raises:
        DataError: for a kind that is not known; tokenizer.json beside the file is then needed.
        CheckpointError: if the `gguf` package is missing, or the file is damaged.
    """
    fields = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in read_fields(path).items()
        if name.startswith("tokenizer.ggml.")
    }
    kind, cut = fields.get("model"), fields.get("pre")
    if kind != "gpt2" or cut not in CUTS:
        raise DataError(
            f"{path}: its tokenizer is {kind} {cut}, expected gpt2 with one of {', '.join(CUTS)}; "
            "put the model's tokenizer.json beside the file"
        )
    try:
        definition = _definition(fields, cut)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: its tokenizer is damaged: {error!r}") from error
    tokenizer = Tokenizer(definition, str(path))
    tokenizer.eot_id = fields.get("eos_token_id", tokenizer.eot_id)
    return tokenizer


def _definition(fields: dict[str, Any], cut: str) -> str:
    tokens = fields["tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = CUTS[cut]()
    backend.decoder = decoders.ByteLevel()
    types = fields.get("token_type", [])
    added = [token for token, kind in zip(tokens, types, strict=False) if kind in SPECIAL_TYPES]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    if fields.get("add_bos_token", cut == "llama-bpe"):
        start = tokens[fields["bos_token_id"]]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, fields["bos_token_id"])]
        )
    return backend.to_str()
