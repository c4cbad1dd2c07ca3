"""The word table in C++ against the patterns of Python, and both against the tokenizers library on the whole text."""

import json
import pickle
import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from fastlm.backends import cpu
from fastlm.data import Tokenizer, word_cache
from fastlm.data.tokenizers.patterns import CL100K, GPT2, O200K, QWEN
from fastlm.data.tokenizers.tiktoken import byte_letters
from fastlm.data.word_bpe import bpe_parts, character_classes
from fastlm.errors import DataError

needs_extension = pytest.mark.skipif(cpu.missing_reason is not None, reason=str(cpu.missing_reason))

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DOCUMENTS = sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))
REAL = (
    "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)[:30_000]
    + (
        "Grüße aus Köln: naïve façade, Ελληνικά, русский язык, 北京欢迎你\uff0c你好世界。 «Ça», "
        "e\u0301t\u0327 ǅ ﬁn ʰ ª ⅷ ٣४\n"
        "它们「没有」空格，却有标点。 日本語のカタカナ・ひらがな、한국어 문장。 "
        "ไทยไม่มีช่องว่าง हिन्दी 🙂👩‍👩‍👧 1234567 3.14 ½\r\n"
    )
    * 4
)

# What is hard about words: every kind of white space, marks, apostrophes, digits, letters of several scripts.
PARTS = [
    *" \t\r\n\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u200a\u2028\u2029\u202f\u205f\u3000\u200b\ufeff\x00",
    *"'\"-/_.,;:!?()[]{}@`^~<>\\|*&%$#+=’“”…。，、「·\u0301\u0e34\u20dd",
    *"aZsStTmMdDlLrRvVeEkK09٣²½ⅷ", *"éßſKİıǅʰªñЖяΩ北京あア한ไ\u0903🙂\U0001f468\u200d\U00020000\U000e0001\U0010ffff",
    "\r\n", "\n\n", "  ", "   ", "'s", "'S", "'ll", "'LL", "'re", "'vE", "'ſ", " '", "don't", "I'M", "'d",
    "''", "ﬆ", "ﬅ",
    "the", " the", "The", "ing", " word", "word", "CamelCase", "HTTPServer", "x" * 300, "北" * 120, "12345678", " 42",
    "a" * 192, "b" * 193, "!" * 40, "\n" * 9, "e\u0301" * 3, "<|endoftext|>", "\u2581", "[UNK]",
]  # fmt: skip
hard_text = st.lists(st.sampled_from(PARTS), max_size=30).map("".join) | st.text(max_size=40)


def byte_level(pattern, normalizer=None, **options):
    backend = tokenizers.Tokenizer(models.BPE(**options))
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, last])
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>"],
    )  # fmt: skip
    backend.train_from_iterator([REAL], trainer)
    return backend


def bert():
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([REAL], trainer)
    return backend


def metaspace():
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator([REAL], trainer)
    return backend


# What makes it, the number of its pattern, and whether C++ encodes its words.
KINDS = {
    "gpt2": (lambda: byte_level(None), 0, True),
    "gpt2 by its expression": (lambda: byte_level(GPT2), 0, True),
    "gpt2 nfc": (lambda: byte_level(None, normalizers.NFC()), 0, True),
    "gpt2 lower case": (lambda: byte_level(None, normalizers.Lowercase()), 0, False),
    "cl100k": (lambda: byte_level(CL100K), 1, True),
    "llama 3": (lambda: byte_level(LLAMA3, ignore_merges=True), 1, True),
    "qwen": (lambda: byte_level(QWEN, normalizers.NFC()), 1, True),
    "o200k": (lambda: byte_level(O200K), 1, True),
    "bert": (bert, 2, False),
    "metaspace": (metaspace, 3, False),
}
# One for each of the four patterns; the others are left to the slow tests.
QUICK = {"gpt2", "llama 3", "bert", "metaspace"}


def each(*names):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


MADE: dict[str, tuple[tokenizers.Tokenizer, Tokenizer]] = {}


