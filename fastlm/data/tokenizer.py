"""Tokenizers: trained on text, or of an existing file, all kept as one `tokenizer.json`."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from .._core.files import replace_bytes
from ..errors import ConfigError, DataError, shown
from .library import (
    check_vocabulary,
    encodes_all_bytes,
    first_unknown,
    hide_special_tokens,
    library_errors,
    quiet_panics,
    special_names,
    unknown_id,
)
from .manifest import manifest_beside
from .tokenizers.bert import UNKNOWN
from .tokenizers.files import BYTE_LEVEL, byte_level, read_definition
from .tokenizers.special import END_NAMES, END_OF_TEXT, TRAINED, special_ids
from .tokenizers.training import train_unigram, train_wordpiece
from .word_bpe import bpe_parts
from .word_cache import WordCache, word_pattern

_REPLACEMENT = "\ufffd"  # what undecodable bytes decode to


class Tokenizer:
    """Text to token ids and back.

    Make one with `train_bpe`, `train_wordpiece`, `train_unigram`, `characters` or `load`. Special tokens are never
    produced from text that spells their names.

    Args:
        definition: the text of a `tokenizer.json`, in the format of the `tokenizers` library.
        source: what to call it in error messages.

    Raises:
        DataError: the definition is not one that the `tokenizers` library can read.
    """

    def __init__(self, definition: str, source: str = "tokenizer") -> None:
        with quiet_panics(), library_errors(f"{source}: not a tokenizer.json that the tokenizers library reads"):
            backend = tokenizers.Tokenizer.from_str(definition)
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = True
            vocabulary = backend.get_vocab(with_added_tokens=True)
            start_ids = _start_ids(backend)
        check_vocabulary(vocabulary, source)
        self._definition = definition.encode()
        self._backend = backend
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eot_id: int | None = next((vocabulary[name] for name in END_NAMES if name in vocabulary), None)
        self.start_ids: list[int] = start_ids
        self.unknown_id: int | None = unknown_id(backend)
        self.fingerprint: str = hashlib.sha256(self._definition).hexdigest()
        self._alphabet = _alphabet(backend)
        self._lossless = encodes_all_bytes(backend)
        self._vocabulary = vocabulary
        self._source = source
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        pattern = word_pattern(backend)
        bpe = functools.partial(bpe_parts, backend)
        self._words = None if pattern is None else WordCache(pattern, self._encode, self.dtype, bpe)
        hide_special_tokens(backend)

    @classmethod
    def train_bpe(
        cls, texts: Iterable[str], vocab_size: int, min_frequency: int = 2, special: Sequence[str] = (END_OF_TEXT,)
    ) -> Tokenizer:
        """Train a byte-level BPE: every byte has a token, so any text round-trips.

        Args:
            texts: strings; no merge crosses from one to the next.
            vocab_size: the most tokens, with the 256 bytes and the special ones; a small corpus gives fewer.
            min_frequency: how often a pair must occur to be merged.
            special: names of special tokens, which come first.

        Raises:
            ConfigError: `vocab_size` is below 256 and the special ones, or beyond 32 bits.

        Source: Sennrich et al. 2016 (BPE); Radford et al. 2019 (on bytes).
        """
        _check_vocab_size("byte-level BPE", vocab_size, 256, "256 bytes", special)
        backend = byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=list(special),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend.to_str(pretty=True))

    @classmethod
    def train_wordpiece(
        cls, texts: Iterable[str], vocab_size: int, min_frequency: int = 2, special: Sequence[str] = TRAINED["masked"]
    ) -> Tokenizer:
        """Train a WordPiece with BERT's rules: lower case without accents, each Chinese character by itself.

        Args:
            texts, min_frequency: as of `train_bpe`.
            vocab_size: the most tokens; at most half of them are single characters, and a word with a rarer one becomes
                the unknown token, [UNK].
            special: names of special tokens, which come first; [UNK] is always one of them.

        Raises:
            ConfigError: `vocab_size` has no room for a character, or is beyond 32 bits.

        Source: Schuster and Nakajima 2012 (WordPiece); Devlin et al. 2019 (its rules).
        """
        special = list(dict.fromkeys([*special, UNKNOWN]))
        _check_vocab_size("WordPiece", vocab_size, 2, "a character at two places", special)
        return cls(train_wordpiece(texts, vocab_size, min_frequency, special))

    @classmethod
    def train_unigram(cls, texts: Iterable[str], vocab_size: int, special: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
        """Train a Unigram with SentencePiece; what it has no piece for becomes bytes, so any text round-trips.

        Args:
            texts: as of `train_bpe`; of more than 100,000 of them, as many drawn at random.
            vocab_size: the most tokens, with the 256 bytes and the special ones.
            special: names of special tokens, which come first.

        Raises:
            ConfigError: `vocab_size` has no room for the bytes, or is beyond 32 bits; sentencepiece is not installed.
            DataError: too little text.

        Source: Kudo 2018, "Subword Regularization".
        """
        _check_vocab_size("Unigram", vocab_size, 258, "256 bytes, <unk>, a piece", special)
        return cls(train_unigram(texts, vocab_size, special))

    @classmethod
    def characters(cls, texts: Iterable[str], special: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
        """One token for each character that occurs in `texts`, in code point order, after the special ones.

        Raises:
            DataError: `texts` holds no character.
        """
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        if not alphabet:
            raise DataError("characters: the texts are empty, so there is no vocabulary")
        vocabulary = {token: index for index, token in enumerate([*special, *sorted(alphabet)])}
        # The unknown token is absent from the vocabulary: the library then refuses what it does not know.
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(list(special))
        return cls(backend.to_str(pretty=True))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a tokenizer.json, or what other libraries keep, or a folder that holds one of these.

        That is BERT's vocab.txt, GPT-2's pair of vocabulary and merges, SentencePiece's .model (Unigram or BPE), and
        tiktoken's files. The ids are those of their own libraries. Of a prepared folder, the end-of-text token is the
        one that its documents end with.

        Raises:
            DataError: nothing there, or not a tokenizer.
        """
        tokenizer = cls(*read_definition(Path(path)))
        manifest = manifest_beside(Path(path))
        if manifest is not None and manifest.tokenizer_fingerprint == tokenizer.fingerprint:
            tokenizer.eot_id = manifest.eot_id
        return tokenizer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer.json, byte for byte the one that `fingerprint` is of."""
        replace_bytes(path, self._definition)

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any string without lone surrogates.
            special_tokens: read the names of special tokens in the text as those tokens, not as plain text.

        Raises:
            DataError: a character that the vocabulary cannot express, with its position. A tokenizer that has an
                unknown token puts that in its place.
        """
        if not special_tokens:
            return self.encode_batch([text])[0]
        if self._alphabet:  # hide the names behind a known character, so that positions stay right
            known, hidden = next(iter(self._alphabet)), text
            for name in special_names(self._backend):
                hidden = hidden.replace(name, known * len(name))
            self._check_alphabet(hidden)
        check_surrogates(text)
        self._backend.encode_special_tokens = False
        try:
            with library_errors("the tokenizer cannot encode the text"):
                ids = self._backend.encode(text, add_special_tokens=False).ids
            if not self._alphabet:
                self._check_returned(text, ids)
        finally:
            self._backend.encode_special_tokens = True
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, on several threads where the tokenizer can.

        Raises:
            DataError: as `encode`.
        """
        for text in texts:
            self._check_alphabet(text)
            check_surrogates(text)
        if self._alphabet is not None:
            return self.encode_lossy(texts)
        try:
            encoded = self.encode_lossy(texts)
        except DataError as error:
            raise next(filter(None, map(self._unknown, texts)), error) from None
        for text, ids in zip(texts, encoded, strict=True):
            self._check_returned(text, ids)
        return encoded

    def encode_lossy(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts without lone surrogates, whatever of them comes back; see `decode_changed`.

        Raises:
            DataError: the tokenizers library refuses one of them.
        """
        if self._alphabet is None:
            return self._encode(texts)
        # 50 times faster than the library's regular expression over single characters.
        try:
            return [list(map(self._alphabet.__getitem__, text)) for text in texts]
        except KeyError:
            return [[self._alphabet[c] for c in text if c in self._alphabet] for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode_lossy`, as arrays of `dtype`, the smallest that holds every id; of words seen before, at once.

        Raises:
            DataError: the tokenizers library refuses one of them.
        """
        if self._words is not None:
            return self._words.encode(texts)
        return [np.array(ids, self.dtype) for ids in self.encode_lossy(texts)]

    def decode_changed(self, texts: Sequence[str], encoded: Sequence[Sequence[int] | np.ndarray]) -> list[str | None]:
        """For each text that does not come back from its ids, what comes back in its place; else None.

        Texts that Unicode holds for the same (NFC), and a blank more or less at the start, do not count.
        """
        if self._lossless or (self._alphabet and all(map(_same_length, texts, encoded))):
            return [None] * len(texts)
        with library_errors("the tokenizer cannot decode its own tokens"):
            decoded = self._backend.decode_batch(
                [np.asarray(ids).tolist() for ids in encoded], skip_special_tokens=False
            )
        return [None if _same(text, other) else other for text, other in zip(texts, decoded, strict=True)]

    def find_unknown(self, text: str, normalized: bool = False) -> int | None:
        """Index of the first character that does not come back, or for which the unknown token stands.

        Args:
            normalized: let the tokenizer's own normalizer change the text.
        """
        if self._lossless or (self._alphabet and self._alphabet.keys() >= set(text)):
            return None
        if self._alphabet is not None:
            return next(index for index, character in enumerate(text) if character not in self._alphabet)
        good, bad = 0, len(text) + 1
        while bad - good > 1:
            end = (good + bad) // 2
            good, bad = (end, bad) if self._returns(text[:end], normalized) else (good, end)
        return None if good == len(text) else good

    def first_unknown(self, text: str) -> int | None:
        """Index of the first character that the unknown token stands for, itself or with the others of its word."""
        return first_unknown(self._backend, text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id outside the vocabulary.
        """
        ids = list(map(int, ids))
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            bad = next(index for index in ids if not 0 <= index < self.vocab_size)
            raise DataError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        with library_errors("the tokenizer cannot decode its own tokens"):
            return self._backend.decode(ids, skip_special_tokens=False)

    def special_ids(self, objective: str) -> dict[str, int]:
        """Ids of the special tokens that an objective needs, by what they are for.

        Args:
            objective: "causal" (end), "masked" (pad, start, end, mask), "seq2seq" (pad, start, end) or "chat" (end,
                turn_start, turn_end).

        Raises:
            ConfigError: for another objective.
            DataError: the vocabulary lacks one of them.
        """
        return special_ids(self._vocabulary, objective, self._source)

    def stream(self) -> TokenStream:
        """A decoder that takes one id at a time."""
        return TokenStream(self)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        with library_errors("the tokenizer cannot encode the text"):
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _check_alphabet(self, text: str) -> None:
        unknown = None if self._alphabet is None else self.find_unknown(text)
        if unknown is not None:
            raise DataError(f"{describe(text[unknown])} at character {unknown} is not in the vocabulary")

    def _check_returned(self, text: str, ids: list[int]) -> None:
        if self.unknown_id is None and not self._is_returned(text, ids, normalized=True):
            raise self._unknown(text) or DataError("the tokenizer does not give the text back")

    def _unknown(self, text: str) -> DataError | None:
        index = self.find_unknown(text, normalized=True)
        if index is None:
            return None
        return DataError(f"{describe(text[index])} at character {index} is not in the tokenizer's vocabulary")

    def _returns(self, text: str, normalized: bool) -> bool:
        try:
            ids = self._encode([text])[0]
        except DataError:
            return False
        return self.unknown_id not in ids and self._is_returned(text, ids, normalized)

    def _is_returned(self, text: str, ids: list[int], normalized: bool) -> bool:
        changed = self.decode_changed([text], [ids])[0]
        if changed is None or not normalized:
            return changed is None
        normalizer = self._backend.normalizer
        if normalizer is not None and _same(normalizer.normalize_str(text), changed):
            return True
        # A decoder may put blanks between tokens; added tokens may take the blanks beside them.
        takes_blanks = any(token.lstrip or token.rstrip for token in self._backend.get_added_tokens_decoder().values())
        same_words = "".join(text.split()) == "".join(changed.split())
        return same_words and (takes_blanks or _blanks(text.removeprefix(" ")) <= _blanks(changed))


class TokenStream:
    """Decodes a growing list of ids, and never emits half a UTF-8 character.

    The pieces joined, `flush` last, equal `Tokenizer.decode` of all ids. One exception: a byte-fallback
    decoder (Llama's kind) takes back good bytes when bad ones follow; the stream, which has shown them, does
    not.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The tokens emitted last are kept as context: some decoders treat the first token in their own way.
        self._ids: list[int] = []
        self._context = 0
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith(_REPLACEMENT) else self._emit(text)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        return self._emit(self._tokenizer.decode(self._ids))

    def _emit(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        self._shown = self._tokenizer.decode(self._ids)
        return new


def _check_vocab_size(kind: str, vocab_size: int, least: int, what: str, special: Sequence[str]) -> None:
    if vocab_size < least + len(special):
        raise ConfigError(
            f"vocab_size={vocab_size}: {kind} needs at least {least + len(special)} ({what} and {', '.join(special)})"
        )
    if vocab_size > 1 << 32:
        raise ConfigError(f"vocab_size={shown(vocab_size)}: token ids have 32 bits")


def _start_ids(backend: tokenizers.Tokenizer) -> list[int]:
    """What the definition puts before every text, such as Llama's <s>; `Tokenizer.encode` leaves it out."""
    if backend.post_processor is None:
        return []
    encoding = backend.encode("a")
    marks = itertools.takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
    return [token for token, _ in marks]


def check_surrogates(text: str) -> None:
    """Raise DataError if a text holds a lone surrogate, with its position."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{describe(text[error.start])} at character {error.start} is a lone surrogate") from None


def _same_length(text: str, ids: Sequence[int] | np.ndarray) -> bool:
    return len(text) == len(ids)


def _blanks(text: str) -> int:
    return sum(map(str.isspace, text))


def same_form(text: str) -> str:
    """Equal for texts that are taken to be the same: canonically equivalent, or one with a blank before it."""
    return unicodedata.normalize("NFC", text).removeprefix(" ")


def _same(text: str, other: str) -> bool:
    return text == other or same_form(text) == same_form(other)


def byte_level_words(text: str) -> list[str]:
    """The words, in GPT-2's byte alphabet, that no merge of a byte-level BPE crosses."""
    return [word for word, _ in BYTE_LEVEL.pre_tokenize_str(text)]


def describe(character: str) -> str:
    """A character for an error message, with its code point."""
    return f"{character!r} (U+{ord(character):04X})"


def _alphabet(backend: tokenizers.Tokenizer) -> dict[str, int] | None:
    """The characters of a tokenizer that `Tokenizer.characters` made; None for every other kind."""
    made_here = isinstance(backend.model, models.WordLevel) and isinstance(backend.decoder, decoders.Fuse)
    if not made_here or not isinstance(backend.pre_tokenizer, pre_tokenizers.Split) or backend.normalizer:
        return None
    special = set(special_names(backend))
    words = {word: index for word, index in backend.get_vocab().items() if word not in special}
    return words if all(len(word) == 1 for word in words) else None
