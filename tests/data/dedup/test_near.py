"""Nearly equal documents, against the Jaccard similarity of Python's sets for every pair."""

import os
import random
import subprocess
import sys
from itertools import combinations
from math import sqrt

import numpy as np
import pytest

from data.dedup.corpus import Run, english, n_grams, pair_of_similarity, similarity
from fastlm.data.dedup import (
    ExactOptions,
    NearOptions,
    bands,
    collision_probability,
    fingerprint,
    grouping,
    resolve,
    save,
    signatures,
)
from fastlm.data.dedup import near as near_module
from fastlm.data.dedup.signing import library, minhash
from fastlm.errors import DataError

PAIRS = 2000


def chinese(rng):
    """A character of 20,000, so that few occur twice in a text."""
    return chr(rng.randrange(0x4E00, 0x9FA5))


def pairs_at(rng, count, share, n, word):
    """Pairs of texts whose similarity is `share` exactly."""
    shared = 80
    own = round(shared * (1 - share) / (2 * share))
    assert shared / (shared + 2 * own) == pytest.approx(share)
    return [text for _ in range(count) for text in pair_of_similarity(rng, shared, own, n, word)]


@pytest.mark.parametrize(("threshold", "n", "word"), [(0.8, 5, english), (0.5, 3, english), (0.8, 5, chinese)])
def test_pairs_at_the_threshold_are_found(threshold, n, word, tmp_path):
    """Were the recall 0.973, 1 run in 40 would pass; at the 0.99 that the bands promise, 1 in 10^5 fails."""
    rng = random.Random(0)
    texts = pairs_at(rng, PAIRS, threshold, n, word)
    assert similarity(*texts[:2], n) == pytest.approx(threshold)
    run = Run(texts, tmp_path, near=NearOptions(threshold, ngram=n))
    assert len(run.dropped) >= 0.98 * PAIRS
    assert run.dropped <= set(range(1, 2 * PAIRS, 2))  # of each pair at most one, and that is the second


def test_bands_offer_pairs_as_the_formula_says(tmp_path):
    """At similarities below the threshold too, where poor permutations would show: within 4.5 standard deviations."""
    options = NearOptions(0.8, ngram=1, seed=7)
    shape = bands(0.8, 0.99)
    for share in (0.4, 0.5, 2 / 3, 0.8):
        texts = pairs_at(random.Random(0), PAIRS, share, 1, english)
        save(tmp_path / "0.npy", signatures(texts, None, options))
        loaded = near_module.Signatures([tmp_path / "0.npy"], options)
        offered = near_module._candidates(loaded, np.ones(len(texts), bool)).size / 2 / PAIRS
        expected = collision_probability(share, *shape)
        assert abs(offered - expected) < 4.5 * sqrt(expected * (1 - expected) / PAIRS), share


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("recall", [0.9, 0.98, 0.999])
def test_bands_have_the_recall_at_the_threshold(threshold, recall):
    count, rows = bands(threshold, recall)
    assert collision_probability(threshold, count, rows) >= recall
    assert collision_probability(threshold, count - 1, rows) < recall
    assert count * rows <= 128 or rows == 1


def edited(rng, text, share):
    words = text.split()
    return " ".join(english(rng) if rng.random() < share else word for word in words)


def corpus(rng, groups=40, size=60):
    """Documents in groups about a common text, some near to it and some not, in random order."""
    texts = []
    for _ in range(groups):
        base = " ".join(english(rng) for _ in range(rng.randrange(size)))
        texts += [edited(rng, base, rng.choice([0, 0.02, 0.04, 0.1])) for _ in range(rng.randrange(1, 7))]
    rng.shuffle(texts)
    return texts


@pytest.mark.parametrize("keep", ["first", "longest"])
@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_what_stays_and_why(keep, threshold, tmp_path):
    texts = corpus(random.Random(3))
    run = Run(texts, tmp_path, near=NearOptions(threshold, keep=keep))
    sets = [n_grams(text, 5) for text in texts]
    alike = {
        (one, other)
        for one, other in combinations(range(len(texts)), 2)
        if sets[one] & sets[other] and len(sets[one] & sets[other]) >= threshold * len(sets[one] | sets[other])
    }
    assert len(alike) > 50
    # Each document is dropped for one that it is alike to, and for a member of its group that stays.
    group = _groups(len(texts), alike)
    assert len(run.pairs) == len(run.dropped)
    for pair in run.pairs:
        assert tuple(sorted((pair["dropped"], pair["like"]))) in alike
        exact = similarity(texts[pair["dropped"]], texts[pair["like"]], 5)
        assert pair["similarity"] == pytest.approx(exact, abs=1e-4)
        assert group[pair["dropped"]] == group[pair["kept"]]
        assert pair["kept"] not in run.dropped
        before = [
            (-len(texts[n]) if keep == "longest" else 0, n) for n in (pair["kept"], pair["dropped"], pair["like"])
        ]
        assert before[0] < before[1]
        assert before[0] <= before[2]
    # Of alike ones hardly two stay, and of no group all are dropped.
    assert sum(not set(pair) & run.dropped for pair in alike) <= 0.02 * len(alike)
    assert {group[number] for number in range(len(texts)) if number not in run.dropped} == set(group)


