"""Reading, cutting and splitting text, and prepared folders, against the whole text held in memory."""

import hashlib
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tracemalloc
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from fastlm.data import END_OF_TEXT, Manifest, PrepareConfig, Tokenizer, load_manifest, load_tokens, prepare
from fastlm.data.pieces import WINDOW, PieceCutter, word_ends_before
from fastlm.data.reading import (
    Separator,
    documents,
    find_files,
    normalized,
    read_text,
    split_documents,
    unix_line_endings,
)
from fastlm.data.splitting import Plan, split_at
from fastlm.errors import ConfigError, DataError

FILES = ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]
WORDS = ["the", "of", "Grüße", "über", "naïve", "Ελληνικά", "русский", "北京欢迎你", "你好\uff0c"]
WORDS += ["e\u0301te", "1234", "3.14", "don't", "_x_", "**2", "🙂👩", "a\n\n", "\t", "\r\n", "if:\n   ", "y"]


def prose(seed, words):
    """Repeatable text of several scripts, with runs of blanks."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", "\n", "", "  "]) for _ in range(words))


def chunks(text, sizes):
    """`text` in pieces of the given sizes, repeated."""
    out, at, turn = [], 0, 0
    while at < len(text):
        out.append(text[at : at + sizes[turn % len(sizes)]])
        at += sizes[turn % len(sizes)]
        turn += 1
    return out


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def write_texts(folder, texts, encoding="utf-8"):
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode(encoding))
    return folder


def make(tmp_path, texts, out="out", **options):
    source = write_texts(tmp_path / "source", texts)
    options.setdefault("vocab_size", 300)
    return prepare(PrepareConfig(inputs=(source,), out=tmp_path / out, **options))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def segments(folder, split):
    """The texts of a split, each as decoded by the library itself between end-of-text tokens."""
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    manifest = json.loads((folder / "manifest.json").read_text())
    ids = np.fromfile(folder / f"{split}.bin", dtype="<u2" if manifest["dtype"] == "uint16" else "<u4")
    ends = np.flatnonzero(ids == manifest["eot_id"])
    assert len(ids) == 0 or ends[-1] == len(ids) - 1
    parts = np.split(ids, ends + 1)[:-1]
    return [theirs.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]


@settings(deadline=None)
@given(
    text=st.text(st.sampled_from("aé北🙂\r\n")),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-be", "gb18030"]),
    size=st.integers(1, 9),
)
def test_read_text_in_chunks_equals_decoding_the_whole(text, encoding, size, tmp_path_factory):
    path = tmp_path_factory.mktemp("read") / "a.txt"
    path.write_bytes(text.encode(encoding))
    seen = []
    assert "".join(read_text(path, encoding, "strict", size, seen.append)) == text
    assert b"".join(seen) == path.read_bytes()


BAD: dict[str, tuple[str, bytes]] = {
    "utf-8": ("é北🙂x", b"\xff"),
    "utf-8 overlong": ("é北🙂x", b"\xc0\x80"),
    "utf-8 cut": ("é北🙂x", b"\xf0\x9f\x99"),
    "utf-8-sig": ("é北🙂x", b"\xff"),
    "ascii": ("abcdef", b"\x80"),
    "gb18030": ("é北京x", b"\xff\xff"),
    "shift_jis": ("日本x", b"\xfd"),
    "utf-16": ("é北🙂x", b"\x00\xd8a\x00"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 4, 5, 7, 1 << 20])
@pytest.mark.parametrize("at_end", [False, True])
def test_undecodable_byte_is_named_exactly(case, chunk_bytes, at_end, tmp_path):
    encoding = case.split(" ")[0]
    good, bad = BAD[case]
    for repeat in range(5):  # so that the bad byte meets every place in a chunk, its borders included
        data = (good[-1] * repeat + good * 3).encode(encoding)
        path = tmp_path / "bad.txt"
        path.write_bytes(data + bad + b"" if at_end else data + bad + "xx".encode(encoding)[-2:])
        with pytest.raises(DataError) as caught:
            list(read_text(path, encoding, "strict", chunk_bytes))
        # every byte of `data` decodes and the next one does not
        assert f"{path}: byte {len(data)} ({bad[0]:#04x}) is not {encoding} text" in str(caught.value)


def test_replace_and_encoding_errors(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\xffcd\xe4\xbd")
    assert "".join(read_text(path, "utf-8", "replace", 1)) == "ab\ufffdcd\ufffd"
    for name in ("klingon", "hex", "rot13"):
        with pytest.raises(ConfigError, match=f"encoding='{name}' is not a text encoding"):
            PrepareConfig(inputs=(path,), out=tmp_path, encoding=name).check()


@given(text=st.text(st.sampled_from("a\r\n")), sizes=sizes)
def test_unix_line_endings(text, sizes):
    want = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(unix_line_endings(chunks(text, sizes))) == want


def test_find_files_is_sorted_recursive_and_takes_each_once(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a.txt", "c.md", "b/.x/z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x")
    found = find_files([tmp_path / "c.md", tmp_path, tmp_path / "b" / "1.txt"], ("*.txt",))
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["c.md", "a.txt", "b/.x/z.txt", "b/1.txt", "b/2.txt"]
    both = find_files([tmp_path], ("*.md", "a.*"))
    assert [path.name for path in both] == ["a.txt", "c.md"]
    with pytest.raises(DataError, match=r"nope: no such file or folder"):
        find_files([tmp_path / "nope"], ("*.txt",))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe: not a regular file"):
        find_files([tmp_path / "pipe"], ("*.txt",))
    with pytest.raises(DataError, match=r"no file in this folder matches \*.py or \*.c"):
        find_files([tmp_path], ("*.py", "*.c"))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("<|endoftext|>", re.escape(END_OF_TEXT)), ("\n\n", "\n\n"), ("blank-line", r"\n(?:[ \t\r]*\n)+")],
)
@given(
    parts=st.lists(st.sampled_from(["a", " b", "\n", "\n\n", " ", "\r", "<|", END_OF_TEXT, "|>", "x\n "])),
    sizes=sizes,
)
def test_documents_split_at_a_separator_whatever_the_chunks(name, pattern, parts, sizes):
    text = "".join(parts)
    got = ["".join(texts) for texts in documents(split_documents(chunks(text, sizes), Separator(name)))]
    assert got == re.split(pattern, text)


def test_documents_skips_what_is_not_read():
    events = iter(["a", "b", None, "c", None, None, "d", None])
    assert [next(texts, "") for texts in documents(events)] == ["a", "c", "", "d"]


def word_level():
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([prose(1, 3000)], trainer)
    return Tokenizer(backend.to_str())


def gpt4_style():
    """Digits in threes, letters join a mark before them, marks join line ends after them."""
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([prose(1, 3000)], trainer)
    return Tokenizer(backend.to_str())


def metaspace():
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator([prose(1, 3000)], trainer)
    return Tokenizer(backend.to_str())


KINDS = {
    "bpe": lambda: Tokenizer.train_bpe([prose(1, 3000)], 600),
    "characters": lambda: Tokenizer.characters([prose(1, 3000)]),
    "gpt4": gpt4_style,
    "wordpiece": word_level,
    "metaspace": metaspace,
}


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_pieces_equals_encoding_the_whole(kind):
    tokenizer = KINDS[kind]()
    for seed in range(10):
        text = prose(100 + seed, 700)
        cutter = PieceCutter(lambda piece: tokenizer.encode(piece), size=50)
        pieces = list(cutter(chunks(text, [1 + 37 * seed, 300])))
        assert "".join(pieces) == text
        assert len(pieces) > len(text) / 250
        assert [token for piece in pieces for token in tokenizer.encode(piece)] == tokenizer.encode(text)
        assert cutter.forced == 0


@given(text=st.text(st.sampled_from("ab_ .é9"), max_size=900), low=st.integers(1, 300), high=st.integers(0, 900))
def test_ends_of_words_are_found_from_behind(text, low, high):
    high = min(high, len(text))
    forwards = [match.end() for match in re.finditer(r"(?<=[^\W_])(?=\W)", text[:high]) if match.end() >= low]
    assert list(word_ends_before(text, low, high)) == forwards[::-1]


def test_text_without_a_word_end_is_cut_and_counted():
    cutter = PieceCutter(lambda piece: Tokenizer.train_bpe([], 257).encode(piece), size=100)
    text = "a" * 5000
    pieces = list(cutter(chunks(text, [333])))
    assert "".join(pieces) == text
    assert cutter.forced == len(pieces) - 1 > 5
    assert max(map(len, pieces)) <= 4 * 100 + WINDOW


@settings(deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["e\u0301", "\u0316", "\u0301", "ﬁ", "가", "ᄀ", "ᅡ", "ᆨ", "か\uff9e", " ", "x, "]),
        max_size=300,
    ),
    form=st.sampled_from(["NFC", "NFKC"]),
)
def test_normalisation_in_pieces_equals_the_whole(words, form):
    text = "".join(words) * 3
    cutter = PieceCutter(lambda piece: unicodedata.normalize(form, piece), size=20)
    assert "".join(map(cutter.transform, cutter(chunks(text, [17])))) == unicodedata.normalize(form, text)
    assert "".join(normalized(chunks(text, [17]), form)) == unicodedata.normalize(form, text)


@given(
    text=st.text(st.sampled_from("ab\n"), max_size=300),
    sizes=sizes,
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    slack=st.integers(0, 30),
)
def test_carve_cuts_at_line_ends_whatever_the_chunks(text, sizes, ends, slack):
    first, second = sorted(int(end * len(text)) for end in ends)
    slack = min(slack, second - first)
    want = []
    for cut in (first, second):
        line = text.find("\n", cut, cut + slack)
        want.append(line + 1 if line >= 0 else cut)
    got = ["".join(texts) for texts in documents(split_at(chunks(text, sizes), [first, second], slack))]
    assert got == [text[: want[0]], text[want[0] : want[1]], text[want[1] :]]


def test_documents_are_split_by_their_text_alone(tmp_path):
    texts = [f"document {number}\n" for number in range(400)]
    texts.append(texts[7])
    make(tmp_path, texts, val_fraction=0.2)
    val, train = segments(tmp_path / "out", "val"), segments(tmp_path / "out", "train")
    assert load_manifest(tmp_path / "out").preparation["split"] == "documents"
    assert sorted(val + train) == sorted(texts)
    assert not set(val) & set(train)  # the two equal documents are on one side
    assert 0.1 < len(val) / len(texts) < 0.3
    for path in (tmp_path / "source").iterdir():
        path.unlink()
    make(tmp_path, texts[::-1], out="reversed", val_fraction=0.2)
    assert sorted(segments(tmp_path / "reversed", "val")) == sorted(val)
    make(tmp_path, texts[::-1], out="seeded", val_fraction=0.2, seed=1)
    assert set(segments(tmp_path / "seeded", "val")) != set(val)


@pytest.mark.parametrize("val_fraction", [0.05, 0.3])
def test_few_documents_give_a_span_each(tmp_path, val_fraction):
    texts = [prose(seed, 2000) for seed in range(3)]
    make(tmp_path, texts, val_fraction=val_fraction)
    val, train = segments(tmp_path / "out", "val"), segments(tmp_path / "out", "train")
    assert load_manifest(tmp_path / "out").preparation["split"] == "spans"
    assert len(val) == 3
    for text, span in zip(texts, val, strict=True):
        assert len(span) / len(text) == pytest.approx(val_fraction, rel=0.15)
        before = next((part for part in train if text.startswith(part + span)), "")
        after = next((part for part in train if text.endswith(span + part)), "")
        assert before + span + after == text
    make(tmp_path, texts, out="seeded", val_fraction=val_fraction, seed=1)
    assert segments(tmp_path / "seeded", "val") != val


def test_plan_draws_uniformly():
    plan = Plan(0.1, seed=3)
    for number in range(4000):
        plan.add(hashlib.sha256(str(number).encode()).digest()[:16], 1, True)
    places = [plan.place(row) for row in plan.rows()]
    plan.close()
    # a uniform draw's mean and share below 0.1 lie within five standard errors
    assert np.mean(places) == pytest.approx(0.5, abs=5 * (1 / 12 / 4000) ** 0.5)
    assert np.mean(np.asarray(places) < 0.1) == pytest.approx(0.1, abs=5 * (0.09 / 4000) ** 0.5)


@pytest.mark.parametrize("tokenizer", ["bpe", "characters"])
@pytest.mark.parametrize("count", [3, 250])
def test_manifest_agrees_with_the_files(tmp_path, tokenizer, count):
    texts = [prose(seed, 900 // count + 20) for seed in range(count)]
    returned = make(tmp_path, texts, tokenizer=tokenizer, val_fraction=0.1)
    out = tmp_path / "out"
    manifest = load_manifest(out, verify=True)
    assert manifest == returned == Manifest.from_json(returned.to_json())
    assert sorted(contents(out)) == FILES
    parts = {split: segments(out, split) for split in ("train", "val")}
    for split, entry in manifest.splits.items():
        assert entry["bytes"] == sum(len(text.encode()) for text in parts[split]) > 0
        assert entry["chars"] == sum(map(len, parts[split]))
        assert entry["documents"] == len(parts[split])
        assert entry["sha256"] == hashlib.sha256((out / f"{split}.bin").read_bytes()).hexdigest()
        tokens = load_tokens(out, split)
        assert entry["tokens"] == len(tokens)
        assert tokens.dtype == np.dtype("<u2")
        assert tokens.max() < manifest.vocab_size
        with pytest.raises(ValueError, match="read-only"):
            tokens[0] = 1
    assert sum(entry["bytes"] for entry in manifest.splits.values()) == sum(len(text.encode()) for text in texts)
    fingerprint = hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest.tokenizer_fingerprint == fingerprint == Tokenizer.load(out).fingerprint
    assert manifest.vocab_size == Tokenizer.load(out).vocab_size
    for source, text in zip(manifest.sources, texts, strict=True):
        assert source["sha256"] == hashlib.sha256(text.encode()).hexdigest()
        assert source["bytes"] == len(text.encode())


def test_a_long_document_is_encoded_as_one(tmp_path):
    text = prose(5, 70_000)
    assert len(text) > 4 * (1 << 16)  # several pieces
    make(tmp_path, [text], val_fraction=0, chunk_bytes=10_007, vocab_size=500)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    want = [*theirs.encode(text).ids, theirs.token_to_id(END_OF_TEXT)]
    assert load_tokens(tmp_path / "out", "train").tolist() == want
    assert load_manifest(tmp_path / "out").preparation["forced_cuts"] == 0


def test_the_tokenizer_of_a_long_document_is_that_of_the_whole(tmp_path):
    text = prose(6, 50_000)
    make(tmp_path, [text], val_fraction=0, chunk_bytes=9_001, vocab_size=400)
    assert load_manifest(tmp_path / "out").tokenizer_fingerprint == Tokenizer.train_bpe([text], 400).fingerprint


def test_equal_input_gives_equal_bytes_whatever_the_chunks(tmp_path):
    texts = [prose(seed, 3000) for seed in range(4)]
    options = {
        "val_fraction": 0.1,
        "normalize": "nfkc",
        "line_endings": "lf",
        "document_separator": "blank-line",
    }
    make(tmp_path, texts, out="first", **options)
    make(tmp_path, texts, out="second", **options)
    make(tmp_path, texts, out="third", chunk_bytes=7, **options)
    assert contents(tmp_path / "first") == contents(tmp_path / "second") == contents(tmp_path / "third")


def test_letters_without_end_are_reported(tmp_path):
    text = "ab" * 150_000
    manifest = make(tmp_path, [text], val_fraction=0)
    assert manifest.preparation["forced_cuts"] >= 1
    assert segments(tmp_path / "out", "train") == [text]


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastlm.data.prepare"), "BATCH_CHARS", 1 << 17)

    def peak(words):
        path = tmp_path / f"{words}.txt"
        path.write_text("some words of a line\n" * words)
        config = PrepareConfig((path,), tmp_path / str(words), tokenizer="characters", chunk_bytes=1 << 14)
        tracemalloc.start()
        prepare(config)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small, large = peak(30_000), peak(150_000)  # 0.6 and 3.1 MB, 5 batches and 24
    assert large < 1.2 * small


def test_cleaning_options(tmp_path):
    texts = ["e\u0301 one\r\n", "two\n", "\u00e9 one\n", "  \n", "", "two\n"]
    manifest = make(
        tmp_path,
        texts,
        val_fraction=0,
        normalize="nfc",
        line_endings="lf",
        deduplicate="exact",
        tokenizer="characters",
    )
    assert segments(tmp_path / "out", "train") == ["\u00e9 one\n", "two\n"]
    assert manifest.preparation["duplicates_dropped"] == 2
    assert manifest.preparation["documents"]["empty"] == 2
    assert manifest.splits["train"]["bytes"] == len("\u00e9 one\ntwo\n".encode())
    make(tmp_path, texts, out="plain", val_fraction=0, tokenizer="characters")
    assert segments(tmp_path / "plain", "train") == [text for text in texts if text.strip()]


def test_separator_of_documents(tmp_path):
    text = f"one\ntwo{END_OF_TEXT}three{END_OF_TEXT}\n{END_OF_TEXT}four\\n"
    make(tmp_path, [text], val_fraction=0, document_separator=END_OF_TEXT)
    assert segments(tmp_path / "out", "train") == ["one\ntwo", "three", "four\\n"]
    make(tmp_path, [text], out="lines", val_fraction=0, document_separator=r"\n")
    assert segments(tmp_path / "lines", "train")[0] == "one"


def test_text_that_spells_the_end_of_text_is_not_one(tmp_path):
    text = f"one {END_OF_TEXT} two"
    make(tmp_path, [text], val_fraction=0)
    assert np.count_nonzero(load_tokens(tmp_path / "out", "train") == load_manifest(tmp_path / "out").eot_id) == 1
    assert segments(tmp_path / "out", "train") == [text]


def test_undecodable_files_are_named_replaced_or_skipped(tmp_path):
    source = write_texts(tmp_path / "source", ["one", "", "two\n\nthree\n"])
    (source / "001.txt").write_bytes(b"one\n\ntwo\n\nfour \xff\n")
    config = {"inputs": (source,), "val_fraction": 0, "tokenizer": "characters", "chunk_bytes": 2}
    with pytest.raises(DataError, match=r"001.txt: byte 15 \(0xff\) is not utf-8 text"):
        prepare(PrepareConfig(out=tmp_path / "strict", **config))
    assert not (tmp_path / "strict").exists()
    prepare(PrepareConfig(out=tmp_path / "replace", errors="replace", **config))
    want = ["one", "one\n\ntwo\n\nfour \ufffd\n", "two\n\nthree\n"]
    assert segments(tmp_path / "replace", "train") == want
    # what the skipped file held before its bad byte is forgotten
    config |= {"document_separator": "blank-line"}
    manifest = prepare(PrepareConfig(out=tmp_path / "skip", errors="skip-file", **config))
    assert segments(tmp_path / "skip", "train") == ["one", "two", "three\n"]
    assert manifest.preparation["files_skipped"] == [str(source / "001.txt")]
    assert [source["path"][-7:] for source in manifest.sources] == ["000.txt", "002.txt"]


def test_latin1_counts_the_text_not_the_file(tmp_path):
    source = write_texts(tmp_path / "source", ["Grüße\n" * 50], "latin-1")
    manifest = prepare(PrepareConfig((source,), tmp_path / "out", encoding="latin-1", tokenizer="characters"))
    assert sum(entry["chars"] for entry in manifest.splits.values()) == 300
    assert sum(entry["bytes"] for entry in manifest.splits.values()) == 400
    assert manifest.sources[0]["bytes"] == 300


@pytest.mark.parametrize("where", ["out", "out/tokenizer.json"])
def test_the_tokenizer_of_a_prepared_folder_ends_documents_as_that_folder_does(where, tmp_path):
    texts = ["one two\n" * 30, "two three\n" * 30]
    first = make(tmp_path, texts, special="masked", tokenizer="wordpiece", vocab_size=100, val_fraction=0)
    again = make(tmp_path, texts, out="again", tokenizer=str(tmp_path / where), val_fraction=0)
    vocabulary = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert first.eot_id == again.eot_id == vocabulary["[SEP]"]
    assert np.count_nonzero(load_tokens(tmp_path / "again", "train") == again.eot_id) == 2
    assert again.hashes() == first.hashes()
    (tmp_path / "out" / "manifest.json").write_text("{")  # of whatever else: then the names decide
    assert Tokenizer.load(tmp_path / where).eot_id is None


def test_existing_tokenizer_and_unknown_characters(tmp_path):
    first = make(tmp_path, ["abc abc\n" * 30], tokenizer="characters")
    again = make(tmp_path, ["cab cab\n" * 30], out="again", tokenizer=str(tmp_path / "out"))
    assert again.tokenizer_fingerprint == first.tokenizer_fingerprint
    (tmp_path / "source" / "001.txt").write_text("abc " * 40_000 + "x")
    with pytest.raises(DataError, match=r"001.txt: 'x' \(U\+0078\) at character 160000 of the document"):
        prepare(PrepareConfig(tmp_path / "source", tmp_path / "new", tokenizer=str(tmp_path / "out"), val_fraction=0))
    assert not (tmp_path / "new").exists()


def test_a_vocabulary_above_65536_takes_four_bytes(tmp_path):
    vocabulary = {chr(code): code - 0x4000 for code in range(0x4000, 0x4000 + 70_000) if not 0xD800 <= code < 0xE000}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "".join(list(vocabulary)[-200:])
    manifest = make(tmp_path, [text], tokenizer=str(tmp_path / "tokenizer.json"), val_fraction=0)
    assert (manifest.dtype, manifest.vocab_size, manifest.eot_id) == ("uint32", 70_000, None)
    tokens = load_tokens(tmp_path / "out", "train")
    assert tokens.dtype == np.dtype("<u4")
    assert tokens.tolist() == list(range(69_800, 70_000))


def test_progress_covers_every_pass(tmp_path):
    source = write_texts(tmp_path / "source", [prose(seed, 500) for seed in range(3)])
    total = sum(path.stat().st_size for path in source.iterdir())
    calls = {"scan": [], "tokenizer": [], "tokens": []}
    config = PrepareConfig((source,), tmp_path / "out", vocab_size=300, chunk_bytes=1000)
    prepare(config, lambda stage, done, whole: calls[stage].append((done, whole)))
    for stage in calls.values():
        assert stage == sorted(stage)
        assert stage[-1] == (total, total)
        assert len(stage) >= total // 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction=1.0, expected at least 0"),
        ({"vocab_size": 100}, "vocab_size=100, expected at least 257"),
        ({"normalize": "nfd"}, "normalize='nfd', expected one of none, nfc, nfkc"),
        ({"split": "half"}, "split='half', expected one of"),
        ({"chunk_bytes": 0}, "chunk_bytes=0, expected at least 1"),
        ({"seed": 2**64}, "seed=an integer of 65 bits, expected an integer of 64 bits"),
        ({"document_separator": ""}, "document_separator is empty"),
        ({"inputs": ()}, "inputs is empty"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(**{"inputs": (tmp_path,), "out": tmp_path} | options).check()


def test_a_vocabulary_larger_than_the_text_allows_is_as_large_as_that(tmp_path):
    """The library makes room for as many tokens as it is told: 40 GB for these, before it looks at the text."""
    texts = ["the cat sat on the mat. " * 40]
    made = [make(tmp_path, texts, out=str(size), vocab_size=size) for size in (5000, 10**9, 10**30)]
    assert len({manifest.tokenizer_fingerprint for manifest in made}) == 1


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["", " \n"], {}, "no text in 2 files"),
        (
            ["one"],
            {},
            r"no text for the val split: 1 documents of 3 characters at val_fraction=0.05, split=spans",
        ),
        (["one", "one"], {"split": "documents", "val_fraction": 0.999}, "no text for the train split"),
    ],
)
def test_too_little_text(tmp_path, texts, options, message):
    with pytest.raises(DataError, match=message):
        make(tmp_path, texts, tokenizer="characters", **options)
    assert not (tmp_path / "out").exists()


def test_no_overwriting_unasked(tmp_path):
    make(tmp_path, [prose(1, 300)])
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"out: already holds train.bin, val.bin, tokenizer.json, manifest.json"):
        make(tmp_path, [prose(2, 300)])
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "notes").write_text("mine")
    make(tmp_path, [prose(2, 300)], overwrite=True)
    assert sorted(contents(tmp_path / "out")) == sorted([*FILES, "notes"])
    load_manifest(tmp_path / "out", verify=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: is a file, expected a folder"):
        make(tmp_path, [prose(2, 300)], out="file", overwrite=True)


class Stop(Exception):
    """Stands for anything that ends a run half-way."""


@pytest.mark.parametrize("stage", ["scan", "tokenizer", "tokens"])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_a_failure_half_way_leaves_the_earlier_folder(tmp_path, stage, error):
    make(tmp_path, [prose(1, 2000)])
    before = contents(tmp_path / "out")
    write_texts(tmp_path / "source", [prose(2, 2000)] * 3)

    def stop_there(now, done, total):
        if now == stage and done > total // 2:
            raise error

    for out in ("out", "new"):
        config = PrepareConfig(tmp_path / "source", tmp_path / out, vocab_size=300, chunk_bytes=1000, overwrite=True)
        with pytest.raises(error):
            prepare(config, stop_there)
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "new").exists()


def test_a_file_that_changes_between_passes_is_refused(tmp_path):
    source = write_texts(tmp_path / "source", [prose(1, 2000), prose(2, 2000)])

    def change(stage, done, total):
        if stage == "scan" and done == total:
            (source / "000.txt").write_text(prose(3, 2500) + "\n\n" + prose(4, 100))

    config = PrepareConfig(source, tmp_path / "out", vocab_size=300, document_separator="blank-line")
    with pytest.raises(DataError, match=r"000.txt: the file changed while it was being prepared"):
        prepare(config, change)
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import resource, sys
from fastlm.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_takes_no_more_leaves_the_earlier_folder(tmp_path):
    make(tmp_path, [prose(1, 500)])
    before = contents(tmp_path / "out")
    write_texts(tmp_path / "source", [prose(2, 30_000)])
    arguments = ["prepare", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--overwrite"]
    command = [sys.executable, "-c", FULL_DISK, *arguments, "--tokenizer", "characters"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"fastlm prepare: \[Errno 27\] File too large: '.*train\.bin'\n", done.stderr)
    assert contents(tmp_path / "out") == before


def prepared(tmp_path):
    make(tmp_path, [prose(1, 1000)])
    return tmp_path / "out"


def test_load_manifest_refuses_token_files_of_another_length(tmp_path):
    out = prepared(tmp_path)
    data = (out / "train.bin").read_bytes()
    (out / "train.bin").write_bytes(data[:-3])
    with pytest.raises(DataError, match=rf"train.bin: {len(data) - 3} bytes, expected {len(data)} .* cut short"):
        load_manifest(out)
    with pytest.raises(DataError, match="cut short"):
        load_tokens(out, "val")
    (out / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train.bin: missing"):
        load_manifest(out)
    (out / "train.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    load_manifest(out)
    with pytest.raises(DataError, match=r"train.bin: its sha256 is not"):
        load_manifest(out, verify=True)


def test_load_manifest_refuses_another_tokenizer(tmp_path):
    out = prepared(tmp_path)
    Tokenizer.train_bpe(["other"], 280).save(out / "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer.json: its fingerprint is \w{16}, but the tokens were made with"):
        load_manifest(out)
    (out / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer.json: missing"):
        load_manifest(out)


def test_load_manifest_refuses_what_is_not_one(tmp_path):
    out = prepared(tmp_path)
    values = json.loads((out / "manifest.json").read_text())
    damaged = {
        "not a manifest": "{]",
        "not a manifest .*list": "[]",
        "format_version is 9, expected 1": json.dumps(values | {"format_version": 9}),
        "format_version is None": "{}",
        "the entry 'dtype' is missing": json.dumps({k: v for k, v in values.items() if k != "dtype"}),
        "the entry 'val' is missing": json.dumps(values | {"splits": {"train": values["splits"]["train"]}}),
        "dtype is 'int8', expected one of uint16, uint32": json.dumps(values | {"dtype": "int8"}),
        "train has 'many' tokens": json.dumps(values | {"splits": values["splits"] | {"train": {"tokens": "many"}}}),
    }
    for message, text in damaged.items():
        (out / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=rf"manifest.json: {message}"):
            load_manifest(out)
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"out: not a prepared folder \(manifest.json is missing\)"):
        load_manifest(out)
    with pytest.raises(DataError, match=r"nowhere: not a prepared folder"):
        load_tokens(tmp_path / "nowhere", "train")


def test_load_tokens_names_the_split(tmp_path):
    make(tmp_path, [prose(1, 1000)], val_fraction=0)
    with pytest.raises(DataError, match=r"split='test', expected one of train, val"):
        load_tokens(tmp_path / "out", "test")
    with pytest.raises(DataError, match=r"val.bin: the split is empty"):
        load_tokens(tmp_path / "out", "val")


_KILLED_WHILE_MOVING = """
import os, signal, sys
from pathlib import Path
from fastlm.data import PrepareConfig, prepare

