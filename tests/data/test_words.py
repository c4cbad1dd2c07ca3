"""Words of tokens against words counted otherwise: by hand, by jieba and transformers alone, and token by token."""

import random

import numpy as np
import pytest

from fastlm.data import Tokenizer
from fastlm.data.words import word_ids
from fastlm.errors import ConfigError, DataError

ENGLISH = "The naïve cats weren't running; 12345 unbelievable (fast) mats.\n\tAnd   so on, they sat.\n" * 2
# Zhu Ziqing 1925, Lu Xun 1921, Cao Xueqin 1791.
SIMPLIFIED = (
    "我与父亲不相见已二年余了，我最不能忘记的是他的背影。那年冬天，祖母死了，父亲的差使也交卸了，正是祸不单行的日子。"
    "我从北京到徐州，打算跟着父亲奔丧回家。到徐州见着父亲，看见满院狼藉的东西，又想起祖母，不禁簌簌地流下眼泪。\n"
    "希望本是无所谓有，无所谓无的。这正如地上的路；其实地上本没有路，走的人多了，也便成了路。\n"
)
TRADITIONAL = (
    "我與父親不相見已二年餘了，我最不能忘記的是他的背影。那年冬天，祖母死了，父親的差使也交卸了，正是禍不單行的日子。"
    "我從北京到徐州，打算跟著父親奔喪回家。到徐州見著父親，看見滿院狼藉的東西，又想起祖母，不禁簌簌地流下眼淚。\n"
    "希望本是無所謂有，無所謂無的。這正如地上的路；其實地上本沒有路，走的人多了，也便成了路。\n"
)
DREAM = "列位看官：你道此書從何而來？說起根由雖近荒唐，細按則深有趣味。\n"
MIXED = "她的iPhone手机和T恤, 在 Beijing 北京大学买的（2019年）！ok？\n"
ALL = [ENGLISH, SIMPLIFIED, TRADITIONAL, DREAM, MIXED]


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "byte level": Tokenizer.train_bpe(ALL, 400),
        "wordpiece": Tokenizer.train_wordpiece(ALL * 2, 2000),
        "unigram": Tokenizer.train_unigram(ALL, 700),
        "characters": Tokenizer.characters([*ALL, "▁"]),
    }


def pieces(tokenizer, text, numbers):
    ids = np.array(tokenizer.encode(text))
    return [tokenizer.decode(ids[numbers == number]).replace(" ", "") for number in range(numbers[-1] + 1)]


WORDS = ["The", "naïve", "cats", "weren", "'", "t", "running", ";", "12345", "unbelievable", "(", "fast", ")"]


@pytest.mark.parametrize("kind", ["byte level", "wordpiece", "unigram", "characters"])
def test_english_words_and_marks_are_whole(kind, tokenizers):
    tokenizer = tokenizers[kind]
    got = pieces(tokenizer, ENGLISH, word_ids(tokenizer, ENGLISH))[: len(WORDS)]
    want = [word.lower().replace("ï", "i") for word in WORDS] if kind == "wordpiece" else WORDS
    if kind == "byte level":  # GPT-2's rules keep these together
        want = [*want[:4], "'t", *want[6:]]
        got = got[: len(want)]
    assert got == want


@pytest.mark.parametrize("kind", ["byte level", "wordpiece", "unigram", "characters"])
def test_chinese_without_a_segmenter_goes_by_the_character(kind, tokenizers):
    tokenizer = Tokenizer.train_bpe([], 257) if kind == "byte level" else tokenizers[kind]
    text = "北京大学，ok？"
    want = ["北", "京", "大", "学", "，", "ok", "？"]
    assert pieces(tokenizer, text, word_ids(tokenizer, text)) == want


def joined_by_hand(spans, words):
    """Groups of tokens: those that have a character of one word in common, until no more are joined."""
    group = list(range(len(spans)))
    for word in words:
        members = [index for index, (start, end) in enumerate(spans) if start < word[1] and word[0] < end]
        for index in members:
            old, new = group[index], group[members[0]]
            group = [new if number == old else number for number in group]
    return group


def words_of_jieba(text):
    """The spans of what jieba finds in Han; every other character by itself."""
    import jieba

    spans, at = [], 0
    for word in jieba.Tokenizer().cut(text):
        spans.append((at, at + len(word)))
        at += len(word)
    return spans


def same_groups(one, other):
    return len(set(zip(one, other, strict=True))) == len(set(one)) == len(set(other))


