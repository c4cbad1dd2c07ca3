"""The tokenizer of a model, by where the model lies."""

from __future__ import annotations

import json
from pathlib import Path

from .._core.tensor_file import open_safetensors
from ..data import Tokenizer
from ..errors import DataError
from .checkpoint import TOKENIZER_FINGERPRINT, check_tokenizer
from .gguf.tokenizer import load_tokenizer
from .hf.files import read_json


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder, beside a checkpoint, or beside or in a GGUF file.

    Raises:
        DataError: for a missing or damaged one.
    """
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".gguf" and not (folder / "tokenizer.json").is_file():
        return load_tokenizer(path)
    try:
        tokenizer = Tokenizer.load(folder if path.is_dir() else folder / "tokenizer.json")
    except DataError as error:
        if any(folder.glob("tokenizer.json")) or any(folder.glob("vocab.json")):
            raise
        raise DataError(f"{error}: copy it there, since `fastlm.save` writes a model alone") from None
    if path.is_dir() and (named := _named_end(path)) is not None:
        found = tokenizer.encode(named, special_tokens=True)
        tokenizer.eot_id = found[0] if len(found) == 1 else tokenizer.eot_id
    return tokenizer


def check_trained_with(path: Path, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError for a training run's checkpoint that names another tokenizer."""
    if path.is_dir() or path.suffix != ".safetensors":
        return
    if fingerprint := json.loads(open_safetensors(path).metadata.get(TOKENIZER_FINGERPRINT, '""')):
        check_tokenizer(path, fingerprint, tokenizer.fingerprint, str(path.parent / "tokenizer.json"))


def _named_end(folder: Path) -> str | None:
    """The end of text of tokenizer_config.json; a vocabulary may hold several names for one."""
    file = folder / "tokenizer_config.json"
    end = read_json(file).get("eos_token") if file.is_file() else None
    end = end.get("content") if isinstance(end, dict) else end
    return end if isinstance(end, str) and end else None
