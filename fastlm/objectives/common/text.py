"""Prepared text as examples: windows of one folder's tokens, or of several folders'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...data import Manifest, Tokenizer, load_manifest, load_tokens
from ...data.loader import Examples, Fixed
from ...data.mixing import Chained, Mixture, shares
from ...data.packing import CutExamples, CutWindows, PackedWindows
from ...data.windows import ShiftedWindows, Windows
from ...errors import ConfigError, DataError
from ..base import Objective
from .setup import Setup, data_folders
from .task import Task


class PreparedText:
    """The folders that `fastlm prepare` wrote for a run.

    Attributes:
        folders: of one tokenizer, that of the model of `init`, if there is one.
        tokenizer: theirs.
        tokens_per_byte, tokens_per_char: of all held-out text.

    Raises:
        ConfigError: if the sizes need more memory than the device has, or a context that the model of `init` has not.
        DataError: if the folders are missing or damaged, or of several tokenizers.
    """

    def __init__(self, setup: Setup):
        self.setup, self.config = setup, setup.config
        self.folders = [Path(name) for name in data_folders(self.config.data)]
        if not self.folders:
            raise ConfigError("data names no folder; give one that `fastlm prepare` wrote")
        self.manifests = [load_manifest(folder, verify="changed") for folder in self.folders]
        self.tokenizer = Tokenizer.load(self.folders[0] / "tokenizer.json")
        self.vocab_size = self.tokenizer.vocab_size
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            if manifest.tokenizer_fingerprint != self.manifests[0].tokenizer_fingerprint:
                raise DataError(
                    f"{folder}: its tokenizer is not that of {self.folders[0]}; "
                    f"prepare it with --tokenizer {self.folders[0]}"
                )
            if manifest.vocab_size != self.vocab_size:
                raise DataError(
                    f"{folder}: manifest.json says vocab_size {manifest.vocab_size}, its tokenizer {self.vocab_size}"
                )
        if self.config.init:
            self._check_init(self.config.init)
        setup.check_memory(self.vocab_size)
        self._weights = _weights(self.config.data_weights, len(self.folders))
        tokens, size, chars = (sum(m.splits["val"][name] for m in self.manifests) for name in _COUNTS)
        self.tokens_per_byte, self.tokens_per_char = tokens / max(size, 1), tokens / max(chars, 1)

    def _check_init(self, init: str) -> None:
        if self.setup.init_tokenizer().fingerprint != self.manifests[0].tokenizer_fingerprint:
            raise DataError(
                f"{self.folders[0]}: its tokenizer is not that of {init}; prepare it with --tokenizer {init}"
            )
        self.setup.check_vocabulary(self.vocab_size, str(self.folders[0]))
        if (most := self.setup.most_tokens) < self.config.context_length:
            raise ConfigError(f"context_length is {self.config.context_length}, expected at most {most}, as {init} has")

    def examples(self, length: int, targets: int = 0) -> tuple[Examples, Sequence[Any]]:
        """Examples of training and those held out, windows of `length` tokens.

        They are `Segments` for `packing` best-fit and for `separate_documents`, else (length + 1,) ids, of which the
        last is that after the window.

        Args:
            targets: how many tokens an evaluation reads of all folders; 0 for all.
        """
        parts = [self._examples(folder, m, length) for folder, m in zip(self.folders, self.manifests, strict=True)]
        counts = shares(targets, self._weights or [len(part) for part in parts]) if targets else [0] * len(parts)
        held_out = [
            self._held_out(folder, manifest, length, max(count, min(targets, 1)))
            for folder, manifest, count in zip(self.folders, self.manifests, counts, strict=True)
        ]
        return (
            parts[0] if len(parts) == 1 else Mixture(parts, self._weights),
            held_out[0] if len(held_out) == 1 else Chained(held_out),
        )

    def task(self, model: nn.Module, objective: Objective, examples: Examples, held_out: Sequence[Any]) -> Task:
        """The task of such a model on this text."""
        count = len(self.folders)
        numbers = [""] if count == 1 else [f" {number}" for number in range(1, count + 1)]
        named = [
            (split + number, digest)
            for m, number in zip(self.manifests, numbers, strict=True)
            for split, digest in m.hashes().items()
        ]
        return Task(
            model=model,
            objective=objective,
            examples=examples,
            held_out=held_out,
            amount=f"{sum(m.splits['train']['tokens'] for m in self.manifests):,} training tokens",
            tokens_per_example=self.config.context_length,
            tokenizer=self.folders[0] / "tokenizer.json",
            fingerprint=self.manifests[0].tokenizer_fingerprint,
            hashes=dict(named),
            source=self.config.data,
        )

    def _examples(self, folder: Path, manifest: Manifest, length: int) -> Examples:
        tokens = load_tokens(folder, "train")
        if self.config.packing == "best-fit":
            return Fixed(PackedWindows(tokens, length, _end_id(folder, manifest), manifest.vocab_size))
        windows = ShiftedWindows(tokens, length, manifest.vocab_size)
        return CutExamples(windows, _end_id(folder, manifest)) if self.config.separate_documents else windows

    def _held_out(self, folder: Path, manifest: Manifest, length: int, targets: int) -> Sequence[Any]:
        tokens = load_tokens(folder, "val")
        if len(tokens) < 2:
            raise DataError(f"{folder}: the val split has {len(tokens)} tokens, expected 2 or more")
        windows = Windows(tokens, length, targets, vocab_size=manifest.vocab_size)
        return CutWindows(windows, _end_id(folder, manifest)) if self.config.separate_documents else windows


_COUNTS = ("tokens", "bytes", "chars")


def _weights(asked: str, count: int) -> list[float] | None:
    if not asked:
        return None
    try:
        weights = [float(weight) for weight in asked.split(",")]
    except ValueError:
        raise ConfigError(f"data_weights is {asked!r}, expected numbers with commas between them") from None
    if len(weights) != count:
        raise ConfigError(f"data_weights has {len(weights)} numbers, expected {count}, one for each folder of data")
    return weights


def _end_id(folder: Path, manifest: Manifest) -> int:
    if manifest.eot_id is None:
        raise DataError(f"{folder}: its tokenizer has no end of text, so where documents begin is not known")
    return manifest.eot_id
