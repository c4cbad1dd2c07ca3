"""The memory of `prepare` does not grow with the text, whatever the text: measured as a process's peak."""

import random
import subprocess
import sys

import pytest

from fastlm.data import Tokenizer, splitting
from fastlm.data.reading import Separator, documents, split_documents
from fastlm.data.scan import TRAINING_PIECE, UNBROKEN, for_training
from fastlm.data.splitting import Plan

MIB = 1 << 20
# Prepares a text of one size, then one of five times that size; the peak of the first is that of the second too,
# where memory is bounded. Both are longer than what is encoded at once.
CHILD = """
import importlib, resource, sys
from pathlib import Path
from fastlm.data import PrepareConfig, prepare
importlib.import_module("fastlm.data.prepare").BATCH_CHARS = 1 << 17
unit, size, folder, options = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), eval(sys.argv[4])
unit = unit.encode().decode("unicode_escape")
peaks = []
for times in (1, 5):
    with open(folder / "a.txt", "w", encoding="utf-8", newline="") as file:
        for _ in range(times):
            file.write(unit * (size // len(unit)))
        file.write("z")
    prepare(PrepareConfig(folder / "a.txt", folder / "out", val_fraction=0, overwrite=True, **options))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train_bpe(["the end of a line\n" * 9], 300).save(path)
    return str(path)


# Unit, size of the smaller text, options. Before it was bounded, the first three grew by 247, 129 and 80 MiB.
TEXTS = {
    "newlines": (r"\n", 500_000, {"document_separator": "blank-line"}),
    "blanks": (r"\n \t \r ", 1_000_000, {"document_separator": "blank-line"}),
    "one letter": (r"a\n", 60_000, {"document_separator": r"\n"}),
    "no blank": ("abcdefghij", 400_000, {}),
    "marks on one letter": (r"\u0301", 400_000, {"normalize": "nfc"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEXTS)
def test_peak_does_not_grow_with_the_text(kind, tokenizer, tmp_path):
    unit, size, options = TEXTS[kind]
    arguments = [unit, str(size), str(tmp_path), repr(options | {"tokenizer": tokenizer})]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1024 < 40


@pytest.mark.parametrize("in_memory", [100, 1 << 20])
def test_rows_on_disk_change_nothing(in_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "IN_MEMORY", in_memory)
    rng = random.Random(0)
    rows = [(rng.randrange(30).to_bytes(16, "little"), rng.randrange(9), rng.random() < 0.8) for _ in range(200)]
    plan = Plan(0.1, 0, folder=tmp_path)
    for row in [*rows[:100], *rows[:50]]:
        plan.add(*row)
    plan.truncate(100)
    for row in rows[100:]:
        plan.add(*row)
    assert [tuple(row) for row in plan.rows()] == rows
    assert (plan.documents, plan.chars, plan.kept) == (200, sum(r[1] for r in rows), sum(r[2] for r in rows))
    plan.close()
    assert not list(tmp_path.iterdir())


def test_a_long_blank_is_several_separators_whatever_the_chunks(monkeypatch):
    monkeypatch.setattr("fastlm.data.reading.LONGEST_BLANK", 8)
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(["\n", "\n", " ", "\t", "a", "\n\n\n"]) for _ in range(rng.randrange(80)))
        separator = Separator("blank-line")
        want = separator.pattern.split(text)
        for size in (1, 3, 7, 8, 9, 1000):
            chunks = [text[at : at + size] for at in range(0, len(text), size)]
            assert ["".join(texts) for texts in documents(split_documents(chunks, separator))] == want
        assert all(len(match[0]) <= 8 for match in separator.pattern.finditer(text))


def test_training_takes_some_of_unbroken_text_and_all_of_other():
    rng = random.Random(0)
    words = ["".join(rng.choice("abc") for _ in range(7)) for _ in range(9)]
    unbroken = ["x" * (4 * TRAINING_PIECE)] * (2 * UNBROKEN // (4 * TRAINING_PIECE))
    pieces = [piece for word, *rest in zip(words * 99, unbroken, strict=False) for piece in (word, *rest)]
    fed = list(for_training(pieces))
    assert [piece for piece in fed if len(piece) == 7] == [piece for piece in pieces if len(piece) == 7]
    assert 0.9 * UNBROKEN < sum(len(piece) for piece in fed if len(piece) > 7) <= UNBROKEN
