"""fastlm bench prepare: corpora whose truth is known, equal tokens, missing peers, memory under watch, the table."""

import dataclasses
import itertools
import json
import random
import sys

import numpy as np
import pytest
import tokenizers

from fastlm.benchmarks import deduplicate, prepare, prepare_peers, prepare_report, prepare_tokens
from fastlm.benchmarks.prepare_watch import CommandError, measured
from fastlm.benchmarks.results import Results, Row, environment, load
from fastlm.cli import bench, main
from fastlm.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text with blank lines and a table, of sentences of drawn words."""
    draw = random.Random(0)
    stop_words = ["the", "of", "and", "to"]
    drawn = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(3, 9))) for _ in range(3000)]
    words = [*stop_words * 150, "élan", *drawn]

    def sentence():
        return " ".join(draw.choices(words, k=draw.randint(9, 30))).capitalize() + "."

    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("\n \n\n".join(sentence() + "\n" + sentence() for _ in range(150)) + "\n")
    (folder / "b.tsv").write_text("".join(f"1\t{sentence()} {sentence()}\n" for _ in range(150)))
    return [folder / "a.txt", folder / "b.tsv"]


def test_the_text_is_the_documents_of_the_files_over_and_over(texts, tmp_path):
    size = 2 * sum(path.stat().st_size for path in texts)
    count = prepare_tokens.write_text(texts, tmp_path / "text.txt", size)
    documents = (tmp_path / "text.txt").read_text().split("\n\n")
    assert len(documents) == count
    assert size <= (tmp_path / "text.txt").stat().st_size < size + 1000
    assert documents[150:300] == texts[1].read_text().splitlines()
    assert documents[300:400] == documents[:100]
    assert all(document == document.strip() and "\n\n" not in document for document in documents)
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"blank\.txt: no text"):
        prepare_tokens.write_text([tmp_path / "blank.txt"], tmp_path / "none.txt", 10)


def test_both_write_the_tokens_of_each_document(texts, tmp_path):
    text, tokenizer = tmp_path / "text.txt", tmp_path / "tokenizer.json"
    count = prepare_tokens.write_text(texts, text, 30_000)
    prepare_tokens.make_tokenizer(text, tokenizer)
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    expected = [encoder.encode(d, add_special_tokens=False).ids for d in text.read_text().split("\n\n")]
    ours = prepare_tokens.encode(text, tokenizer, tmp_path, 2)
    assert (ours["tokens"], ours["documents"]) == (sum(map(len, expected)), count)
    assert prepare_peers.with_tokenizers(text, tokenizer, tmp_path, 2)() == (sum(map(len, expected)), count)
    assert np.fromfile(tmp_path / "tokens.bin", np.uint16).tolist() == list(itertools.chain(*expected))


ROWS = [
    Row("prepare", "tokens", "", "", "9 MB", name, name, rounds=3, median=time, p10=time, p90=time, bytes=9 * 10**6,
        peak_bytes=10**8, threads=2, work={"cpu_seconds": time, "tokens": 90, "documents": 9})
    for name, time in (("fastlm", 2.0), ("datasets", 4.0), ("tokenizers", 3.0))
]  # fmt: skip


def copies(**changes):
    return [dataclasses.replace(row, work=dict(row.work), **changes) for row in ROWS]


def test_other_tokens_get_no_time():
    rows = copies()
    prepare.check_tokens(rows, 9)
    assert rows == ROWS
    rows[0].work["tokens"] = 91
    rows[1].work["documents"] = 8
    prepare.check_tokens(rows, 9)
    assert [row.status for row in rows] == ["wrong", "wrong", "ok"]
    assert [row.median for row in rows] == [None, None, 3.0]
    assert [row.reason for row in rows] == ["91 tokens, not 90", "8 documents, not 9", ""]


def test_a_corpus_knows_its_copies(texts, tmp_path):
    truth = deduplicate.write_corpus(texts, tmp_path / "corpus", 400_000)
    lines = [json.loads(line) for line in (tmp_path / "corpus" / "00000.jsonl").read_text().splitlines()]
    written = {int(line["id"]): line["text"] for line in lines}
    assert list(written) == list(range(truth["documents"]))
    earlier = {text: number for number, text in reversed(written.items())}
    assert truth["equal"]
    unchanged = {copy for copy, original, _ in truth["near"] if written[copy] == written[original]}
    assert {n for n in written if earlier[written[n]] < n} == {*truth["equal"], *unchanged}
    for copy, original, similarity in truth["near"]:
        grams = [
            {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
            for words in (written[n].lower().replace(".", "").split() for n in (copy, original))
        ]
        assert similarity == pytest.approx(len(grams[0] & grams[1]) / len(grams[0] | grams[1]))


def test_the_score_of_what_stays(tmp_path):
    truth = {"documents": 8, "equal": [1], "near": [[3, 2, 0.9], [5, 4, 0.5], [7, 6, 0.85]]}
    (tmp_path / "0.jsonl").write_text("".join(json.dumps({"id": str(n)}) + "\n" for n in (1, 2, 4, 6, 7)))
    score = deduplicate.score(tmp_path, truth)
    assert score["near pairs"] == 2
    assert score["recall of near pairs"] == 0.5  # 3 went, 7 stays
    assert score["recall of equal ones"] == 0  # 1 stays
    assert score["dropped though below the threshold"] == 1  # 5
    assert score["others dropped"] == 1  # 0


def test_memory_and_time_are_those_of_all_processes():
    child = "a = bytearray(b'x') * (64 << 20); import time; time.sleep(0.4)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = measured([sys.executable, "-c", f"{code}; print('done')"])
    assert found.output == "done\n"
    assert 64 << 20 < found.peak_bytes < 128 << 20
    assert found.seconds > 0.4
    assert found.cpu_seconds > 0
    with pytest.raises(CommandError, match=r"^ValueError: no$"):
        measured([sys.executable, "-c", "raise ValueError('no')"])
    with pytest.raises(CommandError, match="it did not start: No such file or directory"):
        measured(["/no/such/program"])


def test_a_missing_peer_is_named_and_left_out(tmp_path):
    plan = prepare.Plan([], 1, [], 1, 1, pythons={"datasets": "/no/such/python"})
    absent = prepare._peer(plan, "datasets", [])
    assert absent.reason == "its interpreter: No such file or directory"
    nowhere = prepare._peer(plan, "datatrove", [])
    assert nowhere.reason.startswith("ModuleNotFoundError: No module named 'datatrove'")
    assert "--datatrove-python" in nowhere.reason
    here = prepare._peer(plan, "tokenizers", ["x"])
    assert (here.label, here.command) == (f"tokenizers {tokenizers.__version__}", [sys.executable, "x"])

    def note(line):
        pytest.fail(line)

    rows = prepare._in_turns(plan, "documents", [absent, nowhere], [], tmp_path / "work", lambda name, told: None, note)
    assert [(row.provider, row.status) for row in rows] == [("datasets", "unsupported"), ("datatrove", "unsupported")]
    assert prepare_report.cells(rows)[0][-1] == absent.reason


def test_a_peer_that_fails_leaves_the_others_a_clean_folder(tmp_path):
    work = tmp_path / "work"
    code = {
        "a": "import os, sys; os.mkdir(sys.argv[1]); raise ValueError(sys.argv[1] + ' is no good')",
        "b": "import os, sys; os.mkdir(sys.argv[1]); print('{\"seconds\": 2.5}')",
    }
    providers = [prepare._Provider(name, name, [sys.executable, "-c", line]) for name, line in code.items()]
    told = []
    plan = prepare.Plan([], 1, [], 2, 1)
    rows = prepare._in_turns(
        plan, "tokens", providers, [str(work)], work, lambda *found: told.append(found), lambda line: None
    )
    assert [(row.status, row.reason, row.median) for row in rows] == [
        ("failed", "ValueError: work is no good", None),
        ("ok", "", 2.5),
    ]
    assert told == [("b", {"seconds": 2.5})] * 2
    assert not work.exists()


def test_ratios_goals_and_the_table_of_a_guide(tmp_path):
    rows = copies()
    assert [prepare_report.ratio_to(rows, row) for row in rows] == [None, 2.0, 1.5]
    peaks = [
        Row("prepare", "memory", "", "", f"{n} MB", "fastlm", "fastlm", median=1.0, peak_bytes=peak, work=rows[0].work)
        for n, peak in ((1, 5 * 10**8), (9, 6 * 10**8))
    ]
    found = {"recall of near pairs": 0.9, "recall of equal ones": 1.0, "cpu_seconds": 1.0}
    near = [
        dataclasses.replace(row, variant="documents", provider=name, work=found)
        for row, name in zip(copies()[:2], ("fastlm", "datatrove"), strict=True)
    ]
    assert list(prepare_report.goals([*rows, *near, *peaks])) == [
        ("tokens: 2.00 times the speed of datasets, wanted 1.8", True),
        ("tokens: 1.50 times the speed of tokenizers, wanted 1.6", False),
        ("documents: 2.00 times the speed of datatrove, wanted 3.0", False),
        ("documents: recall 0.900, datatrove's 0.900, wanted no lower", True),
        ("memory: at most 600 MB, wanted 1000", True),
        ("memory: 1.20 times as much on the largest corpus, wanted 1.1", False),
    ]
    results = Results(environment("cpu"), rows=rows)
    guide = tmp_path / "guide.md"
    guide.write_text("a\n<!-- bench:prepare -->\nold\n<!-- /bench -->\nb\n")
    prepare_report.write(guide, results)
    text = guide.read_text()
    assert text.startswith("a\n<!-- bench:prepare -->\n| part |")
    assert text.endswith("\n<!-- /bench -->\nb\n")
    assert "old" not in text
    assert "| tokens | 9 MB | datasets | 4 s | 4 s - 4 s | 2.2 | 4 s | 100 MB | 2.00x | 90 tokens |" in text
    guide.write_text("nothing")
    with pytest.raises(DataError, match="bench:prepare"):
        prepare_report.write(guide, results)


def test_what_is_asked_for_is_checked_first(texts, tmp_path):
    given = ["prepare", "--text", *map(str, texts)]
    for flags, message in (
        (["--megabytes", "0"], "megabytes is 0, expected at least 1"),
        (["--memory-megabytes", "5", "0"], "memory_megabytes has 0"),
        (["--parts", "tokens,words"], "part is 'words', expected one of tokens, documents, memory"),
        (["--peers", "spark"], "peer is 'spark', expected one of datasets, tokenizers, datatrove"),
        (["--work", str(tmp_path / "none")], "expected a folder that is there"),
        (["--json", str(tmp_path / "none" / "r.json")], "is not there"),
        (["--tokenizer", str(tmp_path / "none.json")], "no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            bench.main([*given, *flags])


@pytest.mark.slow
def test_a_whole_run(texts, tmp_path, capfd):
    out = tmp_path / "results.json"
    command = ["bench", "prepare", "--text", *map(str, texts), "--megabytes", "1", "--memory-megabytes", "1"]
    assert main([*command, "--rounds", "2", "--peers", "tokenizers,datatrove", "--json", str(out)]) == 0
    rows = {(row.variant, row.provider): row for row in load(out).rows}
    assert {key: row.status for key, row in rows.items()} == {
        ("tokens", "fastlm"): "ok", ("tokens", "tokenizers"): "ok", ("documents", "fastlm"): "ok",
        ("documents", "datatrove"): "unsupported", ("memory", "fastlm"): "ok",
    }  # fmt: skip
    assert rows["tokens", "fastlm"].work["tokens"] == rows["tokens", "tokenizers"].work["tokens"] > 10**5
    assert rows["documents", "fastlm"].work["recall of near pairs"] > 0.9
    assert rows["documents", "fastlm"].work["recall of equal ones"] == 1
    assert 10**8 < rows["memory", "fastlm"].peak_bytes < 10**9
    assert "No module named 'datatrove'" in capfd.readouterr().out
