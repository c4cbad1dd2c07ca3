"""tiktoken's files: a line for each token, its bytes in base64 and its rank, which is both id and order of merging.

The file holds neither the pattern that cuts text nor special tokens; both are taken from the published encoding that
has as many ranks: openai/tiktoken's tiktoken_ext/openai_public.py, and Llama 3's and Qwen's own.
"""

from __future__ import annotations

import base64
import binascii
from typing import NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from ...errors import DataError
from . import patterns
from .special import END_OF_TEXT


class Encoding(NamedTuple):
    """What goes with a file of ranks."""

    name: str
    pattern: str
    special: dict[str, int]


_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
KNOWN: dict[int, Encoding] = {
    50256: Encoding("gpt2", patterns.GPT2, {END_OF_TEXT: 50256}),
    50257: Encoding("whisper", patterns.GPT2, {END_OF_TEXT: 50257}),
    50280: Encoding("p50k_base", patterns.GPT2, {END_OF_TEXT: 50256}),
    100256: Encoding(
        "cl100k_base", patterns.CL100K,
        {END_OF_TEXT: 100257, **dict(zip(_FIM, range(100258, 100261), strict=True)), "<|endofprompt|>": 100276},
    ),
    128000: Encoding(
        "llama3", patterns.CL100K,
        {
            "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006,
            "<|end_header_id|>": 128007, "<|eot_id|>": 128009,
        },
    ),
    151643: Encoding(
        "qwen", patterns.QWEN, {END_OF_TEXT: 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    ),
    199998: Encoding("o200k_base", patterns.O200K, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}  # fmt: skip


def is_tiktoken(data: bytes) -> bool:
    """Whether a file begins with a token in base64 and its rank."""
    token, _, rank = data[:200].partition(b"\n")[0].partition(b" ")
    try:
        return bool(base64.b64decode(token, validate=True)) and rank.strip().isdigit()
    except binascii.Error:
        return False


def definition(data: bytes, source: str, encoding: Encoding | None = None) -> str:
    """The text of a tokenizer.json with the same tokens for the same text.

    Args:
        data: the file.
        source: named in errors.
        encoding: its pattern and special tokens; by default those of the published one with as many ranks.

    Raises:
        DataError: the file is damaged, or of no encoding that is known.
    """
    ranks = _ranks(data, source)
    if encoding is None:
        if len(ranks) not in KNOWN:
            known = ", ".join(f"{count} ({kind.name})" for count, kind in KNOWN.items())
            raise DataError(f"{source}: has {len(ranks)} ranks, expected those of a published encoding: {known}")
        encoding = KNOWN[len(ranks)]
    letters = byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {names[token]: rank for token, rank in ranks.items()} | encoding.special
    merges = [(names[left], names[right]) for left, right in _merges(ranks)]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(encoding.pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(encoding.special))
    return backend.to_str()


def _ranks(data: bytes, source: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:  # binascii's is one
            raise DataError(f"{source}: line {number} is not a token in base64 and its rank") from None
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise DataError(f"{source}: has no token for the byte {missing:#04x}")
    if len(set(ranks.values())) < len(ranks):
        raise DataError(f"{source}: two tokens have the same rank")
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that is a token, in the order of ranks: tiktoken merges whatever pair that is one."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        merges += sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it is printed in Latin-1, else one from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]