@pytest.fixture(scope="module")
def jieba_spans():
    pytest.importorskip("jieba")
    return {text: words_of_jieba(text) for text in (SIMPLIFIED, MIXED.replace(" ", ""))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte level", "wordpiece", "unigram", "characters"])
@pytest.mark.parametrize("traditional", [False, True])
def test_chinese_words_are_jiebas_in_both_scripts(kind, traditional, tokenizers, jieba_spans):
    # Both scripts have the same words; what jieba finds is asked of it for the simplified one alone.
    tokenizer, text = tokenizers[kind], TRADITIONAL if traditional else SIMPLIFIED
    assert len(TRADITIONAL) == len(SIMPLIFIED)
    encoding = tokenizer._backend.encode(text, add_special_tokens=False)
    got = word_ids(tokenizer, text, "jieba")
    # A line's end is a word of jieba's, and belongs to what follows it: of each kind its own way.
    kept = [index for index, (start, _) in enumerate(encoding.offsets) if text[start] != "\n"]
    spans = [encoding.offsets[index] for index in kept]
    assert same_groups(got[kept].tolist(), joined_by_hand(spans, jieba_spans[SIMPLIFIED]))
    words = [SIMPLIFIED[start:end] for start, end in jieba_spans[SIMPLIFIED]]
    assert {"父亲", "忘记", "背影", "祸不单行", "徐州", "狼藉", "其实"} <= set(words)


@pytest.mark.slow
def test_a_token_of_two_words_joins_them():
    text = "在北京大学"  # jieba: 在, 北京大学
    tokenizer = Tokenizer.train_bpe(["在北 京大学 "] * 9, 300)
    ids = tokenizer.encode(text)
    assert "在北" in [tokenizer.decode([number]) for number in ids]
    assert set(word_ids(tokenizer, text, "jieba").tolist()) == {0}
    apart = Tokenizer.train_bpe([""], 257)
    assert word_ids(apart, text, "jieba").tolist() == [0] * 3 + [1] * 12


def test_words_of_latin_letters_and_han_are_one_word_of_jiebas():
    pytest.importorskip("jieba")
    tokenizer = Tokenizer.characters(ALL)
    numbers = word_ids(tokenizer, "她的T恤和北京大学，在 北京 ok", "jieba")
    assert pieces(tokenizer, "她的T恤和北京大学，在 北京 ok", numbers) == [
        "她", "的", "T恤", "和", "北京大学", "，", "在", "北京", "ok"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte level", "wordpiece", "unigram", "characters"])
@pytest.mark.parametrize("segmenter", ["none", "jieba"])
def test_ids_have_the_words_of_their_text(kind, segmenter, tokenizers):
    tokenizer = tokenizers[kind]
    for text in ALL:
        text = text.replace("\n", "").lower() if kind == "wordpiece" else text  # of which the ids do not know
        ids = tokenizer.encode(text)
        assert word_ids(tokenizer, ids, segmenter).tolist() == word_ids(tokenizer, text, segmenter).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte level", "wordpiece"])
def test_english_words_are_those_of_transformers(kind, tokenizers):
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizers[kind]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend)
    encoding = theirs(ENGLISH, add_special_tokens=False)
    assert encoding.input_ids == tokenizer.encode(ENGLISH)
    if kind == "wordpiece":
        assert word_ids(tokenizer, ENGLISH).tolist() == encoding.word_ids(0)
        return
    # GPT-2's rules make blanks before the last one a pre-token of their own, which here belongs to what follows.
    blank = [not tokenizer.decode([number]).strip() for number in encoding.input_ids]
    want = [number for number, skip in zip(encoding.word_ids(0), blank, strict=True) if not skip]
    got = [number for number, skip in zip(word_ids(tokenizer, ENGLISH), blank, strict=True) if not skip]
    assert same_groups(got, want)


@pytest.mark.parametrize("kind", ["byte level", "wordpiece", "unigram", "characters"])
def test_windows_of_ids_with_special_tokens_in_them(kind, tokenizers):
    tokenizer = tokenizers[kind]
    special = tokenizer.special_ids("masked")["end"] if kind == "wordpiece" else tokenizer.eot_id
    ids = [special, *(number for text in ALL for number in (*tokenizer.encode(text), special))]
    rng = random.Random(0)
    for _ in range(20):
        start = rng.randrange(len(ids))
        window = np.array(ids[start : start + 64], np.uint16)
        numbers = word_ids(tokenizer, window)
        assert ((numbers == -1) == (window == special)).all()
        plain = numbers[numbers >= 0]
        if len(plain):
            assert plain[0] == 0
            assert set(np.diff(plain).tolist()) <= {0, 1}
        for before, at, after in zip(numbers, window[1:], numbers[2:], strict=False):
            assert at != special or before != after or before == -1  # no word on both sides


def test_the_unknown_token_is_a_word_and_nothing_is_none(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    ids = tokenizer.encode("cats 龘 sat")
    assert tokenizer.unknown_id in ids
    assert pieces(tokenizer, "cats 龘 sat", word_ids(tokenizer, ids)) == ["cats", "[UNK]", "sat"]
    assert word_ids(tokenizer, ids).tolist() == word_ids(tokenizer, "cats 龘 sat").tolist()
    assert word_ids(tokenizer, "").dtype == np.int64
    assert len(word_ids(tokenizer, [])) == len(word_ids(tokenizer, "")) == 0


def test_bad_input_is_named(tokenizers):
    tokenizer = tokenizers["characters"]
    with pytest.raises(ConfigError, match=r"^segmenter='thulac', expected one of none, jieba$"):
        word_ids(tokenizer, "a", "thulac")
    with pytest.raises(DataError, match=rf"^token id {tokenizer.vocab_size} is outside the vocabulary of"):
        word_ids(tokenizer, [1, tokenizer.vocab_size])
    with pytest.raises(DataError, match=r"'龘' \(U\+9F98\) at character 1 is not in the vocabulary"):
        word_ids(tokenizer, "a龘")
