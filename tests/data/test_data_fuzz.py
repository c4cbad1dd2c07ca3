"""Damaged files of the data side, with a fixed seed: each is loaded, or refused in one line that names it."""

import contextlib
import copy
import json
import os
import random
import tempfile

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from fastlm.cli import main
from fastlm.data import PrepareConfig, Tokenizer, load_manifest, load_tokens, prepare
from fastlm.data.reading import check_encoding, read_text
from fastlm.errors import ConfigError, DataError
from fuzz import INPUTS

NASTY = [
    None, True, False, 0, 1, -1, 3, 65536, 2**31, 2**32, 2**64, 10**30, 0.5, -0.0, float("nan"), float("inf"), "", "x",
    "uint16", "\ud800", "x" * 300, [], [0], ["uint16"], [[]], {}, {"a": 1}, {"type": "BPE"}, [None, {"tokens": 1}],
]  # fmt: skip


def mutate_bytes(data, rng):
    """Bits flipped, blocks cut out, doubled, exchanged or overwritten, the end cut off."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 2, 9, 70])
        change = rng.randrange(6)
        if change == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            del data[at : at + size]
        elif change == 2:
            data[at:at] = data[at : at + size]
        elif change == 3:
            data[at : at + size] = rng.randbytes(size)
        elif change == 4:
            other = rng.randrange(len(data) + 1)
            data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def places(value):
    """Every (container, key) of a JSON value."""
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(child, (dict, list)):
            yield from places(child)


def mutate_json(data, rng):
    """Values exchanged for others of another type or size, entries taken out, or all of it nested deeply."""
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        where = list(places(value))
        if not where:
            break
        # The outer entries as often as the many inner ones.
        container, key = rng.choice(where[:40] if rng.random() < 0.5 else where)
        if rng.random() < 0.15:
            del container[key]
        elif rng.random() < 0.3:
            other, name = rng.choice(where)
            with contextlib.suppress(KeyError, IndexError):
                container[key] = json.loads(json.dumps(other[name]))
        else:
            container[key] = copy.deepcopy(rng.choice(NASTY))
    text = json.dumps(value)
    if rng.random() < 0.02:
        text = rng.choice(["[", '{"a":']) * 100_000 + text
    if rng.random() < 0.02:
        text = text.replace("1", "1" * 5000, 1)
    return text.encode()


def mutations(data, rng):
    """Half by the byte and half by the value where the file is JSON."""
    for number in range(INPUTS):
        yield mutate_json(data, rng) if number % 2 and data[:1] == b"{" else mutate_bytes(data, rng)


@contextlib.contextmanager
def silence():
    """Nothing may be written to the error stream, by whatever library."""
    with tempfile.TemporaryFile() as kept:
        before = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
        kept.seek(0)
        assert kept.read() == b""


def refused_in_a_line(path, load):
    """Whether `load` refused; its error must be a single line that names the file."""
    try:
        load()
    except DataError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message
        assert len(message) < 1500
        return True
    return False


def test_manifest(tmp_path):
    (tmp_path / "a.txt").write_text("some words of a line\n" * 100)
    out = tmp_path / "out"
    prepare(PrepareConfig(tmp_path / "a.txt", out, tokenizer="characters"))
    path, rng = out / "manifest.json", random.Random(0)
    refused = 0
    for data in mutations(path.read_bytes(), rng):
        path.write_bytes(data)

        def load():
            manifest = load_manifest(out)
            for split in manifest.splits.values() if len(manifest.splits) == 2 else ():
                assert split["tokens"] / split["bytes"] + split["tokens"] / split["chars"] > 0
            assert load_tokens(out, "train").dtype == manifest.dtype

        refused += refused_in_a_line(out, load)
    assert 0.3 * INPUTS < refused < INPUTS


def bert():
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "[CLS]": 3}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer()])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 3)])
    backend.add_special_tokens(["[CLS]"])
    return backend.to_str(pretty=True)


def unigram():
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("▁ab", -3.0)], 0))
    backend.normalizer = normalizers.Sequence([normalizers.Replace(tokenizers.Regex(" {2,}"), " "), normalizers.NFC()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend.to_str(pretty=True)


DEFINITIONS = {
    "bpe": lambda: Tokenizer.train_bpe(["the the cat sat"], 270)._definition.decode(),
    "characters": lambda: Tokenizer.characters(["ab c\n"])._definition.decode(),
    "wordpiece": bert,
    "unigram": unigram,
}


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_tokenizer(kind, tmp_path):
    path, rng = tmp_path / "tokenizer.json", random.Random(kind)
    refused = 0
    for data in mutations(DEFINITIONS[kind]().encode(), rng):
        path.write_bytes(data)
        with silence():
            refused += refused_in_a_line(path, lambda: Tokenizer.load(path))
    assert 0.2 * INPUTS < refused < INPUTS


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_gpt2_pair(name, tmp_path):
    model = tokenizers.Tokenizer.from_str(DEFINITIONS["bpe"]()).model
    model.save(str(tmp_path))
    path, rng = tmp_path / name, random.Random(name)
    refused = 0
    for data in mutations(path.read_bytes(), rng):
        path.write_bytes(data)
        with silence():
            refused += refused_in_a_line(tmp_path, lambda: Tokenizer.load(tmp_path))
    assert 0 < refused < INPUTS


@pytest.mark.filterwarnings("ignore:invalid:DeprecationWarning")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-7", "gb18030", "unicode_escape"])
def test_text(encoding, tmp_path):
    path, rng = tmp_path / "a.txt", random.Random(encoding)
    text = 'Grüße, 北京 🙂 +AGE- \\ud83d \\n "x"\r\n\n' * 3
    refused = 0
    for data in mutations(text.encode(encoding), rng):
        path.write_bytes(data)
        size = rng.choice([3, 64, 1 << 20])
        for errors in ("strict", "replace"):
            texts = read_text(path, encoding, errors, size)
            refused += refused_in_a_line(path, lambda texts=texts: "".join(texts).encode())
    assert 0 < refused < 2 * INPUTS


def test_whole_command(tmp_path, capfd):
    """Text, separator and tokenizer together, through the command: one line, or done."""
    path, out, rng = tmp_path / "a.txt", tmp_path / "out", random.Random(3)
    definition = tmp_path / "tokenizer.json"
    statuses = []
    for number in range(200):
        path.write_bytes(mutate_bytes(("one ab\n\ntwo a\n" * 9 + "北京\ud83d").encode("utf-8", "replace"), rng))
        definition.write_bytes(mutate_json(unigram().encode(), rng) if number % 2 else unigram().encode())
        separator = rng.choice(["none", "blank-line", r"\n", "ab"])
        flags = [
            "--tokenizer",
            str(definition),
            "--document-separator",
            separator,
            "--overwrite",
            "--val-fraction",
            "0",
        ]
        statuses.append(main(["prepare", str(path), "--out", str(out), *flags]))
        captured = capfd.readouterr()
        if statuses[-1]:
            assert captured.err.count("\n") == 1
            assert str(path) in captured.err or str(definition) in captured.err or "no text" in captured.err
    assert 0 < sum(statuses) < 200


def test_names_of_encodings():
    rng = random.Random(0)
    for _ in range(INPUTS):
        name = "".join(rng.choice("utf-816\0_é \n🙂lein") for _ in range(rng.randrange(8)))
        with contextlib.suppress(ConfigError):
            check_encoding(name)