def made(kind):
    """The library's tokenizer, and ours of the same definition."""
    if kind not in MADE:
        backend = KINDS[kind][0]()
        theirs = tokenizers.Tokenizer.from_str(backend.to_str())
        theirs.encode_special_tokens = True
        MADE[kind] = theirs, Tokenizer(backend.to_str())
    return MADE[kind]


def expected(kind, texts):
    return [encoding.ids for encoding in made(kind)[0].encode_batch(texts, add_special_tokens=False)]


def encoded(tokenizer, texts):
    return [ids.tolist() for ids in tokenizer.encode_arrays(texts)]


def without_extension(tokenizer):
    """The same, but for the words in Python."""
    words = tokenizer._words
    table = word_cache.PythonWords(words._pattern, words._encode, words._dtype)
    return lambda texts: [ids.tolist() for ids in table.encode(texts)]


def hard_texts(count, seed):
    draw = random.Random(seed)
    return ["".join(draw.choices(PARTS, k=draw.randrange(60))) for _ in range(count)]


@needs_extension
@pytest.mark.parametrize("number", range(4))
def test_words_end_where_the_patterns_cut(number):
    pattern = word_cache._PATTERNS[number]
    table = cpu.words.WordTable(number, None, np.dtype("<u2"), 1 << 20)
    every = [chr(code) for code in [*range(0xD800), *range(0xE000, 0x11000), *range(0x1F000, 0x1F100)]]
    texts = [REAL, "".join(every), "a".join(every), " ".join(every), "".join(f"x{c}\n" for c in every)]
    for text in [*texts, *hard_texts(400, number), *PARTS, ""]:
        assert table.cut(text) == pattern.findall(text)


@pytest.mark.parametrize("kind", each(*KINDS))
def test_ids_equal_the_librarys_of_the_whole_text(kind):
    tokenizer = made(kind)[1]
    _, number, native = KINDS[kind]
    assert word_cache._PATTERNS.index(tokenizer._words._pattern) == number
    assert (bpe_parts(tokenizer._backend) is not None) == native
    texts = [REAL, "", *PARTS, *hard_texts(200, 5)]
    wanted = expected(kind, texts)
    assert encoded(tokenizer, texts) == wanted
    assert encoded(tokenizer, texts) == wanted  # the words are known now
    assert without_extension(tokenizer)(texts) == wanted


@pytest.mark.parametrize("kind", ["gpt2", *each("cl100k", "o200k", "qwen")])
@given(text=hard_text)
def test_ids_of_any_text_equal_the_librarys(kind, text):
    assert encoded(made(kind)[1], [text, text]) == expected(kind, [text, text])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_many_texts_equal_the_librarys(kind):
    for seed in range(40):
        texts = hard_texts(500, 100 + seed)
        assert encoded(made(kind)[1], texts) == expected(kind, texts)


@needs_extension
@pytest.mark.parametrize("kind", each("gpt2", "cl100k", "llama 3", "qwen", "o200k"))
def test_a_byte_level_bpe_leaves_little_to_the_library(kind):
    asked = []
    tokenizer = Tokenizer(made(kind)[1]._definition.decode())
    tokenizer._words._encode = lambda texts: asked.extend(texts) or tokenizer._encode(texts)
    text = REAL if kind != "qwen" else REAL.encode("ascii", "ignore").decode()  # NFC may change the others
    assert encoded(tokenizer, [text]) == expected(kind, [text])
    assert asked == []


def test_classes_of_characters_are_those_of_unicode():
    classes = character_classes()
    kinds = {
        "a": 1 | 16 | 64,
        "A": 1 | 16 | 32,
        "7": 2 | 16,
        " ": 4 | 16,
        "\u0301": 8 | 16 | 32 | 64,
        "ª": 1 | 16 | 32 | 64,
    }
    kinds |= {"!": 16, "北": 1 | 16 | 32 | 64, "²": 2 | 16, "\u3000": 4 | 16, "ſ": 0, "\ud800": 0}
    assert {character: classes[ord(character)] for character in kinds} == kinds