def _groups(count, pairs):
    """For each document the first of those that it is alike to, directly or through others."""
    of = list(range(count))
    changed = True
    while changed:
        changed = False
        for one, other in pairs:
            low = min(of[one], of[other])
            changed |= of[one] != low or of[other] != low
            of[one] = of[other] = low
    return of


@pytest.mark.parametrize(("shards", "part"), [(5, 1 << 22), (1, 10), (5, 50)])
def test_neither_shards_nor_parts_change_what_stays(shards, part, tmp_path, monkeypatch):
    texts = corpus(random.Random(4), groups=20)
    options = {"exact": ExactOptions(), "near": NearOptions()}
    expected = Run(texts, tmp_path / "whole", **options)
    monkeypatch.setattr(grouping, "PART", part)
    run = Run(texts, tmp_path / "parts", **options, shards=shards)
    assert (run.reasons == expected.reasons).all()
    assert set(expected.counts.values()) - {0} == set(expected.counts.values())


def test_another_process_makes_the_same_signatures():
    """Nor do its hash seed and its threads change them."""
    texts = [f"{n} " * n + "中文" * n for n in range(300)]
    code = """if True:
        import sys
        from fastlm.data.dedup import *
        texts = [f"{n} " * n + "中文" * n for n in range(300)]
        sys.stdout.buffer.write(signatures(texts, ExactOptions(), NearOptions()))"""
    environment = os.environ | {"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout == signatures(texts, ExactOptions(), NearOptions()).tobytes()


def test_a_minhash_is_the_least_of_its_members():
    members = [1, 2, 3, 10, 20, 30, 999]
    assert near_minhash(members) == np.min([near_minhash([one]) for one in members], axis=0).tolist()
    assert near_minhash(members) == near_minhash(members[::-1] * 3)


def near_minhash(members):
    hashes = np.array(members, np.uint64)
    return minhash(hashes, np.array([0, hashes.size]), 16, 42)[0].tolist()


def test_fingerprints_tell_options_apart():
    options = [None, NearOptions(), NearOptions(seed=1), NearOptions(0.7), NearOptions(ngram=4)]
    prints = {fingerprint(exact, near) for exact in (None, ExactOptions(), ExactOptions(64)) for near in options}
    assert len(prints) == 15


def test_many_alike_documents_cost_one_comparison_each(tmp_path, monkeypatch):
    rng = random.Random(5)
    base = " ".join(english(rng) for _ in range(200))
    texts = [edited(rng, base, 0.005) for _ in range(500)]
    compared = []
    monkeypatch.setattr(
        near_module, "jaccard", lambda *sets, plain=near_module.jaccard: compared.append(1) or plain(*sets)
    )
    run = Run(texts, tmp_path, near=NearOptions(0.7))
    assert run.dropped == set(range(1, 500))
    assert len(compared) < 2000


def test_unlike_documents_of_one_band_are_compared_with_some_alone(tmp_path, monkeypatch):
    rng = random.Random(6)
    texts = [" ".join(english(rng) for _ in range(30)) for _ in range(300)]
    texts.append(texts[0])
    monkeypatch.setattr("fastlm.data.dedup.signing._band_keys", lambda batch, _: np.ones((16, len(batch)), np.uint64))
    monkeypatch.setattr(near_module, "LEADERS", 10)
    compared = []
    monkeypatch.setattr(
        near_module, "jaccard", lambda *sets, plain=near_module.jaccard: compared.append(1) or plain(*sets)
    )
    assert Run(texts, tmp_path, near=NearOptions()).dropped == {300}
    assert len(compared) <= 16 * 10 * 300


def test_short_documents_and_those_without_words(tmp_path):
    texts = ["", "...", "one", "One!", "one two", "中文", "中 文", "!!!", "two one"]
    run = Run(texts, tmp_path, near=NearOptions())
    assert run.dropped == {3, 6}
    assert Run(texts, tmp_path / "exact", ExactOptions(), NearOptions()).dropped == {3, 6}


def test_documents_equal_to_a_dropped_one_do_not_stay(tmp_path):
    rng = random.Random(7)
    base = " ".join(english(rng) for _ in range(200))
    near = base.replace(base.split()[100], "other")
    run = Run([base, near, near, base], tmp_path, ExactOptions(), NearOptions())
    assert run.reasons.tolist() == [0, 2, 1, 1]


def test_a_reader_that_gives_too_few_texts_is_refused(tmp_path):
    options = NearOptions()
    save(tmp_path / "0.npy", signatures(["one two three"] * 3, None, options))
    with pytest.raises(ValueError, match="texts: got 2 texts, expected 3"):
        resolve([tmp_path / "0.npy"], lambda documents: ["one two three"] * 2, near=options)


def test_a_missing_library_is_named_with_the_extra():
    with pytest.raises(DataError, match=r"no_such_library is needed to find duplicates: .*extra: \.\[data\]"):
        library("no_such_library")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "threshold: got 0"),
        ({"threshold": 1.5}, "threshold: got 1.5"),
        ({"recall": 1}, "recall: got 1"),
        ({"ngram": 0}, "ngram: got 0"),
        ({"keep": "last"}, "keep: got 'last'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        NearOptions(**options)