moved, replace = [], os.replace

def until(source, target):
    if Path(target).parent == Path(sys.argv[2]):  # into its place
        if len(moved) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        moved.append(target)
    replace(source, target)

os.replace = until
prepare(PrepareConfig(inputs=(Path(sys.argv[1]),), out=Path(sys.argv[2]), vocab_size=300))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@pytest.mark.parametrize("moves", range(4))
def test_killed_while_its_files_move_the_same_call_goes_on(tmp_path, moves):
    expected = make(tmp_path, [prose(2, 300)], out="whole")
    command = [sys.executable, "-c", _KILLED_WHILE_MOVING, tmp_path / "source", tmp_path / "out", str(moves)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    there = [name for name in ("train.bin", "val.bin", "tokenizer.json") if (tmp_path / "out" / name).exists()]
    assert len(there) == moves
    assert make(tmp_path, [prose(2, 300)]).splits == expected.splits
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "whole").keys()


def test_a_folder_without_a_manifest_that_no_run_left_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"already holds train\.bin"):
        make(tmp_path, [prose(2, 300)])
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"mine"


@pytest.mark.parametrize("recipe", ["", "books"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_prepared_by_one_at_a_time(recipe, overwrite, tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five\n" * 50)
    options = {"tokenizer": "characters", "overwrite": overwrite, "workers": 1}
    config = PrepareConfig(tmp_path / "a.txt", tmp_path / "out", **options)
    refused = []

    def another(*_):
        if not refused:
            with pytest.raises(DataError, match=rf"^{tmp_path / 'out'}: another process prepares documents there$"):
                prepare(PrepareConfig(tmp_path / "a.txt", tmp_path / "out", recipe=recipe, seed=1, **options))
            refused.append(True)

    manifest = prepare(config, another)
    assert refused
    assert load_manifest(tmp_path / "out", verify=True).to_json() == manifest.to_json()
    assert manifest.preparation["seed"] == 0


def test_one_that_finished_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one two three four five\n" * 50)
    config = PrepareConfig(tmp_path / "a.txt", tmp_path / "out", tokenizer="characters")
    prepare_module = importlib.import_module("fastlm.data.prepare")
    find = prepare_module.find

    def meanwhile(*arguments):
        monkeypatch.setattr(prepare_module, "find", find)
        prepare(config)
        return find(*arguments)

    monkeypatch.setattr(prepare_module, "find", meanwhile)
    with pytest.raises(DataError, match=r"already holds train\.bin"):
        prepare(config)
