"""Lines and paragraphs that occur too often, against a plain count."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from fastlm.data.dedup import LineFilter, LineOptions, line_hashes, lines, repeated_lines, save


def filtered(texts, options, folder, shards=3):
    """Each text without what occurs too often, and how many different lines do."""
    bounds = [len(texts) * number // shards for number in range(shards + 1)]
    files = [folder / f"{number}.npy" for number in range(shards)]
    counts = []
    for file, start, end in zip(files, bounds[:-1], bounds[1:], strict=True):
        save(file, line_hashes(texts[start:end], options))
        counts.append(end - start)
    count = repeated_lines(files, counts, options, folder / "repeated.npy")
    take_out = LineFilter(folder / "repeated.npy", options)
    return [take_out.filter(number, text) for number, text in enumerate(texts)], count


def plain(line):
    return " ".join(line.split()).casefold()


def expected(texts, options):
    """By the definition: units are what is between line feeds, or between blank lines."""
    pattern = r"(\n)" if options.unit == "line" else r"(\n[ \t]*\n\s*)"
    cut = [re.split(pattern, text) for text in texts]
    count = Counter(plain(unit) for parts in cut for unit in parts[::2])
    seen = set()
    results = []
    for text, parts in zip(texts, cut, strict=True):
        kept = ""
        for unit, mark in zip(parts[::2], [*parts[1::2], ""], strict=True):
            key = plain(unit)
            if key and count[key] > options.most and (options.keep == "none" or key in seen):
                continue
            seen.add(key)
            kept += unit + mark
        results.append((kept if kept.strip() else None) if kept != text else text)
    return results, sum(bool(key) and number > options.most for key, number in count.items())


def corpus(rng, count=200):
    units = [*"abcdefghijklmnopqrstuvwxyz", "Menu", " menu ", "MENU", "", " ", "中文", "\ud800"]
    return [
        "".join(rng.choice(units) + rng.choice(["\n", "\n\n", "\n \n", ""]) for _ in range(rng.randrange(6)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("unit", ["line", "paragraph"])
@pytest.mark.parametrize("keep", ["first", "none"])
@pytest.mark.parametrize("most", [1, 5, 15])
def test_what_occurs_too_often_is_taken_out(unit, keep, most, tmp_path):
    options = LineOptions(unit, most, keep)
    texts = corpus(random.Random(most))
    wanted = expected(texts, options)
    assert wanted[1] > 0
    assert None in wanted[0]
    assert filtered(texts, options, tmp_path) == wanted


@pytest.mark.parametrize("shards", [1, 40])
@pytest.mark.parametrize("part", [5, 1 << 21])
def test_neither_shards_nor_parts_change_the_lines(shards, part, tmp_path, monkeypatch):
    options = LineOptions(most=5)
    texts = corpus(random.Random(1))
    monkeypatch.setattr(lines, "PART", part)
    assert filtered(texts, options, tmp_path, shards) == expected(texts, options)


def test_the_first_of_each_line_stays(tmp_path):
    texts = ["menu\nfirst", "second\nmenu", "menu\nthird", "menu"]
    assert filtered(texts, LineOptions(most=2), tmp_path)[0] == ["menu\nfirst", "second\n", "third", None]
    assert filtered(texts, LineOptions(most=2, keep="none"), tmp_path)[0] == ["first", "second\n", "third", None]


def test_empty_corpora_and_texts_that_were_blank(tmp_path):
    assert filtered([], LineOptions(), tmp_path) == ([], 0)
    assert filtered(["", "\n\n"], LineOptions(most=1), tmp_path) == (["", "\n\n"], 0)
    assert line_hashes([], LineOptions()).shape == (3, 0)
    assert line_hashes([], LineOptions()).dtype == np.uint64


@pytest.mark.parametrize(
    ("options", "message"),
    [({"unit": "word"}, "unit: got 'word'"), ({"keep": "last"}, "keep: got 'last'"), ({"most": 0}, "most: got 0")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LineOptions(**options)
