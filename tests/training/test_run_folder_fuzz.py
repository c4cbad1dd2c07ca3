"""Everything that a run reads, damaged at random: it is loaded, or refused in one line that names the file."""

import contextlib
import copy
import json
import random
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastlm.data import PrepareConfig, load_manifest, prepare
from fastlm.data.loader import Loader
from fastlm.data.windows import ShiftedWindows, Windows
from fastlm.errors import CheckpointError, ConfigError, DataError
from fastlm.formats.checkpoint import load_checkpoint
from fastlm.objectives import Causal
from fastlm.training import TrainConfig, train
from fastlm.training.loop import Trainer
from fastlm.training.metrics import MetricsLog, plot_losses, read_metrics
from fastlm.training.progress import Reporter
from fuzz import INPUTS

# What a value is replaced by; integers beyond 64 bits, and more digits than Python converts, among them.
ODD = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, 2**200, 2**9000, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "x", "uint16", "\0", "\ud800", "a" * 3000, [], [[]], ["uint16"], {}, {"a": 1},
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small prepared folder and a finished run on it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "t.txt").write_text("a stitch in time saves nine, they say.\n" * 100, encoding="utf-8")
    prepare(PrepareConfig(inputs=(folder / "t.txt",), out=folder / "data", tokenizer="characters"))
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 8, "batch_size": 2}
    pace = {"max_steps": 6, "eval_interval": 3, "log_interval": 1, "eval_tokens": 16, "warmup_steps": 1}
    config = TrainConfig(
        data=str(folder / "data"), out=str(folder / "out"), device="cpu", dtype="float32", threads=1, **sizes, **pace
    )
    train(config)
    return folder


def damaged(original: bytes, random: random.Random) -> bytes:
    """Bits flipped, blocks zeroed, exchanged, cut out or doubled, the end lost; nested deeper than any parser goes."""
    data = bytearray(original)
    for _ in range(random.choice((1, 1, 2, 5))):
        at, size = random.randrange(len(data) + 1), random.choice((1, 1, 2, 8, 64))
        kind = random.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif kind == 2:
            other = random.randrange(len(data) + 1)
            data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data[at:at] = data[at : at + size]
        elif kind == 5:
            data[at:at] = random.choice((b"3", b"-", b"9" * 30, b'"', b"[", b"{", b"null", b"\xff", b"\n", b"e999"))
        elif kind == 6 and random.random() < 0.3:
            del data[at:]
        elif kind == 7 and random.random() < 0.1:
            data[at:at] = b"[" * 100_000
    return bytes(data)


def altered(value, random: random.Random):
    """A copy of a JSON value with one or more values replaced, removed, added or renamed, at any depth."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 2))):
        spot = value
        while True:
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            if not keys:
                break
            key = random.choice(keys)
            if isinstance(spot[key], (dict, list)) and random.random() < 0.7:
                spot = spot[key]
                continue
            kind = random.randrange(6)
            if kind == 0:
                del spot[key]
            elif kind == 1 and isinstance(spot, dict):
                spot[str(key) + "x"] = spot.pop(key)
            else:
                spot[key] = copy.deepcopy(random.choice(ODD))
            break
    return value


def text_of(value) -> bytes:
    """JSON, with integers of any length."""
    with without_digit_limit():
        return json.dumps(value).encode()


@contextlib.contextmanager
def without_digit_limit():
    if not hasattr(sys, "get_int_max_str_digits"):  # before Python 3.10.7
        yield
        return
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    yield
    sys.set_int_max_str_digits(before)


def inputs(original: bytes, seed: int):
    """INPUTS damaged forms of a file; of a JSON object half are valid JSON with odd values."""
    source = random.Random(seed)
    try:
        value = json.loads(original)
    except ValueError:
        value = None
    for i in range(INPUTS):
        yield text_of(altered(value, source)) if value is not None and i % 2 else damaged(original, source)


def taken(name, kind, action, *arguments):
    """What `action` gives, or None if it refuses in one line that names the file."""
    try:
        return action(*arguments)
    except kind as error:
        message = str(error)
    assert name in message
    assert "\n" not in message
    assert len(message) < 1000
    return None


def test_settings(run, tmp_path):
    path = tmp_path / "config.toml"
    refused = 0
    for data in inputs((run / "out" / "config.toml").read_bytes(), 1):
        path.write_bytes(data)
        refused += taken("config.toml", ConfigError, TrainConfig.load, path) is None
    assert INPUTS // 4 < refused < INPUTS


def test_settings_of_odd_values(run, tmp_path):
    """Valid TOML with one odd value."""
    path = tmp_path / "config.toml"
    source = random.Random(2)
    lines = (run / "out" / "config.toml").read_text(encoding="utf-8").splitlines()
    values = ["0xf" + "f" * 9000, "9" * 30, "nan", "-inf", "1979-05-27", "[[1]]", "{a=1}", '"\\u0000"', "true", "''"]
    settings = [number for number, line in enumerate(lines) if " = " in line]
    refused = 0
    for _ in range(INPUTS // 2):
        number = source.choice(settings)
        odd = [*lines]
        odd[number] = lines[number].split(" = ")[0] + " = " + source.choice(values)
        path.write_text("\n".join(odd), encoding="utf-8")
        refused += taken("config.toml", ConfigError, TrainConfig.load, path) is None
    assert INPUTS // 4 < refused <= INPUTS // 2


def test_metrics(run, tmp_path, monkeypatch):
    """Never refused: whatever lines are left are trimmed and drawn."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # 20 ms each
    path = tmp_path / "metrics.jsonl"
    original = (run / "out" / "metrics.jsonl").read_bytes()
    lines = original.decode().splitlines()
    source = random.Random(3)
    for i, data in enumerate(inputs(original, 3)):
        if i % 2:
            odd = [*lines]
            odd[source.randrange(len(odd))] = text_of(altered(json.loads(source.choice(lines)), source)).decode()
            data = "\n".join(odd).encode()
        path.write_bytes(data)
        whole = [line for line in data.split(b"\n") if line.decode(errors="replace") in lines]
        said = MetricsLog(path).start(6, 6)
        kept = read_metrics(path)
        assert all(0 < line["step"] <= 6 for line in kept)
        assert all(json.loads(line) in kept for line in whole)
        assert "\n" not in said
        if i % 500 == 0:
            plot_losses(path, tmp_path / "loss.png")