def test_names_of_bytes_are_the_librarys():
    names = byte_letters()
    assert sorted(names) == sorted(pre_tokenizers.ByteLevel.alphabet())
    for text in ("é北\x00\x7f\xad ~", "\x80\xa0\xff"):
        spelled = "".join(word for word, _ in pre_tokenizers.ByteLevel(False).pre_tokenize_str(text))
        assert spelled == "".join(names[byte] for byte in text.encode())


@needs_extension
@pytest.mark.parametrize("kind", each("gpt2", "cl100k", "qwen"))
def test_ids_do_not_depend_on_threads(kind, monkeypatch):
    texts = [REAL[at : at + 5000] for at in range(0, len(REAL), 5000)] * 2
    found = []
    for threads in (1, 2, 7):
        tokenizer = Tokenizer(made(kind)[1]._definition.decode())
        tokenizer.encode_arrays([""])
        words = tokenizer._words._table._words
        for _ in range(2):
            state, ids = words.find(texts, threads)
            if state is not None:
                ids = words.fill(state, [np.array(i, tokenizer.dtype).tobytes() for i in tokenizer._encode(ids)])
            found.append([np.frombuffer(one, tokenizer.dtype).tolist() for one in ids])
    assert all(ids == expected(kind, texts) for ids in found)


@needs_extension
def test_the_table_is_bounded_and_begins_anew(monkeypatch):
    monkeypatch.setattr(word_cache, "MOST_BYTES", 1 << 18)
    tokenizer = Tokenizer(made("metaspace")[1]._definition.decode())
    draw = random.Random(3)
    sizes = []
    for _ in range(30):
        text = " ".join(f"w{draw.randrange(10**9)}" for _ in range(800)) + " w" + "x" * 5000
        assert encoded(tokenizer, [text]) == expected("metaspace", [text])
        sizes.append(tokenizer._words._table.bytes)
    assert max(sizes) < 1 << 20
    assert sum(after < before for before, after in pairwise(sizes)) >= 2


@needs_extension
@given(st.lists(st.binary(min_size=1, max_size=24).map(lambda data: data.hex()), unique=True, min_size=1))
def test_the_table_gives_back_what_it_was_given(words):
    asked = []

    def encode(texts):
        asked.extend(texts)
        return [[len(text), *text.encode()] for text in texts]

    table = cpu.words.WordTable(3, encode, np.dtype("<u4"), 1 << 26)
    for _ in range(2):
        given_back = table.encode(words)
        assert [ids.tolist() for ids in given_back] == [[len(word), *word.encode()] for word in words]
    assert asked == words
    assert len(table) == len(words)


def test_lone_surrogates_are_refused_as_by_the_library():
    with pytest.raises(DataError, match="the tokenizer cannot encode the text"):
        made("gpt2")[1].encode_arrays(["fine", "not \ud800 fine"])


def test_a_tokenizer_that_was_used_can_be_pickled():
    tokenizer = made("gpt2")[1]
    wanted = encoded(tokenizer, [REAL])
    assert encoded(pickle.loads(pickle.dumps(tokenizer)), [REAL]) == wanted


@pytest.mark.slow
def test_ids_of_four_bytes_equal_the_librarys():
    definition = json.loads(made("gpt2")[1]._definition)
    vocabulary = definition["model"]["vocab"]
    words = [f"word{number}" for number in range(65_500)]
    vocabulary.update((word, len(vocabulary) + index) for index, word in enumerate(words))
    definition["model"]["ignore_merges"] = True
    tokenizer = Tokenizer(json.dumps(definition))
    assert tokenizer.dtype == np.dtype("<u4")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(definition))
    texts = [" ".join(draw) for draw in ([words[-1], "word65490"], words[:3])] + [
        "\n".join(words[-50:]),
        re.sub("o", "é", REAL),
    ]
    assert encoded(tokenizer, texts) == [theirs.encode(text, add_special_tokens=False).ids for text in texts]
