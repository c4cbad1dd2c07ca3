"""What a run trains: a model, on examples, for an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Manifest, Tokenizer, load_manifest, load_tokens
from ..data.loader import Examples, Fixed
from ..data.mixing import Chained, Mixture, shares
from ..data.packing import CutExamples, CutWindows, PackedWindows
from ..data.windows import ShiftedWindows, Windows
from ..errors import ConfigError, DataError
from ..models.gpt import GPT, GPTConfig
from ..objectives import Causal, Objective
from .config import TrainConfig, check_memory


@dataclass
class Task:
    """A model with a `config`, and what it is trained on and for.

    Attributes:
        model: on the CPU; what was drawn for it came from torch's generator.
        objective: makes batches of the examples, and a loss of the model's outputs.
        examples: of training.
        held_out: examples that it is evaluated on, in order.
        amount: how much there is to be trained on, for people.
        tokens_per_example: of which speed and metrics tell.
        tokenizer: the file that the run folder gets a copy of; None for a model without one.
        fingerprint: of that tokenizer; "" without one.
        hashes: {what was read: its sha256}, which a resumed run must find again.
        source: names the data in errors.
    """

    model: nn.Module
    objective: Objective
    examples: Examples
    held_out: Sequence[Any]
    amount: str
    tokens_per_example: int
    tokenizer: Path | None
    fingerprint: str
    hashes: dict[str, str]
    source: str

    def check(self) -> None:
        """Raise for what a run would stumble over, at its first step or at its first evaluation.

        Raises:
            TypeError: for a part that is not of its kind.
            DataError: for no examples, or a missing tokenizer.
        """
        if not hasattr(getattr(self.model, "config", None), "to_dict"):
            raise TypeError(f"Task: model is a {type(self.model).__name__} without a config that has to_dict()")
        if not isinstance(self.objective, Objective):
            raise TypeError(f"Task: objective is a {type(self.objective).__name__}, expected an Objective")
        if not hasattr(self.examples, "epoch"):
            raise TypeError(f"Task: examples is a {type(self.examples).__name__}, expected e.g. Fixed(sequence)")
        for name in ("examples", "held_out"):
            if not len(getattr(self, name)):
                raise DataError(f"{self.source}: {name} has no example, expected at least one")
        if self.tokenizer is not None and not Path(self.tokenizer).is_file():
            raise DataError(f"{self.tokenizer}: no such tokenizer")


def data_folders(data: str) -> list[str]:
    """The prepared folders that a setting names, with commas between them; a folder's own name may hold some."""
    return [data] if data and Path(data).is_dir() else [name for name in data.split(",") if name]


def causal_gpt(config: TrainConfig, device: torch.device) -> Task:
    """A GPT that predicts the next token of prepared text, of one corpus or of several.

    Raises:
        ConfigError: if the sizes need more memory than the device has, or weights do not fit the corpora.
        DataError: if the prepared data are missing, damaged or too short, or of several tokenizers.
    """
    folders = [Path(name) for name in data_folders(config.data)]
    if not folders:
        raise ConfigError("data names no folder; give one that `fastlm prepare` wrote")
    manifests = [load_manifest(folder, verify="changed") for folder in folders]
    vocab_size = Tokenizer.load(folders[0] / "tokenizer.json").vocab_size
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.tokenizer_fingerprint != manifests[0].tokenizer_fingerprint:
            raise DataError(
                f"{folder}: its tokenizer is not that of {folders[0]}; prepare it with --tokenizer {folders[0]}"
            )
        if manifest.vocab_size != vocab_size:
            raise DataError(
                f"{folder}: manifest.json says vocab_size {manifest.vocab_size}, its tokenizer {vocab_size}"
            )
    check_memory(config, vocab_size, device)
    weights = _weights(config, len(folders))
    parts = [_examples(config, folder, manifest) for folder, manifest in zip(folders, manifests, strict=True)]
    asked = config.eval_tokens
    targets = shares(asked, weights or [len(part) for part in parts]) if asked else [0] * len(parts)
    held_out = [
        _held_out(config, folder, manifest, max(count, min(asked, 1)))
        for folder, manifest, count in zip(folders, manifests, targets, strict=True)
    ]
    tokens, size, chars = (sum(m.splits["val"][name] for m in manifests) for name in ("tokens", "bytes", "chars"))
    sizes = ("context_length", "n_layer", "n_head", "n_embd", "dropout")
    numbers = [""] if len(folders) == 1 else [f" {number}" for number in range(1, len(folders) + 1)]
    named = [
        (split + number, digest)
        for m, number in zip(manifests, numbers, strict=True)
        for split, digest in m.hashes().items()
    ]
    return Task(
        model=GPT(GPTConfig(vocab_size=vocab_size, **{name: getattr(config, name) for name in sizes})),
        objective=Causal(tokens / size, tokens / chars, config.separate_documents),
        examples=parts[0] if len(parts) == 1 else Mixture(parts, weights),
        held_out=held_out[0] if len(held_out) == 1 else Chained(held_out),
        amount=f"{sum(m.splits['train']['tokens'] for m in manifests):,} training tokens",
        tokens_per_example=config.context_length,
        tokenizer=folders[0] / "tokenizer.json",
        fingerprint=manifests[0].tokenizer_fingerprint,
        hashes=dict(named),
        source=config.data,
    )


def _weights(config: TrainConfig, count: int) -> list[float] | None:
    if not config.data_weights:
        return None
    try:
        weights = [float(weight) for weight in config.data_weights.split(",")]
    except ValueError:
        raise ConfigError(
            f"data_weights is {config.data_weights!r}, expected numbers with commas between them"
        ) from None
    if len(weights) != count:
        raise ConfigError(f"data_weights has {len(weights)} numbers, expected {count}, one for each folder of data")
    return weights


def _examples(config: TrainConfig, folder: Path, manifest: Manifest) -> Examples:
    tokens, length = load_tokens(folder, "train"), config.context_length
    if config.packing == "best-fit":
        return Fixed(PackedWindows(tokens, length, _end_id(folder, manifest), manifest.vocab_size))
    windows = ShiftedWindows(tokens, length, manifest.vocab_size)
    return CutExamples(windows, _end_id(folder, manifest)) if config.separate_documents else windows


def _held_out(config: TrainConfig, folder: Path, manifest: Manifest, targets: int) -> Sequence[Any]:
    tokens = load_tokens(folder, "val")
    if len(tokens) < 2:
        raise DataError(f"{folder}: the val split has {len(tokens)} tokens, expected 2 or more")
    windows = Windows(tokens, config.context_length, targets, vocab_size=manifest.vocab_size)
    return CutWindows(windows, _end_id(folder, manifest)) if config.separate_documents else windows


def _end_id(folder: Path, manifest: Manifest) -> int:
    if manifest.eot_id is None:
        raise DataError(f"{folder}: its tokenizer has no end of text, so where documents begin is not known")
    return manifest.eot_id
