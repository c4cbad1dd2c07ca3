"""Packed windows and mixtures against plain Python: best fit, no token lost, each corpus its share."""

import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from fastlm.data.mixing import Mixture, shares
from fastlm.data.packing import CutExamples, CutWindows, PackedWindows, best_fit, document_starts
from fastlm.data.windows import ShiftedWindows, Windows
from fastlm.errors import ConfigError, DataError

END = 0


def stream(rng, documents, longest=40):
    """Tokens of documents, each with its end, and the documents' lengths with it. No two tokens but ends are equal."""
    lengths = [1 + rng.randrange(longest) for _ in range(documents)]
    tokens, number = [], 1
    for length in lengths:
        tokens += [*range(number, number + length - 1), END]
        number += length
    return np.array(tokens, np.uint32)


def best_fit_by_hand(lengths, room):
    """Each in turn, the longest first, where it leaves the least room; returns the bins, as sorted lengths."""
    bins = []
    for size in sorted(lengths, reverse=True):
        fitting = [part for part in bins if sum(part) + size <= room]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return Counter(tuple(sorted(part)) for part in bins)


@pytest.mark.parametrize("room", [7, 30, 64])
def test_best_fit_is_best_fit(room):
    rng = random.Random(room)
    for _ in range(50):
        lengths = np.array([rng.randint(1, room) for _ in range(rng.randrange(60))], np.int64)
        bins = best_fit(lengths, room)
        free = Counter()
        for number, size in zip(bins.tolist(), lengths.tolist(), strict=True):
            free[number] += size
        assert all(used <= room for used in free.values())
        assert set(free) == set(range(len(free)))
        # Of bins with equal room another may be taken, which changes their contents and not how full they are.
        by_hand = best_fit_by_hand(lengths.tolist(), room)
        assert Counter(free.values()) == Counter(sum(part) for part in by_hand.elements())


@pytest.mark.parametrize("length", [1, 5, 16, 1000])
def test_packing_loses_no_token_and_crosses_no_document(length):
    rng = random.Random(length)
    for documents in (1, 2, 30, 200):
        tokens = stream(rng, documents)
        if len(tokens) < 2:
            continue
        windows = PackedWindows(tokens, length, END)
        seen = Counter()
        for number in range(len(windows)):
            window = windows[number]
            assert len(window.tokens) == len(window.targets) == window.lengths.sum() <= length
            start = 0
            for part in window.lengths:
                ids, targets = window.tokens[start : start + part], window.targets[start : start + part]
                assert END not in ids[1:]  # an end begins the next document, and is the last target of its own
                assert (targets[:-1] == ids[1:]).all()
                seen.update(zip(ids.tolist(), targets.tolist(), strict=True))
                start += part
        assert seen == Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_packing_fills_windows_better_than_documents_in_turn():
    tokens = stream(random.Random(0), 3000, longest=100)
    windows = PackedWindows(tokens, 128, END)
    least = -(-(len(tokens) - 1) // 128)
    assert len(windows) <= least * 1.01
    in_turn, room = 1, 128
    for size in np.diff(document_starts(tokens, END), append=len(tokens) - 1).tolist():
        in_turn, room = (in_turn, room - size) if size <= room else (in_turn + 1, 128 - size)
    assert in_turn > 1.2 * least


def test_document_starts_in_turns_are_those_at_once(monkeypatch):
    tokens = stream(random.Random(1), 50)
    want = [0, *(index for index in range(1, len(tokens) - 1) if tokens[index] == END)]
    for chunk in (1, 2, 7, 1 << 24):
        monkeypatch.setattr("fastlm.data.packing._CHUNK", chunk)
        assert document_starts(tokens, END).tolist() == want


def test_cut_windows_know_where_documents_begin():
    tokens = stream(random.Random(2), 40)
    cut = CutWindows(Windows(tokens, 16), END)
    joined = np.concatenate([cut[number].tokens for number in range(len(cut))])
    assert (joined == tokens[:-1]).all()
    for number in range(len(cut)):
        ids, targets, lengths = cut[number]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        assert starts.tolist() == [0, *(index for index in range(1, len(ids)) if ids[index] == END)]
        assert len(targets) == lengths.sum()
    examples = CutExamples(ShiftedWindows(tokens, 16), END)
    one, two = (examples.epoch(np.random.default_rng(3)) for _ in range(2))
    assert all((one[n].tokens == two[n].tokens).all() for n in range(len(examples)))


def test_packing_names_an_id_beyond_the_vocabulary_and_too_few_tokens():
    windows = PackedWindows(np.array([1, 2, 900, 0], np.uint16), 8, END, vocab_size=10)
    with pytest.raises(DataError, match=r"^tokens: the id at 2 is 900, expected below the vocabulary of 10$"):
        windows[0]
    with pytest.raises(DataError, match=r"^the val split has 1 tokens, a window needs at least 2$"):
        PackedWindows(np.array([1]), 8, END, split="val")


def test_shares_are_the_nearest_whole_numbers():
    rng = random.Random(0)
    for _ in range(300):
        weights = [rng.choice([1, 2, 3, 0.5, 7]) for _ in range(rng.randint(1, 6))]
        total = rng.randrange(1000)
        exact = [Fraction(total) * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
        counts = shares(total, weights)
        assert sum(counts) == total
        assert all(abs(count - part) < 1 for count, part in zip(counts, exact, strict=True))
        assert shares(total, [weight * 3 for weight in weights]) == counts
    for bad in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="expected positive finite numbers"):
            shares(10, [1, bad])


def mixture(weights):
    corpora = [ShiftedWindows(np.full(10 * count + 1, number), 10) for number, count in enumerate((50, 30, 20))]
    return corpora, Mixture(corpora, weights)


@pytest.mark.parametrize("weights", [None, [1, 1, 1], [0.8, 0.1, 0.1], [1, 2, 30]])
def test_a_mixture_has_each_corpus_by_its_weight_and_is_the_same_each_time(weights):
    corpora, mixed = mixture(weights)
    total = sum(map(len, corpora))
    assert len(mixed) == total
    epochs = [mixed.epoch(np.random.default_rng([7, 3])) for _ in range(2)]
    first, second = ([epoch[index].tolist() for index in range(total)] for epoch in epochs)
    assert first == second
    got = Counter(window[0] for window in first)
    want = list(map(len, corpora)) if weights is None else shares(total, weights)
    assert [got[number] for number in range(3)] == want
    with pytest.raises(IndexError):
        epochs[0][total]


def test_of_a_corpus_that_gets_more_all_come_as_often_but_for_one_time():
    tokens = np.arange(1, 101)
    corpora = [Whole(tokens[:7]), Whole(tokens[7:40])]
    mixed = Mixture(corpora, [3, 1])
    epoch = mixed.epoch(np.random.default_rng(0))
    counts = Counter(int(epoch[index]) for index in range(len(epoch)))
    small = [counts[number] for number in range(1, 8)]
    assert sum(small) == 30
    assert max(small) - min(small) <= 1
    large = [counts[number] for number in range(8, 41)]
    assert sorted(set(large)) == [0, 1]
    other = mixed.epoch(np.random.default_rng(1))
    assert {int(other[i]) for i in range(len(other))} != {int(epoch[i]) for i in range(len(epoch))}
    with pytest.raises(ConfigError, match="2 weights for 1 corpora"):
        Mixture(corpora[:1], [1, 2])


class Whole:
    """Examples that are tokens, in order."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def epoch(self, random):
        return self.tokens
