"""Words as numbers, and n-grams of them, against Python's own words and tuples."""

import random
import unicodedata

import numpy as np
import pytest

from data.dedup.corpus import WORD
from fastlm.data.dedup import shingles
from fastlm.data.dedup.shingles import BLOCK, batches, constants, grams, mixed, words

PIECES = ["the", "The", "THE", "a", "a_1", "42", "中", "文", "。", "か", "-", ", ", "\n", "  ", "\t", "", "x" * 40]


def random_text(rng, pieces=30):
    return "".join(rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(rng.randrange(pieces)))


def numbers_of(texts):
    found = words(texts)
    return [found.of(text).tolist() for text in range(len(texts))]


def test_words_are_equal_exactly_where_pythons_words_are():
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(500)]
    seen: dict[str, int] = {}
    for text, numbers in zip(texts, numbers_of(texts), strict=True):
        expected = WORD.findall(text.lower())
        assert len(numbers) == len(expected), text
        assert all(seen.setdefault(word, number) == number for word, number in zip(expected, numbers, strict=True))
    assert len(set(seen.values())) == len(seen) > 50


def test_a_texts_words_depend_on_it_alone():
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(50)]
    assert numbers_of(texts) == [numbers_of([text])[0] for text in texts]


@pytest.mark.parametrize("separator", [" ", "中", "\n"])
def test_texts_longer_than_a_block_have_the_same_words(separator):
    rng = random.Random(2)
    single = [f"{rng.randrange(999)}" + "x" * 40 for _ in range(BLOCK // 20)]
    text = separator.join(single)
    assert len(text) > BLOCK
    known = {word: numbers_of([word])[0][0] for word in set(single)}
    expected = [known[word] for word in single]
    between = numbers_of([separator])[0]
    if between:
        expected = [number for word in expected for number in (word, between[0])][:-1]
    assert numbers_of([text, "one more"])[0] == expected


def test_a_word_longer_than_a_block_does_not_depend_on_its_neighbours():
    text = "x" * (2 * BLOCK + 5)
    assert numbers_of([text]) == numbers_of(["a short one", text, text])[1:2]


def test_case_full_width_and_punctuation_count_for_nothing():
    assert (
        numbers_of(["Hello, World! É", "\uff28\uff25\uff2c\uff2c\uff2f world。é"])
        == [numbers_of(["hello world é"])[0]] * 2
    )
    assert numbers_of(["naïve"]) != numbers_of(["naive"])


def test_marks_belong_to_their_words():
    assert len(numbers_of(["नमस्ते दुनिया"])[0]) == 2  # a regular expression's \w breaks both


@pytest.mark.parametrize("text", ["中文文字", "ひらがな", "ภาษา", "ဘာသာ", "ភាសា", "𠀀𠀁"])
def test_scripts_without_blanks_go_by_the_character(text):
    assert len(numbers_of([text])[0]) == len(text)


def test_lone_surrogates_and_unassigned_characters_are_no_words():
    assert numbers_of(["\ud800 \U0010ffff \x00", ""]) == [[], []]


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_grams_are_equal_exactly_where_tuples_of_words_are(n):
    rng = random.Random(n)
    texts = [" ".join(rng.choice("abc") for _ in range(rng.randrange(20))) for _ in range(200)]
    numbers = words(texts)
    seen: dict[tuple, int] = {}
    for short in (True, False):
        found = grams(numbers, n, short)
        for text, letters in enumerate(text.split() for text in texts):
            tuples = [tuple(letters[at : at + n]) for at in range(len(letters) - n + 1)]
            if short and 0 < len(letters) < n:
                tuples = [tuple(letters)]
            hashes = found.of(text).tolist()
            assert len(hashes) == len(tuples)
            assert all(seen.setdefault(gram, value) == value for gram, value in zip(tuples, hashes, strict=True))
    assert len(set(seen.values())) == len(seen) > 2


def test_batches_hold_all_texts_in_order():
    texts = ["a" * size for size in (0, 5, 30, 3, 3, 3, 11, 0)]
    found = list(batches(texts, chars=10))
    assert [text for batch in found for text in batch] == texts
    assert all(len(batch) == 1 or sum(map(len, batch)) <= 10 for batch in found)


def test_mixing_is_one_to_one_and_changes_half_the_bits():
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 1 << 63, 2000, dtype=np.uint64)
    assert np.unique(mixed(np.arange(1 << 16, dtype=np.uint64))).size == 1 << 16
    for bit in range(64):
        changed = mixed(numbers) ^ mixed(numbers ^ np.uint64(1 << bit))
        assert abs(np.bitwise_count(changed).mean() - 32) < 1
    assert np.unique(constants(1000, 0)).size == 1000
    assert (constants(1000, 0) & np.uint64(1)).all()


def test_the_table_of_characters_agrees_with_unicode():
    table = shingles._characters()
    for code in range(0x250):
        category = unicodedata.category(chr(code))[0]
        assert bool(table.kinds[code]) == (category in "LMN" or chr(code) == "_")
        assert table.values[code] == table.values[ord(chr(code).lower()[0])]
