"""Equal documents, against a dictionary."""

import random

import numpy as np
import pytest

from data.dedup.corpus import Run
from fastlm.data.dedup import ExactOptions, Shards, grouping, resolve, save, signatures
from fastlm.data.dedup import exact as exact_module
from fastlm.errors import DataError


def corpus(rng, count=400):
    return ["".join(rng.choice("aAb ,中") for _ in range(rng.randrange(6))) for _ in range(count)]


def plain(text, ignore):
    text = text.casefold() if "case" in ignore else text
    text = text.replace(",", "") if "punctuation" in ignore else text
    return " ".join(text.split()) if "whitespace" in ignore else text


@pytest.mark.parametrize("bits", [64, 128])
@pytest.mark.parametrize(
    "ignore", [(), ("case",), ("whitespace",), ("punctuation",), ("case", "whitespace", "punctuation")]
)
def test_the_first_of_equal_documents_stays(bits, ignore, tmp_path):
    texts = corpus(random.Random(0))
    run = Run(texts, tmp_path, ExactOptions(bits, ignore), shards=3)
    first: dict[str, int] = {}
    kept = [first.setdefault(plain(text, ignore), number) for number, text in enumerate(texts)]
    expected = [
        {"reason": "exact duplicate", "dropped": number, "kept": one, "like": one, "similarity": 1.0}
        for number, one in enumerate(kept)
        if number != one
    ]
    assert run.pairs == expected
    assert run.dropped == {pair["dropped"] for pair in expected}
    assert run.counts == {"exact duplicate": len(expected)}  # of others there is no word


@pytest.mark.parametrize("hashes", [1, 7])
@pytest.mark.parametrize("compared", [1, 20, 1 << 25])
def test_texts_decide_where_hashes_collide(hashes, compared, tmp_path, monkeypatch):
    texts = corpus(random.Random(1), 150)
    expected = Run(texts, tmp_path / "good", ExactOptions())
    monkeypatch.setattr(exact_module, "COMPARED", compared)
    monkeypatch.setattr("fastlm.data.dedup.signing._exact_hash", lambda text, _: (1 + len(text) % hashes, 0))
    run = Run(texts, tmp_path / "bad", ExactOptions())
    assert len(run.pairs) > 20
    assert run == expected


@pytest.mark.parametrize("shards", [1, 4, 50])
@pytest.mark.parametrize("part", [3, 100])
def test_neither_shards_nor_parts_change_what_stays(shards, part, tmp_path, monkeypatch):
    texts = corpus(random.Random(2))
    expected = Run(texts, tmp_path / "whole", ExactOptions())
    monkeypatch.setattr(grouping, "PART", part)
    run = Run(texts, tmp_path / "parts", ExactOptions(), shards=shards)
    assert (run.reasons == expected.reasons).all()
    assert sorted(run.pairs, key=lambda pair: pair["dropped"]) == expected.pairs


def test_memory_for_texts_is_bounded(tmp_path, monkeypatch):
    texts = ["x" * size for size in range(1, 40)] * 3
    monkeypatch.setattr(exact_module, "COMPARED", 100)
    file = tmp_path / "0.npy"
    save(file, signatures(texts, ExactOptions(), None))
    asked = []

    def read(documents):
        asked.append(sum(len(texts[number]) for number in documents))
        return [texts[number] for number in documents]

    assert resolve([file], read, ExactOptions()).counts["exact duplicate"] == 2 * 39
    assert max(asked) <= 100


def test_hashes_alone_need_128_bits(tmp_path):
    file = tmp_path / "0.npy"
    save(file, signatures(["a", "a"], ExactOptions(64), None))
    picked = np.ones(2, bool)
    loaded = exact_module.Signatures([file], None)
    with pytest.raises(ValueError, match="texts: got None, expected a reader of texts"):
        list(exact_module.find_exact(loaded, ExactOptions(64), picked))
    (found,) = exact_module.find_exact(loaded, ExactOptions(128), picked)
    assert found.dropped.tolist() == [1]


def test_an_empty_corpus_and_shards_without_documents(tmp_path):
    assert Run([], tmp_path / "none", ExactOptions()).dropped == set()
    assert resolve([], Shards(lambda _: [], []), ExactOptions()).reasons.size == 0
    assert Run(["a", "a"], tmp_path / "few", ExactOptions(), shards=7).dropped == {1}


def test_only_shards_that_are_needed_are_read():
    asked = []
    shards = Shards(lambda number: asked.append(number) or iter(["a", "b", "c"]), [3, 3, 3])
    assert list(shards(np.array([1, 7, 8]))) == ["b", "b", "c"]
    assert asked == [0, 2]


@pytest.mark.parametrize("damage", ["cut", "garbage", "missing", "options"])
def test_damaged_signatures_are_named(damage, tmp_path):
    file = tmp_path / "0.npy"
    save(file, signatures(["a", "b"], ExactOptions(), None)[: 2 if damage == "options" else 3])
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    if damage == "garbage":
        file.write_bytes(b"garbage")
    if damage == "missing":
        file.unlink()
    with pytest.raises(DataError, match=r"0\.npy"):
        resolve([file], lambda _: [], ExactOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 32}, "bits: got 32, expected 64 or 128"),
        ({"ignore": ("colour",)}, "ignore: got 'colour', expected 'case'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ExactOptions(**options)
