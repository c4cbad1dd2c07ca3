"""What the C++ word table needs to encode words of a byte-level BPE by itself; other tokenizers' go to the library."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from ..backends.cpu.words import BpeParts
from .tokenizers.patterns import GPT2
from .tokenizers.tiktoken import byte_letters
from .word_cache import CASES, SUFFIX, alternatives, steps_of

# The alternatives of regular expressions that csrc/cpu/words_bpe.h knows, by the order of its `Piece`.
_UPPER, _LOWER = CASES[0]
_SUFFIXES = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_KNOWN: tuple[set[str], ...] = (
    set(_SUFFIXES),
    SUFFIX | {"'(?i:[sdmt]|ll|ve|re)"},
    {r" ?\p{L}+"},
    {r" ?\p{N}+"},
    {r" ?[^\s\p{L}\p{N}]+"},
    {r" ?[^\s\p{L}\p{N}]+[\r\n]*"},
    {r" ?[^\s\p{L}\p{N}]+[\r\n/]*"},
    {r"[^\r\n\p{L}\p{N}]?\p{L}+"},
    {r"\p{N}"},
    {r"\p{N}{1,3}"},
    {r"\p{N}+"},
    {r"\s*[\r\n]+", r"\s*[\r\n]"},
    {r"\s+(?!\S)"},
    {r"\s+"},
    {rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{suffix}?" for suffix in SUFFIX},
    {rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{suffix}?" for suffix in SUFFIX},
)
_CLASSES = (  # by the bits of csrc/cpu/words_bpe.h's CharacterClass; 16 is kKnown
    (1, r"\p{L}"), (2, r"\p{N}"), (4, r"\s"), (8, r"\p{M}"),
    (32, _UPPER), (64, _LOWER),
)  # fmt: skip
_KNOWN_CHARACTER = 16
_LONG_S = 0x17F  # an s to (?i:'s)
_CHARACTERS = 0x20000  # the classes of more take longer to look up than they save
_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}  # which leave ASCII as it is


def bpe_parts(backend: tokenizers.Tokenizer) -> BpeParts | None:
    """The parts of a byte-level BPE whose expression the word table knows; None of any other tokenizer."""
    forms = {step["type"] for step in steps_of(backend.normalizer, "normalizers")}
    pieces = _pieces(steps_of(backend.pre_tokenizer, "pretokenizers"))
    if pieces is None or not forms <= _FORMS or not isinstance(backend.model, models.BPE):
        return None
    model = json.loads(backend.model.__getstate__())
    if model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return None
    vocabulary: dict[str, int] = model["vocab"]
    names = byte_letters()
    if not all(name in vocabulary for name in names):
        return None
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in pairs]
    whole: list[tuple[bytes, int]] = []
    if model.get("ignore_merges"):
        codes = {name: byte for byte, name in enumerate(names)}
        whole = [
            (bytes(map(codes.__getitem__, token)), n) for token, n in vocabulary.items() if codes.keys() >= set(token)
        ]
    classes = character_classes() if not forms else character_classes()[:128]
    return BpeParts(pieces, classes, [vocabulary[name] for name in names], merges, whole)


def _pieces(steps: list[dict[str, Any]]) -> list[int] | None:
    """The numbers of the alternatives that cut words, in their order; None where one is not known."""
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    *before, last = steps
    if not before:
        found = alternatives(GPT2) if last["use_regex"] else []
    elif len(before) == 1 and before[0]["type"] == "Split" and not last["use_regex"]:
        found = alternatives(before[0]["pattern"].get("Regex", ""))
    else:
        found = []
    if not found:
        return None
    pieces: list[int] = []
    for part in found:
        number = next((number for number, known in enumerate(_KNOWN) if part in known), None)
        if number is None:
            return None
        if number != 0 or 0 not in pieces:
            pieces.append(number)
    if 0 in pieces and not _suffixes_together(found):
        return None
    return pieces


def _suffixes_together(found: list[str]) -> bool:
    """Whether the endings are all there and side by side, as one alternative would be."""
    places = [number for number, part in enumerate(found) if part in _SUFFIXES]
    return {found[place] for place in places} == set(_SUFFIXES) and places[-1] - places[0] == len(_SUFFIXES) - 1


@cache
def character_classes() -> bytes:
    """What each character up to `_CHARACTERS` is to the library's regular expressions, asked of itself."""
    codes = [code for code in range(_CHARACTERS) if not 0xD800 <= code < 0xE000 and code != _LONG_S]
    classes = bytearray(_CHARACTERS)
    for code in codes:
        classes[code] = _KNOWN_CHARACTER
    text = "".join(map(chr, codes))
    for bit, expression in _CLASSES:
        for run, _ in pre_tokenizers.Split(Regex(f"{expression}+"), "removed", invert=True).pre_tokenize_str(text):
            for character in run:
                classes[ord(character)] |= bit
    return bytes(classes)
