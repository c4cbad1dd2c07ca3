"""Tokenizers: byte-level BPE, characters, or an existing file, all kept as one `tokenizer.json`."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from .._core.files import replace_bytes
from ..errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"

# What other families call the token that ends a text; the first that a vocabulary holds is taken.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_GPT2_PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
_REPLACEMENT = "\ufffd"  # what undecodable bytes decode to


class Tokenizer:
    """Text to token ids and back.

    Make one with `train_bpe`, `characters` or `load`.

    Args:
        definition: the text of a `tokenizer.json`, in the format of the `tokenizers` library.
        source: what to call it in error messages.

    Raises:
        DataError: the definition is not one that the `tokenizers` library can read.
    """

    def __init__(self, definition: str, source: str = "tokenizer") -> None:
        try:
            backend = tokenizers.Tokenizer.from_str(definition)
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = True
            start_ids = _start_ids(backend)
        except BaseException as error:  # the library raises bare Exception, and panics with something else
            if not damages(error):
                raise
            reason = str(error).partition("\n")[0][:200]
            raise DataError(f"{source}: not a tokenizer.json that the tokenizers library reads ({reason})") from None
        self._definition = definition.encode()
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{source}: the tokenizer has an empty vocabulary")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eot_id: int | None = next((vocabulary[name] for name in _END_NAMES if name in vocabulary), None)
        self.start_ids: list[int] = start_ids
        self.fingerprint: str = hashlib.sha256(self._definition).hexdigest()
        self._alphabet = _alphabet(backend)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Tokenizer:
        """Train a byte-level BPE: every byte has a token, so any text round-trips.

        Args:
            texts: strings; no merge crosses from one to the next.
            vocab_size: the most tokens, with the 256 bytes and `<|endoftext|>`; a small corpus gives fewer.
            min_frequency: how often a pair must occur to be merged.

        Raises:
            ConfigError: `vocab_size` is below 257.

        Source: Sennrich et al. 2016 (BPE); Radford et al. 2019 (on bytes).
        """
        if vocab_size < 257:
            raise ConfigError(
                f"vocab_size={vocab_size}: byte-level BPE needs at least 257 (256 bytes and {END_OF_TEXT})"
            )
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend.to_str(pretty=True))

    @classmethod
    def characters(cls, texts: Iterable[str]) -> Tokenizer:
        """One token for each character that occurs in `texts`, in code point order, after `<|endoftext|>`.

        Raises:
            DataError: `texts` holds no character.
        """
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        if not alphabet:
            raise DataError("characters: the texts are empty, so there is no vocabulary")
        vocabulary = {token: index for index, token in enumerate([END_OF_TEXT, *sorted(alphabet)])}
        # The unknown token is absent from the vocabulary: the library then refuses what it does not know.
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([END_OF_TEXT])
        return cls(backend.to_str(pretty=True))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a tokenizer.json, a folder that holds one, or GPT-2's pair of vocabulary and merges.

        Raises:
            DataError: nothing there, or not a tokenizer.
        """
        path = Path(path)
        for vocabulary, merges in _GPT2_PAIRS:
            folder = path.parent if path.name == vocabulary else path
            has_json = path.is_dir() and (path / "tokenizer.json").exists()
            if not has_json and (folder / vocabulary).is_file() and (folder / merges).is_file():
                return cls(_read_gpt2_pair(folder / vocabulary, folder / merges), str(folder))
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"{path}: no such tokenizer; wanted a tokenizer.json, or a folder with one")
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not a tokenizer.json (byte {error.start} is not UTF-8)") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer.json, byte for byte the one that `fingerprint` is of."""
        replace_bytes(path, self._definition)

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any string without lone surrogates.
            special_tokens: read the names of special tokens in the text as those tokens, not as plain text.

        Raises:
            DataError: a character that the vocabulary cannot express, with its position.
        """
        if not special_tokens:
            return self.encode_batch([text])[0]
        if self._alphabet:  # hide the names behind a known character, so that positions stay right
            self._check(text.replace(END_OF_TEXT, next(iter(self._alphabet)) * len(END_OF_TEXT)))
        self._backend.encode_special_tokens = False
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        finally:
            self._backend.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, on several threads where the tokenizer can.

        Raises:
            DataError: a character that the vocabulary cannot express, with its position.
        """
        for text in texts:
            self._check(text)
        if self._alphabet is not None:
            # 50 times faster than the library's regular expression over single characters.
            return [list(map(self._alphabet.__getitem__, text)) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def find_unknown(self, text: str) -> int | None:
        """Index of the first character that a character vocabulary lacks; None if there is none."""
        if self._alphabet is None or self._alphabet.keys() >= set(text):
            return None
        return next(index for index, character in enumerate(text) if character not in self._alphabet)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id outside the vocabulary.
        """
        ids = list(map(int, ids))
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            bad = next(index for index in ids if not 0 <= index < self.vocab_size)
            raise DataError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        return self._backend.decode(ids, skip_special_tokens=False)

    def stream(self) -> TokenStream:
        """A decoder that takes one id at a time."""
        return TokenStream(self)

    def _check(self, text: str) -> None:
        unknown = self.find_unknown(text)
        if unknown is not None:
            raise DataError(f"{describe(text[unknown])} at character {unknown} is not in the vocabulary")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{describe(text[error.start])} at character {error.start} is a lone surrogate") from None


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


def damages(error: BaseException) -> bool:
    """Whether an error of the tokenizers library tells of what it was given: its panics are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _start_ids(backend: tokenizers.Tokenizer) -> list[int]:
    """What the definition puts before every text, such as Llama's <s>; `Tokenizer.encode` leaves it out."""
    if backend.post_processor is None:
        return []
    encoding = backend.encode("a")
    marks = itertools.takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
    return [token for token, _ in marks]


def byte_level_words(text: str) -> list[str]:
    """The words, in GPT-2's byte alphabet, that no merge of a byte-level BPE crosses."""
    return [word for word, _ in _BYTE_LEVEL.pre_tokenize_str(text)]


def describe(character: str) -> str:
    """A character for an error message, with its code point."""
    return f"{character!r} (U+{ord(character):04X})"


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _BYTE_LEVEL
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_gpt2_pair(vocabulary: Path, merges: Path) -> str:
    try:
        backend = _byte_level(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{vocabulary} and {merges.name}: not a byte-level BPE ({error})") from None
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([END_OF_TEXT])
    return backend.to_str(pretty=True)


def _alphabet(backend: tokenizers.Tokenizer) -> dict[str, int] | None:
    """The characters of a tokenizer that `Tokenizer.characters` made; None for every other kind."""
    made_here = isinstance(backend.model, models.WordLevel) and isinstance(backend.decoder, decoders.Fuse)
    if not made_here or not isinstance(backend.pre_tokenizer, pre_tokenizers.Split) or backend.normalizer:
        return None
    words = {word: index for word, index in backend.get_vocab().items() if word != END_OF_TEXT}
    return words if all(len(word) == 1 for word in words) else None
