"""Tokenizers that cannot give a text back: refused with the first character lost and its place, or counted."""

import subprocess
import sys
from collections import Counter

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from fastlm.cli import main
from fastlm.data import PrepareConfig, Tokenizer, load_tokens, prepare
from fastlm.errors import DataError

SEEN = "he o sat he o sat "
TEXT = "he o sat\nThe dog sat! ﬁne\n"


def byte_level(alphabet=(), normalizer=None, pre_tokenizer=None):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=list(alphabet), show_progress=False)
    backend.train_from_iterator([SEEN * 9], trainer)
    return backend


def words(unk_token):
    """Letters and blanks as words, of which the unknown token may not be one."""
    vocabulary = {token: index for index, token in enumerate(sorted(set(SEEN) | {"[UNK]"}))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unk_token))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def unigram(unknown):
    pieces = [(token, -1.0) for token in ["<unk>", "▁", *sorted(set(SEEN) - {" "})]]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, 0 if unknown else None))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def bert():
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([SEEN * 9], trainer)
    return backend


BYTES = pre_tokenizers.ByteLevel.alphabet()
NO_BLANKS = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(False)])

# What makes it, and the first character of TEXT that does not come back.
REFUSED = {
    "bytes missing": (lambda: byte_level(), "\n"),
    "one byte missing": (lambda: byte_level(set(BYTES) - {"!"}), "!"),
    "part of a character missing": (lambda: byte_level(set(BYTES) - {"ģ"}), "ﬁ"),  # the last of its three bytes
    "plain letters": (lambda: letters(), "\n"),
    "words without an unknown one": (lambda: words("?"), "\n"),
    "unigram without unknown": (lambda: unigram(False), "\n"),
    "lower case": (lambda: byte_level(BYTES, normalizers.Lowercase()), "T"),
    "nfkc": (lambda: byte_level(BYTES, normalizers.NFKC()), "ﬁ"),
    "blanks removed": (lambda: byte_level(BYTES, None, NO_BLANKS), " "),
}
ACCEPTED = {"words": lambda: words("[UNK]"), "unigram": lambda: unigram(True), "wordpiece": bert}
FAITHFUL = {
    "all bytes": lambda: byte_level(BYTES),
    "nfc": lambda: byte_level(BYTES, normalizers.NFC()),
    "digits apart": lambda: byte_level(
        BYTES, None, pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])
    ),
    "byte fallback": lambda: byte_fallback(),
}