def test_manifest(run, tmp_path):
    """As training reads it, with what it divides by and counts."""
    for path in (run / "data").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for data in inputs((run / "data" / "manifest.json").read_bytes(), 4):
        (tmp_path / "manifest.json").write_bytes(data)
        manifest = taken(str(tmp_path), DataError, load_manifest, tmp_path)
        if manifest is not None:
            for entry in manifest.splits.values():
                assert entry["tokens"] / entry["bytes"] > 0
                assert entry["tokens"] / entry["chars"] > 0


def test_tokens(run, tmp_path):
    """Training and evaluation read ids below the vocabulary, or say which is not."""
    path = tmp_path / "train.bin"
    original = (run / "data" / "train.bin").read_bytes()[:208]  # 104 tokens, all of which some offset reaches
    vocab_size = load_manifest(run / "data").vocab_size
    refused = 0
    source = random.Random(5)
    for _ in range(INPUTS):
        data = bytearray(original)
        for _ in range(source.choice((0, 1, 3))):
            data[source.randrange(len(data))] = source.randrange(256)
        path.write_bytes(data)
        tokens = np.memmap(path, dtype="<u2", mode="r")
        good = int(tokens.max()) < vocab_size
        loader = Loader(ShiftedWindows(tokens, 8, vocab_size), 5, 0, Causal().collate)
        if taken("train.bin", DataError, list, Windows(tokens, 8, vocab_size=vocab_size)) is None:
            refused += 1
            assert not good
            assert any(taken("train.bin", DataError, loader.batch, k) is None for k in range(1000))
        else:
            assert good
            loader.batch(0)
    assert INPUTS // 4 < refused < INPUTS


def test_checkpoints_notice_every_damage(run, tmp_path):
    """Flipped bits, zeroed, exchanged, doubled and lost blocks: what loads is what was written."""
    path = tmp_path / "last.safetensors"
    original = (run / "out" / "last.safetensors").read_bytes()
    whole = load_checkpoint(run / "out" / "last.safetensors")
    for data in inputs(original, 6):
        path.write_bytes(data)
        same = taken("last.safetensors", CheckpointError, load_checkpoint, path)
        if same is not None:
            assert (same.step, same.state, same.model_config) == (whole.step, whole.state, whole.model_config)
            assert same.train_config == whole.train_config
            assert same.tensors.keys() == whole.tensors.keys()
            assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in same.tensors.items())


@pytest.mark.parametrize("entry", ["state", "model_config", "train_config", "step", "tokenizer_fingerprint"])
def test_metadata_of_files_without_checksums(run, tmp_path, entry):
    """As earlier versions wrote them: an odd value is refused, or does a resumed run no harm."""
    path = tmp_path / "last.safetensors"
    whole = load_checkpoint(run / "out" / "last.safetensors")
    trainer = Trainer(TrainConfig.load(run / "out" / "config.toml"), Reporter())
    plain = {name: getattr(whole, name) for name in
             ("state", "model_config", "train_config", "step", "tokenizer_fingerprint")}  # fmt: skip
    source = random.Random(entry)
    for i in range(INPUTS // 5):
        odd = altered({"v": plain[entry]}, source).get("v", 3)
        text = text_of(odd).decode() if i % 3 else damaged(text_of(odd), source).decode(errors="replace")
        metadata = {name: json.dumps(value) for name, value in plain.items()} | {entry: text}
        save_file(whole.tensors, path, metadata | {"format": "fastlm.checkpoint/1"})
        checkpoint = taken("last.safetensors", CheckpointError, load_checkpoint, path)
        if checkpoint is not None:
            taken("last.safetensors", CheckpointError, trainer._resume, checkpoint)
