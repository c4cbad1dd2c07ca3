"""Tables as examples: rows that are read, held out, turned into ids and framed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ...data.framing import Frame, Framed
from ...data.loader import Fixed
from ...data.tables import Row, digest_of, overlap, read_rows, split_rows
from ...errors import ConfigError, DataError
from ..base import Objective
from .setup import Setup, data_folders
from .task import Task


class Example(NamedTuple):
    """A row as a model sees it; `target` is what the objective makes of its label."""

    framed: Framed
    target: Any


class TableData:
    """The rows of a run's tables.

    Args:
        setup: of the run.
        labelled: whether there is a column of labels to read.

    Attributes:
        train, held_out: rows.
        notes: what a person should know of them, a line each.
        tokenizer: that of the model, see `Setup.tokenizer`.

    Raises:
        ConfigError: for no table or no tokenizer, or sizes that need more memory than the device has.
        DataError: for tables that cannot be read, or no row on one of the two sides.
    """

    def __init__(self, setup: Setup, labelled: bool = True):
        self.setup, self.config = setup, setup.config
        self._label_column = self.config.label_column if labelled else ""
        names = data_folders(self.config.data)
        if not names:
            raise ConfigError("data names no table; give a file of CSV, TSV, JSON lines or Parquet")
        for name in names:
            if (Path(name) / "manifest.json").is_file():
                raise DataError(f"{name}: is prepared text; objective {setup.objective.name} is trained on a table")
        self.tokenizer = setup.tokenizer
        setup.check_memory(self.tokenizer.vocab_size)
        self.notes: list[str] = []
        self.train, self.held_out = self._split(self._read(names))
        self.hashes = {"train": digest_of(self.train), "val": digest_of(self.held_out)}

    def _read(self, names: Sequence[str]) -> list[Row]:
        config = self.config
        return read_rows(names, config.text_column, config.pair_column, self._label_column, config.header)

    def _split(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        config = self.config
        if not config.validation:
            train, held_out = split_rows(rows, config.validation_share, config.seed)
            if not train or not held_out:
                raise DataError(
                    f"{config.data}: validation_share = {config.validation_share} of {len(rows)} rows leaves "
                    f"{len(train)} to train on and {len(held_out)} held out, expected some of each"
                )
            return train, held_out
        held_out = self._read(data_folders(config.validation))
        if both := overlap(rows, held_out):
            self.notes.append(f"{both} of {len(held_out)} held-out rows have the text of a training row")
        return rows, held_out

    def framed(self, rows: Sequence[Row], targets: Sequence[Any], what: str) -> list[Example]:
        """Examples of rows; those that are too long are cut, left out or refused, as `truncation` says, and counted.

        Args:
            targets: of each row.
            what: the rows are, for the note.

        Raises:
            DataError: for a row that is too long where that is refused, or none that is left.
        """
        policy, most = self.config.truncation, self.setup.most_tokens
        frame = Frame(self.tokenizer, most, "end" if policy in ("drop", "refuse") else policy, self.has_roberta_pairs)
        texts = self.tokenizer.encode_arrays([row.text for row in rows])
        paired = bool(self.config.pair_column)
        pairs = self.tokenizer.encode_arrays([row.pair or "" for row in rows]) if paired else [None] * len(rows)
        found, long = [], 0
        for row, text, pair, target in zip(rows, texts, pairs, targets, strict=True):
            fits = frame.fits(text, pair)
            long += not fits
            if not fits and policy == "refuse":
                count = len(text) + (0 if pair is None else len(pair))
                raise DataError(f"{row.place}: has {count} tokens, expected at most {frame.room(paired)}")
            if fits or policy != "drop":
                found.append(Example(frame(text, pair), target))
        if long:
            done = "left out" if policy == "drop" else f"cut ({policy})"
            self.notes.append(f"{long} of {len(rows)} {what} rows are longer than {most} tokens and {done}")
        if not found:
            raise DataError(f"{self.config.data}: no {what} row is left")
        return found

    @property
    def has_roberta_pairs(self) -> bool:
        """Whether two separators stand between the texts of a pair, and all tokens have one type."""
        return bool(self.config.init) and getattr(self.setup.loaded.config, "position_offset", 0) > 0

    @property
    def has_types(self) -> bool:
        """Whether a model is told which text of a pair a token belongs to."""
        known = getattr(self.setup.loaded.config, "n_token_type", 1) if self.config.init else 2
        return bool(self.config.pair_column) and not self.has_roberta_pairs and known > 1

    def task(
        self, model: nn.Module, goal: Objective, train: Sequence[Any], held_out: Sequence[Any], tokens: float
    ) -> Task:
        """The task of such a model on examples of these rows.

        Args:
            tokens: of an example of training, on average.
        """
        return Task(
            model=model,
            objective=goal,
            examples=Fixed(train),
            held_out=held_out,
            amount=f"{len(train):,} rows and {len(held_out):,} held out",
            tokens_per_example=max(1, round(tokens)),
            tokenizer=self.tokenizer,
            fingerprint=self.tokenizer.fingerprint,
            hashes=self.hashes,
            source=self.config.data,
            notes=self.notes,
        )


def mean_tokens(examples: Sequence[Example]) -> float:
    """Of a framed example."""
    return sum(len(each.framed.tokens) for each in examples) / len(examples)
