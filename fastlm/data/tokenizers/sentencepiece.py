"""SentencePiece's .model files, Unigram and BPE: a protocol buffer, of which the fields that matter are read here.

Field numbers are those of google/sentencepiece's src/sentencepiece_model.proto. Three differences stay, all of the
tokenizers library: a combining mark is lost after a character that the model's normalization rewrites by itself, of two
ways to cut a text that have the same score, another may be taken, and a text that is one piece of the user's and no
more is that piece without the blank before it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ...errors import DataError

MARK = "▁"  # stands for a blank
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
_KINDS = {3: "word", 4: "char"}


@dataclass
class Model:
    """What a file says."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    kind: int = UNIGRAM
    byte_fallback: bool = False
    suffix: bool = False
    charsmap: bytes = b""
    dummy_prefix: bool = True
    collapse: bool = True
    escape: bool = True


def definition(data: bytes, source: str) -> str:
    """The text of a tokenizer.json with the same tokens for the same text.

    Raises:
        DataError: the file is damaged, or of a kind that has no counterpart.
    """
    try:
        model = _read(data)
    except (ValueError, IndexError, struct.error) as error:
        raise DataError(f"{source}: not a SentencePiece model ({error})") from None
    unknown = [index for index, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN]
    if len(unknown) != 1 or len({piece for piece, _, _ in model.pieces}) < len(model.pieces):
        raise DataError(f"{source}: not a SentencePiece model (no unknown piece, or a piece twice)")
    if model.kind not in (UNIGRAM, BPE) or model.suffix or not model.escape:
        kind = _KINDS.get(model.kind, "whitespace as suffix or not escaped")
        raise DataError(f"{source}: a SentencePiece model of kind {kind}, expected unigram or bpe")
    backend = tokenizers.Tokenizer(_model(model, unknown[0]))
    backend.normalizer = normalizers.Sequence(_normalizers(model))
    if steps := _cuts(model):
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    fallback = [decoders.ByteFallback()] if model.byte_fallback else []
    backend.decoder = decoders.Sequence([decoders.Replace(MARK, " "), *fallback, decoders.Fuse(), *strip])
    reserved = [piece for piece, _, kind in model.pieces if kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in reserved])
    own = [piece for piece, _, kind in model.pieces if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in own])
    return backend.to_str()


def _model(model: Model, unknown: int) -> Any:
    if model.kind == UNIGRAM:
        vocabulary = [(piece, score) for piece, score, _ in model.pieces]
        return models.Unigram(vocabulary, unknown, model.byte_fallback)
    ids = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    merged = [(score, piece) for piece, score, kind in model.pieces if kind in (NORMAL, USER_DEFINED, UNUSED)]
    usable = {piece for _, piece in merged}
    merges = []
    for _, piece in sorted(merged, key=lambda entry: -entry[0]):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found = [(left, right) for left, right in pairs if left in usable and right in usable]
        merges += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    name = model.pieces[unknown][0]
    return models.BPE(ids, merges, unk_token=name, fuse_unk=True, byte_fallback=model.byte_fallback)


def _normalizers(model: Model) -> list[Any]:
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.collapse:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    own = [piece for piece, _, kind in model.pieces if kind == USER_DEFINED]
    if model.dummy_prefix and own:
        # The library looks for these pieces as they are normalized by themselves, which must put no blank before them.
        alone = "|".join(re.sub(r"([^\w\s])", r"\\\1", piece.replace(MARK, " ")) for piece in own)
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)(?=[\s\S])"), MARK))
    elif model.dummy_prefix:
        steps.append(normalizers.Prepend(MARK))
    return [*steps, normalizers.Replace(" ", MARK)]


def _cuts(model: Model) -> list[Any]:
    """Cuts that change no token, but keep reserved pieces from being found in text, and words short."""
    steps: list[Any] = []
    if model.kind == UNIGRAM and any(kind == BYTE for _, _, kind in model.pieces):
        steps.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous"))
    if not any(MARK in piece[1:] for piece, _, _ in model.pieces):
        steps.append(pre_tokenizers.Split(MARK, "merged_with_next"))
    return steps


def _read(data: bytes) -> Model:
    model = Model()
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            text, score = piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]
            model.pieces.append((text, score, piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
            model.kind, model.suffix = trainer.get(3, UNIGRAM), bool(trainer.get(24, 0))
            model.byte_fallback = bool(trainer.get(35, 0))
        elif number == 3:
            rules = dict(_fields(value))
            model.charsmap, model.dummy_prefix = rules.get(2, b""), bool(rules.get(3, 1))
            model.collapse, model.escape = bool(rules.get(4, 1)), bool(rules.get(5, 1))
    if not model.pieces:
        raise ValueError("no pieces")
    return model


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: integers, and bytes of 4, of 8 or of any length."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"byte {at}: a field of kind {kind}")
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = _varint(data, at)
        if at + size > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"byte {at}: a number of more than 64 bits")
