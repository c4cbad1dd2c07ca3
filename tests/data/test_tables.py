"""Tables of examples: the same rows from every format, what is held out, and how texts are framed."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from fastlm.data import Tokenizer
from fastlm.data.framing import Frame, cut_to, padded, special_token_ids
from fastlm.data.tables import digest_of, overlap, read_rows, split_rows
from fastlm.errors import ConfigError, DataError
from runs import table

ROWS = [
    {"text": f"text {i}, of\tno use" if i % 3 else f"line {i}", "other": f"o{i}", "label": str(i % 4)}
    for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_wordpiece(["the film was fine and the actress was splendid"] * 3, 80)


def test_every_format_has_the_same_rows(tmp_path):
    files = [table(tmp_path / "a.jsonl", ROWS)]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    files += [str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")]
    found = [[(r.text, r.pair, r.label) for r in read_rows([file], "text", "other", "label")] for file in files]
    assert found[0] == found[1] == found[2] == [(row["text"], row["other"], row["label"]) for row in ROWS]


def test_columns_without_names(tmp_path):
    (tmp_path / "a.tsv").write_text("0\tgood\n1\tbad\n")
    rows = read_rows([str(tmp_path / "a.tsv")], "2", "", "1", header=False)
    assert [(row.text, row.label) for row in rows] == [("good", "0"), ("bad", "1")]


def test_equal_texts_are_on_one_side_whatever_their_order(tmp_path):
    rows = read_rows([table(tmp_path / "a.jsonl", ROWS * 3)], "text", "other", "label")
    train, held_out = split_rows(rows, 0.3, 1)
    assert len(train) + len(held_out) == 120
    assert 10 < len(held_out) < 65
    assert overlap(train, held_out) == 0
    again = split_rows(rows[::-1], 0.3, 1)
    assert sorted(again[1]) == sorted(held_out)
    assert split_rows(rows, 0.3, 2)[1] != held_out
    assert overlap(rows, held_out) == len(held_out)
    assert digest_of(rows) != digest_of(rows[::-1])


def test_two_texts_are_not_their_concatenation(tmp_path):
    rows = read_rows([table(tmp_path / "a.jsonl", [{"t": "ab", "p": "c"}, {"t": "a", "p": "bc"}])], "t", "p")
    assert overlap(rows[:1], rows[1:]) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,label\n", "a.csv: has no row"),
        ("a.csv", "words,label\nx,1\n", "has no column 'text', but 'words', 'label'"),
        ("a.jsonl", '{"text": "x"}\nnonsense\n', "a.jsonl: row 2: "),
        ("a.txt", "text", "a.txt: is text, expected a table: CSV"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows([str(tmp_path / name)], "text", "", "label")


def test_a_pair_that_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="row 1: column 'p' holds None, expected text"):
        read_rows([table(tmp_path / "a.jsonl", [{"text": "x"}])], "text", "p")


@pytest.mark.parametrize("most", [6, 7, 8, 11, 30])
def test_framing_is_that_of_the_tokenizers_library(tokenizer, tmp_path, most):
    """Which cuts the longer of two texts first, as BERT's own code does."""
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.special_ids("masked")
    theirs.post_processor = tokenizers.processors.BertProcessing(("[SEP]", ids["end"]), ("[CLS]", ids["start"]))
    theirs.enable_truncation(most, strategy="longest_first")
    frame = Frame(tokenizer, most)
    texts = ["the film", "was splendid and fine the film was fine", "fine", "the actress was the film and the"]
    for text in texts:
        one = frame(np.array(tokenizer.encode(text)))
        assert one.tokens.tolist() == theirs.encode(text).ids
        for pair in texts:
            found = frame(np.array(tokenizer.encode(text)), np.array(tokenizer.encode(pair)))
            wanted = theirs.encode(text, pair)
            assert len(found.tokens) == len(wanted.ids)
            counts = [np.bincount(types, minlength=2).tolist() for types in (found.types, wanted.type_ids)]
            # Of an odd number of places either text may have one more.
            assert abs(counts[0][0] - counts[1][0]) <= 1
            if counts[0] == counts[1]:
                assert found.tokens.tolist() == wanted.ids


def test_robertas_pairs_have_two_separators(tokenizer):
    ids = tokenizer.special_ids("masked")
    found = Frame(tokenizer, 20, double=True)(np.array([20, 21]), np.array([22]))
    assert found.tokens.tolist() == [ids["start"], 20, 21, ids["end"], ids["end"], 22, ids["end"]]
    assert not found.types.any()


def test_where_a_text_is_cut():
    ids = np.arange(10)
    assert cut_to(ids, 4, "end").tolist() == [0, 1, 2, 3]
    assert cut_to(ids, 4, "start").tolist() == [6, 7, 8, 9]
    assert cut_to(ids, 5, "middle").tolist() == [0, 1, 2, 8, 9]
    assert cut_to(ids, 1, "middle").tolist() == [0]
    assert cut_to(ids, 10, "middle").tolist() == list(range(10))


def test_rows_are_filled_up():
    assert padded([np.array([1, 2, 3]), np.array([4])], 9).tolist() == [[1, 2, 3], [4, 9, 9]]


def test_special_tokens_are_found(tokenizer):
    assert set(tokenizer.special_ids("masked").values()) < set(special_token_ids(tokenizer).tolist())
    assert len(special_token_ids(tokenizer)) == 5


def test_no_room_for_a_text_is_said(tokenizer):
    with pytest.raises(ConfigError, match="context_length is 5, expected at least 6"):
        Frame(tokenizer, 5)
