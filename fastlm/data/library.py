"""What is asked of the tokenizers library beside encoding, and its errors."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from ..errors import DataError


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into a DataError: bare Exceptions, and the panics of its Rust code."""
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        if not damages(error):
            raise
        raise DataError(f"{what} ({_one_line(error)})") from None


def damages(error: BaseException) -> bool:
    """Whether an error of the tokenizers library tells of what it was given: its panics are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def quiet_panics() -> Iterator[None]:
    """Keep what a panic writes to the error stream, a line or a stack trace, from it; an error says it all."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        try:
            before = os.dup(2)
        except OSError:  # closed
            yield
            return
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.truncate(0)
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)
            kept.seek(0)
            if said := kept.read():
                os.write(2, said)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def check_vocabulary(vocabulary: dict[str, int], source: str) -> None:
    """Raise DataError for no token at all, or for ids so far apart that a model would be sized by a slip of the pen."""
    if not vocabulary:
        raise DataError(f"{source}: the tokenizer has an empty vocabulary")
    count, largest = len(vocabulary), max(vocabulary.values())
    if largest > 16 * count + (1 << 16):
        raise DataError(f"{source}: its {count} tokens have ids up to {largest}, expected few gaps between them")


def special_names(backend: tokenizers.Tokenizer) -> list[str]:
    """The special tokens."""
    return [token.content for token in backend.get_added_tokens_decoder().values() if token.special]


def hide_special_tokens(backend: tokenizers.Tokenizer) -> None:
    """Keep a model whose own vocabulary holds special tokens, as Unigram's may, from finding their names in text.

    The name is cut after its first character, before the model looks for tokens in it.
    """
    names = special_names(backend)
    spelled = [name for name in names if len(name) > 1 and backend.token_to_id(name) in _ids_of(backend, name)]
    if not spelled:
        return
    cut = Regex("|".join(f"{_escaped(name[0])}(?={_escaped(name[1:])})" for name in spelled))
    steps = [pre_tokenizers.Split(cut, "merged_with_previous"), backend.pre_tokenizer]
    backend.pre_tokenizer = pre_tokenizers.Sequence([step for step in steps if step is not None])


def _ids_of(backend: tokenizers.Tokenizer, name: str) -> list[int]:
    try:
        return backend.encode(name, add_special_tokens=False).ids
    except BaseException as error:
        if not damages(error):
            raise
        return []


def _escaped(text: str) -> str:
    return re.sub(r"([^\w\s])", r"\\\1", text)


def first_unknown(backend: tokenizers.Tokenizer, text: str) -> int | None:
    """Index of the first character of a text that the unknown token stands for; None where it stands for none.

    Of a word that is unknown as a whole, the first character that is so by itself, else its first.
    """
    unknown = unknown_id(backend)
    with library_errors("the tokenizer cannot encode the text"):
        encoding = backend.encode(text, add_special_tokens=False)
        if unknown is None or unknown not in encoding.ids:
            return None
        start, end = encoding.offsets[encoding.ids.index(unknown)]
        alone = (i for i in range(start, end) if unknown in backend.encode(text[i], add_special_tokens=False).ids)
        return next(alone, start)


def unknown_id(backend: tokenizers.Tokenizer) -> int | None:
    """The token that stands for what a vocabulary lacks, where there is one."""
    model = backend.model
    if isinstance(model, models.Unigram):
        return json.loads(model.__getstate__())["unk_id"]
    return None if model.unk_token is None else model.token_to_id(model.unk_token)


def encodes_all_bytes(backend: tokenizers.Tokenizer) -> bool:
    """Whether the definition alone shows that every text comes back: a BPE on bytes that has all 256 of them."""
    model = backend.model
    return (
        isinstance(model, models.BPE)
        and not model.continuing_subword_prefix
        and not model.end_of_word_suffix
        and backend.normalizer is None
        and isinstance(backend.decoder, decoders.ByteLevel)
        and _keeps_bytes(backend.pre_tokenizer)
        and all(model.token_to_id(byte) is not None for byte in pre_tokenizers.ByteLevel.alphabet())
        # Others are looked for in the text, and may take the blanks beside them.
        and all(token.special for token in backend.get_added_tokens_decoder().values())
    )


def _keeps_bytes(pre_tokenizer: pre_tokenizers.PreTokenizer | None) -> bool:
    if pre_tokenizer is None:
        return False
    state = json.loads(pre_tokenizer.__getstate__())
    *splits, last = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    keep = all(step["type"] == "Digits" or step.get("behavior", "Removed") != "Removed" for step in splits)
    return keep and last["type"] == "ByteLevel" and not last["add_prefix_space"]