def letters():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.Fuse()
    backend.train_from_iterator([SEEN * 9], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    return backend


def byte_fallback():
    vocabulary = {token: index for index, token in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def run(tmp_path, backend, text=TEXT, **options):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    backend.save(str(tmp_path / "tokenizer.json"))
    options = {"val_fraction": 0, "tokenizer": str(tmp_path / "tokenizer.json"), "overwrite": True} | options
    return prepare(PrepareConfig(tmp_path / "a.txt", tmp_path / "out", **options))


@pytest.mark.parametrize("kind", REFUSED)
def test_the_first_lost_character_is_named_with_its_place(kind, tmp_path):
    make, first = REFUSED[kind]
    where = rf"a\.txt: {first!r} \(U\+{ord(first):04X}\) at character {TEXT.index(first)} of the document"
    with pytest.raises(DataError, match=where.replace("\\n", "\\\\n")):
        run(tmp_path, make())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", REFUSED)
def test_the_flag_takes_it_and_counts(kind, tmp_path):
    make, first = REFUSED[kind]
    manifest = run(tmp_path, make(), allow_lossy=True)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    back = backend.decode(load_tokens(tmp_path / "out", "train").tolist())
    assert manifest.preparation["characters_lost"] == (Counter(TEXT) - Counter(back)).total() > 0
    assert manifest.preparation["unknown_tokens"] == 0
    assert f"character {TEXT.index(first)} of" in manifest.preparation["first_lost"]


@pytest.mark.parametrize("kind", ACCEPTED)
def test_unknown_tokens_are_counted(kind, tmp_path, capsys):
    manifest = run(tmp_path, ACCEPTED[kind]())
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = load_tokens(tmp_path / "out", "train").tolist()
    unknown = ids.count(backend.token_to_id("<unk>" if kind == "unigram" else "[UNK]"))
    assert manifest.preparation["unknown_tokens"] == unknown > 0
    assert manifest.preparation["characters_lost"] == (Counter(TEXT) - Counter(backend.decode(ids, False))).total()
    assert f"character {TEXT.index(chr(10))} of" in manifest.preparation["first_lost"]
    # BERT's rules lower the case and make a blank of the line's end, which is not unknown for that; "The" is.
    first = f"character {TEXT.index('The' if kind == 'wordpiece' else chr(10))} of"
    assert first in manifest.preparation["first_unknown"]
    files = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "cli"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main(["prepare", *files, "--val-fraction", "0"]) == 0
    out = capsys.readouterr().out
    assert f"{unknown} unknown tokens, " in out
    assert "; the first unknown is " in out
    assert first in out


@pytest.mark.parametrize("kind", FAITHFUL)
def test_a_tokenizer_that_gives_the_text_back_is_taken(kind, tmp_path):
    text = TEXT + "e\u0301 12 \u212b 北京 🙂\r\n\x00"
    manifest = run(tmp_path, FAITHFUL[kind](), text)
    lost = {name: manifest.preparation[name] for name in ("unknown_tokens", "characters_lost", "first_lost")}
    assert lost == {"unknown_tokens": 0, "characters_lost": 0, "first_lost": None}


def test_the_place_is_right_in_later_pieces_parts_and_documents(tmp_path):
    make, _ = REFUSED["one byte missing"]
    text = "sat he " * 30_000 + "!"  # several pieces
    with pytest.raises(DataError, match=r"at character 210000 of the document"):
        run(tmp_path, make(), text)
    with pytest.raises(DataError, match=r"at character 210000 of the document"):
        run(tmp_path, make(), text, val_fraction=0.1, split="spans")
    with pytest.raises(DataError, match=r"'!' \(U\+0021\) at character 4 of document 3 does"):
        run(tmp_path, make(), "one\n\ntwo\n\nsat !\n\nend", document_separator="blank-line")


@pytest.mark.parametrize("kind", ["bytes missing", "one byte missing", "plain letters", "unigram without unknown"])
def test_encode_names_what_the_vocabulary_lacks(kind):
    make, first = REFUSED[kind]
    tokenizer = Tokenizer(make().to_str())
    message = rf"U\+{ord(first):04X}\) at character {TEXT.index(first)} is not in the tokenizer's vocabulary"
    for special_tokens in (False, True) if kind != "unigram without unknown" else (False,):
        with pytest.raises(DataError, match=message):
            tokenizer.encode(TEXT, special_tokens)
    assert tokenizer.decode(tokenizer.encode("he o sat")) == "he o sat"


@pytest.mark.parametrize("kind", ["lower case", "nfkc"])
def test_encode_lets_a_normalizer_change_the_text(kind):
    backend = REFUSED[kind][0]()
    want = backend.normalizer.normalize_str(TEXT)
    tokenizer = Tokenizer(backend.to_str())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == want


def test_case_and_blanks_alone_are_called_so(tmp_path, capsys):
    backend = bert()
    manifest = run(tmp_path, backend, "He sat\n\nO HE")
    assert manifest.preparation["only_case_and_blanks"]
    assert manifest.preparation["first_unknown"] is None
    files = [str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "tokenizer.json"), "--val-fraction", "0"]
    assert main(["prepare", *files, "--out", str(tmp_path / "cli")]) == 0
    out = capsys.readouterr().out
    lost = manifest.preparation["characters_lost"]
    assert f"0 unknown tokens, {lost} characters that do not come back: only case and blanks differ" in out
    with pytest.raises(DataError, match=r"'H' .* from the tokenizer \(only case and blanks differ\); take another"):
        run(tmp_path, REFUSED["lower case"][0](), "He sat")
    assert not run(tmp_path, backend, "He sat!").preparation["only_case_and_blanks"]


def test_of_an_unknown_word_the_character_that_is_unknown_is_named(tmp_path):
    found = run(tmp_path, bert(), "He\nSAT heЖe sat").preparation["first_unknown"]
    assert "'Ж' (U+0416) at character 9 of the document" in found


def test_the_command_refuses_in_one_line_and_takes_the_flag(tmp_path):
    (tmp_path / "a.txt").write_text("The dog sat!", encoding="utf-8")
    byte_level().save(str(tmp_path / "tokenizer.json"))
    command = [sys.executable, "-m", "fastlm.cli", "prepare", "a.txt", "--tokenizer", "tokenizer.json", "--out", "out"]
    done = subprocess.run([*command, "--val-fraction", "0"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("fastlm prepare: a.txt: 'T' (U+0054) at character 0 of the document")
    assert done.stderr.count("\n") == 1
    flag = [*command, "--val-fraction", "0", "--allow-lossy"]
    done = subprocess.run(flag, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "0 unknown tokens, 4 characters that do not come back, first a.txt: 'T'" in done.stdout
