"""What the tests of objectives share: small runs, text and tables to train on, and how runs are compared."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import torch

from fastlm.data import PrepareConfig, prepare
from fastlm.formats.checkpoint import load_checkpoint
from fastlm.training import TrainConfig, TrainResult, train
from fastlm.training.progress import Reporter

SMALL = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 16, "batch_size": 4, "warmup_steps": 2, "max_steps": 8,
    "eval_interval": 4, "log_interval": 1, "device": "cpu", "threads": 1, "dtype": "float32",
}  # fmt: skip
WORDS = {
    "good": ["fine", "lovely", "great", "splendid"],
    "bad": ["awful", "dreadful", "poor", "boring"],
    "so-so": ["plain", "average", "passable", "common"],
}
FILLING = ["the", "film", "was", "really", "actress", "undoubtedly"]


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label), of which the label follows from one word."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        label = list(WORDS)[random.integers(len(WORDS))]
        filling = random.choice(FILLING, random.integers(2, 9))
        words = [*filling, random.choice(WORDS[label]), str(random.integers(1000))]
        found.append((" ".join(random.permutation(words)), label))
    return found


def wordpiece(folder: Path) -> Path:
    """A folder with BERT's kind of vocabulary: the sentences' words, of which two are in parts, and digits."""
    parts = ["act", "##ress", "un", "##doubt", "##edly"]
    whole = [word for words in (*WORDS.values(), FILLING) for word in words if word not in ("actress", "undoubtedly")]
    digits = [mark + digit for mark in ("", "##") for digit in "0123456789"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", *parts, *whole, "-", *digits]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return folder


def prepared(folder: Path, special: str = "masked", tokenizer: str = "", count: int = 300) -> Path:
    """Prepared text, a document a line, by default with the tokenizer of `wordpiece`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line, _ in sentences(count)), encoding="utf-8")
    options = {
        "special": special,
        "vocab_size": 300,
        "tokenizer": tokenizer or str(wordpiece(folder)),
        "val_fraction": 0.1,
    }
    prepare(PrepareConfig(inputs=(text,), out=folder / "data", **options))
    return folder / "data"


class StopAfter(Reporter):
    """Interrupts a run after a step."""

    def __init__(self, step: int):
        self.at = step

    def step(self, report):
        if report.step == self.at:
            signal.raise_signal(signal.SIGINT)


class Listening(Reporter):
    """Keeps the messages."""

    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def run(out: Path, *, reporter=None, resume=False, **settings) -> TrainResult:
    config = TrainConfig.from_dict({**SMALL, "out": str(out), **settings})
    return train(config, reporter=reporter, resume=resume)


def tensors(out: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_checkpoint(out / f"{name}.safetensors").tensors


def same_bits(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, optimizer and generators."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(out: Path) -> list[float]:
    """Of each step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def table(path: Path, rows: list[dict]) -> str:
    """Rows as JSON lines; the file's name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(count: int, seed: int = 0) -> list[dict]:
    return [{"text": text, "label": label} for text, label in sentences(count, seed)]
