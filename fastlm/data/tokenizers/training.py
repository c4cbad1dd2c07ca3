"""Training of WordPiece and Unigram, so that equal text gives equal tokenizers in every process."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import models, trainers

from ...errors import ConfigError, DataError
from . import sentencepiece
from .bert import UNKNOWN, as_bert

SENTENCES = 100_000  # that SentencePiece holds in memory


def train_wordpiece(texts: Iterable[str], vocab_size: int, min_frequency: int, special: Sequence[str]) -> str:
    """The definition of a WordPiece with BERT's rules.

    The library numbers characters in the order of a table that differs between processes, and breaks ties by number:
    they are given to it in order, as special tokens, which they are not in what is returned.
    """
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    as_bert(trained)
    words: Counter[str] = Counter()
    for text in texts:
        normal = trained.normalizer.normalize_str(text)
        words.update(word for word, _ in trained.pre_tokenizer.pre_tokenize_str(normal))
    characters = _characters(words, (vocab_size - len(special)) // 2)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*special, *characters],
        limit_alphabet=0,
        show_progress=False,
    )
    known = {character.removeprefix("##") for character in characters}
    trained.train_from_iterator(_repeated(words, known), trainer)
    backend = tokenizers.Tokenizer(models.WordPiece(trained.get_vocab(with_added_tokens=True), unk_token=UNKNOWN))
    as_bert(backend)
    backend.add_special_tokens(list(special))
    return backend.to_str(pretty=True)


def _characters(words: Counter[str], most: int) -> list[str]:
    """The most frequent characters, as words begin with them and, with ##, as they go on.

    Each of the latter comes with the former, without which the library leaves it out of every word that it learns from.
    """
    counts: Counter[str] = Counter()
    for word, count in words.items():
        counts[word[0]] += count
        for character in word[1:]:
            counts["##" + character] += count
    found: set[str] = set()
    for character in sorted(counts, key=lambda character: (-counts[character], character)):
        more = found | {character, character.removeprefix("##")}
        if found and len(more) > most:
            break
        found = more
    return sorted(found)


def _repeated(words: Counter[str], known: set[str]) -> Iterator[str]:
    """Every word as often as it occurs, in an order of their own; those alone that the characters can spell."""
    for word in sorted(words):
        if known.issuperset(word):
            times = words[word]
            while times:
                now = min(times, 1000)
                yield f"{word} " * now
                times -= now


def needs_sentencepiece() -> ConfigError:
    """For a Unigram where the package that trains it is not installed."""
    return ConfigError(
        "tokenizer=unigram needs the package sentencepiece: pip install sentencepiece, or fastlm's extra:"
        " .[sentencepiece]"
    )


def train_unigram(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> str:
    """The definition of a Unigram with bytes for what it has no piece for."""
    try:
        import sentencepiece as library
    except ImportError:
        raise needs_sentencepiece() from None
    made = io.BytesIO()
    library.set_random_generator_seed(0)
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=made,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            character_coverage=0.9995,
            control_symbols=[name for name in special if name not in ("<unk>", "<pad>", "<s>", "</s>")],
            unk_id=0,
            bos_id=1 if "<s>" in special else -1,
            eos_id=2 if "</s>" in special else -1,
            pad_id=3 if "<pad>" in special else -1,
            input_sentence_size=SENTENCES,
            shuffle_input_sentence=True,
            max_sentence_length=1 << 20,
            num_threads=1,  # sums of several threads would depend on their number
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise DataError(
                f"vocab_size={vocab_size}: a Unigram on this text needs at least {found[1]}, for its characters"
            ) from None
        raise DataError(f"unigram: SentencePiece cannot train on this text ({' '.join(str(error).split())})") from None
    return sentencepiece.definition(made.getvalue(), "unigram")
