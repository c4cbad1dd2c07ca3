"""Classification of a text or a pair of texts: one label of several, any number of labels, or a number."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.framing import padded
from ..data.tables import Row
from ..errors import ConfigError, DataError, nearest, shown
from .base import Batch, Evaluation, Objective
from .common.setup import Setup
from .common.tables import Example, TableData, mean_tokens
from .common.task import Task
from .registry import Settings, objective

Kind = Literal["single", "multi", "regression"]
PROBLEMS = {  # what transformers calls them
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}


@dataclass(frozen=True)
class ClassificationSettings(Settings):
    """Classification of texts."""

    kind: Kind = "single"  # one label a row, any number of them, or a number
    labels: str = ""  # names in order, with commas between them; empty: those of the training rows, sorted
    separator: str = ","  # between the labels of a row, of several
    class_weights: str = ""  # of the loss: balanced, or a number a label with commas between them
    label_smoothing: float = 0.0  # share of a target's probability that is spread over all labels

    def check(self) -> None:
        self.require("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        self.require("separator", bool(self.separator), "a text")
        if self.kind != "single":
            self.require("label_smoothing", not self.label_smoothing, f"0 for the kind {self.kind}")
        if self.kind == "regression":
            self.require("labels", not self.labels, "none for the kind regression")
            self.require("class_weights", not self.class_weights, "none for the kind regression")


@dataclass(frozen=True)
class SingleLabelEvaluation(Evaluation):
    """How often the likeliest label is the right one.

    Attributes:
        loss: nats a row, without weights and smoothing.
        accuracy: share of rows.
        macro_f1: mean over the labels that occur, in the rows or in the predictions.
        matthews: correlation coefficient.
        rows: how many there were.
    """

    accuracy: float
    macro_f1: float
    matthews: float
    rows: int

    def describe(self) -> str:
        return (
            f"loss {self.loss:.4f}, accuracy {self.accuracy:.4f}, macro F1 {self.macro_f1:.4f}, "
            f"Matthews {self.matthews:.4f}"
        )


@dataclass(frozen=True)
class MultiLabelEvaluation(Evaluation):
    """How well the labels with a probability above one half are the right ones.

    Attributes:
        loss: nats a row and label.
        accuracy: share of rows of which all labels are right.
        micro_f1, macro_f1: over all decisions, and the mean over labels.
        rows: how many there were.
    """

    accuracy: float
    micro_f1: float
    macro_f1: float
    rows: int

    def describe(self) -> str:
        return (
            f"loss {self.loss:.4f}, accuracy {self.accuracy:.4f}, micro F1 {self.micro_f1:.4f}, "
            f"macro F1 {self.macro_f1:.4f}"
        )


@dataclass(frozen=True)
class RegressionEvaluation(Evaluation):
    """How close the numbers are.

    Attributes:
        loss: mean squared error.
        pearson, spearman: correlation with the right numbers, and of ranks; NaN where all predictions are equal.
        rows: how many there were.
    """

    pearson: float
    spearman: float
    rows: int

    def describe(self) -> str:
        return f"loss {self.loss:.4f}, Pearson {self.pearson:.4f}, Spearman {self.spearman:.4f}"


class Classification(Objective):
    """A label, several, or a number, from a framed text.

    Args:
        kind: what is predicted.
        weights: (labels,) fp32: of a row by its label, or of several labels of a label that is there; None for 1. The
            loss is the mean of what the rows have, weighted, over their number.
        label_smoothing: see `torch.nn.functional.cross_entropy`.
        pad: id that rows are filled up with.
        types: whether the model is told which text a token belongs to.
    """

    name = "classification"

    def __init__(
        self,
        kind: Kind = "single",
        weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        pad: int = 0,
        types: bool = False,
    ):
        self.kind, self.weights, self.label_smoothing = kind, weights, label_smoothing
        self.pad, self.types = pad, types
        self.metrics = {
            "single": ("accuracy", "macro_f1", "matthews", "loss"),
            "multi": ("macro_f1", "micro_f1", "accuracy", "loss"),
            "regression": ("loss", "pearson", "spearman"),
        }[kind]
        self.decide_by(self.metrics[0])

    def collate(self, examples: Sequence[Example], positions: Sequence[int] = ()) -> Batch:
        """Rows to int64 "tokens" (B, T) and "targets": (B,) int64 or fp32, of several labels (B, labels) fp32.

        "mask" (B, T) is there if they differ in length, "types" (B, T) if the model is told.
        """
        rows = [example.framed.tokens for example in examples]
        tensors = {"tokens": padded(rows, self.pad)}
        if any(len(row) < tensors["tokens"].shape[1] for row in rows):
            tensors["mask"] = padded([np.ones(len(row), np.int64) for row in rows])
        if self.types:
            tensors["types"] = padded([example.framed.types for example in examples])
        dtype = np.int64 if self.kind == "single" else np.float32
        tensors["targets"] = np.array([example.target for example in examples], dtype)
        return Batch({name: torch.from_numpy(x) for name, x in tensors.items()}, len(rows))

    def loss(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """From `model(tokens, mask, types)`, the logits (B, labels)."""
        weights = None if self.weights is None else self.weights.to(batch["tokens"].device)
        logits = self._logits(model, batch)
        return self._sum(logits, batch["targets"], weights, self.label_smoothing) / batch.targets

    def score(self, model: Callable[..., Any], batch: Batch) -> dict[str, Any]:
        logits, targets = self._logits(model, batch), batch["targets"]
        loss = self._sum(logits, targets, None, 0.0).item()
        found = {"single": logits.argmax(1), "multi": (logits > 0).int(), "regression": logits.flatten()}[self.kind]
        right = targets if self.kind == "regression" else targets.int()
        return {"loss": loss, "found": found.tolist(), "right": right.tolist()}

    def evaluation(self, totals: dict[str, Any], targets: int) -> Evaluation:
        loss, found, right = totals["loss"] / targets, np.array(totals["found"]), np.array(totals["right"])
        if self.kind == "regression":
            return RegressionEvaluation(loss, *_correlations(found, right), targets)
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        def f1(average: str) -> float:
            return float(f1_score(right, found, average=average, zero_division=0))

        accuracy = float(accuracy_score(right, found))
        if self.kind == "multi":
            return MultiLabelEvaluation(loss, accuracy, f1("micro"), f1("macro"), targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a single label, for which it is 0
            matthews = float(matthews_corrcoef(right, found))
        return SingleLabelEvaluation(loss, accuracy, f1("macro"), matthews, targets)

    def _logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        return model(batch["tokens"], batch.tensors.get("mask"), batch.tensors.get("types")).float()

    def _sum(self, logits: Tensor, targets: Tensor, weights: Tensor | None, label_smoothing: float) -> Tensor:
        """Over the rows, of several labels their mean."""
        if self.kind == "regression":
            return F.mse_loss(logits.squeeze(1), targets, reduction="sum")
        if self.kind == "multi":
            losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="sum")
            return losses / logits.shape[1]
        return F.cross_entropy(logits, targets, weights, reduction="sum", label_smoothing=label_smoothing)


def _correlations(found: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    if len(found) < 2:
        return math.nan, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of equal numbers, for which they are NaN
        return float(stats.pearsonr(found, right)[0]), float(stats.spearmanr(found, right)[0])


@objective(
    "classification",
    summary="predict a label, several or a number of a text or a pair",
    models=("bert",),
    settings=ClassificationSettings,
    table=True,
)
def classification(setup: Setup) -> Task:
    """On tables with a column of labels."""
    settings: ClassificationSettings = setup.settings
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            "objective classification needs scikit-learn: pip install '.[evaluate]'  in the folder of fastlm's source"
        )
    table = TableData(setup)
    labels = _label_names(settings, table)
    targets = [[_target(row, settings, labels, setup) for row in rows] for rows in (table.train, table.held_out)]
    counts = _counts(settings, labels, targets[0])
    if settings.kind != "regression":
        _check_classes(labels, counts, _counts(settings, labels, targets[1]), table)
    goal = Classification(
        settings.kind,
        _weights(settings, labels, counts, len(table.train)),
        settings.label_smoothing,
        table.tokenizer.special_ids("masked")["pad"],
        types=table.has_types,
    )
    train = table.framed(table.train, targets[0], "training")
    held_out = table.framed(table.held_out, targets[1], "held-out")
    model = setup.model(
        table.tokenizer.vocab_size,
        head="classification",
        pooler=True,
        n_class=max(len(labels), 1),
        labels=tuple(labels) or None,
        problem_type=PROBLEMS[settings.kind],
    )
    return table.task(model, goal, train, held_out, mean_tokens(train))


def _names(row: Row, settings: ClassificationSettings, column: str) -> list[str]:
    """The labels of a row."""
    label = row.label
    if settings.kind == "multi":
        if isinstance(label, list):
            return [str(each) for each in label]
        return [name.strip() for name in str(label or "").split(settings.separator) if name.strip()]
    if label is None or (isinstance(label, str) and not label.strip()):
        raise DataError(f"{row.place}: the label is missing (column {column!r})")
    return [label.strip() if isinstance(label, str) else str(label)]


def _label_names(settings: ClassificationSettings, table: TableData) -> list[str]:
    if settings.kind == "regression":
        return []
    if settings.labels:
        names = [name.strip() for name in settings.labels.split(",")]
        if twice := [name for name, count in Counter(names).items() if count > 1 or not name]:
            raise ConfigError(f"classification.labels names {shown(twice[0])} twice, or one without a name")
    else:
        column = table.config.label_column
        found = {name for row in table.train for name in _names(row, settings, column)}
        names = sorted(found, key=lambda name: (0, int(name), name) if _is_whole(name) else (1, 0, name))
    if len(names) < (2 if settings.kind == "single" else 1):
        raise DataError(f"{table.config.data}: its training rows have {len(names)} labels, expected 2 or more")
    return names


def _is_whole(name: str) -> bool:
    return name.isascii() and name.removeprefix("-").isdigit() and len(name) < 19


def _target(row: Row, settings: ClassificationSettings, labels: list[str], setup: Setup) -> Any:
    column = setup.config.label_column
    if settings.kind == "regression":
        try:
            value = float(row.label)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{row.place}: the label is {shown(row.label)}, expected a finite number")
        return value
    places = []
    for name in _names(row, settings, column):
        if name not in labels:
            raise DataError(
                f"{row.place}: the label {shown(name)} is in no training row and not in --classification.labels"
                if not settings.labels
                else f"{row.place}: the label {shown(name)} is none of classification.labels{nearest(name, labels)}"
            )
        places.append(labels.index(name))
    return places[0] if settings.kind == "single" else [float(place in places) for place in range(len(labels))]


def _counts(settings: ClassificationSettings, labels: list[str], targets: list[Any]) -> np.ndarray:
    """Rows of each label."""
    if settings.kind == "single":
        return np.bincount(targets, minlength=len(labels))
    return np.array(targets).sum(0) if settings.kind == "multi" else np.zeros(0)


def _check_classes(labels: list[str], counts: np.ndarray, held_out: np.ndarray, table: TableData) -> None:
    if absent := [name for name, count in zip(labels, counts, strict=True) if not count]:
        raise DataError(f"{table.config.data}: no training row has the label {', '.join(map(shown, absent[:4]))}")
    if absent := [name for name, count in zip(labels, held_out, strict=True) if not count]:
        table.notes.append(f"no held-out row has the label {', '.join(map(shown, absent[:4]))}")


def _weights(settings: ClassificationSettings, labels: list[str], counts: np.ndarray, rows: int) -> Tensor | None:
    """Balanced: as if each label had as many rows, and of several labels as many rows as lack it."""
    if not settings.class_weights:
        return None
    if settings.class_weights == "balanced":
        found = rows / (len(labels) * counts) if settings.kind == "single" else (rows - counts) / counts
        return torch.from_numpy(np.maximum(found, 1e-3)).float()
    try:
        values = [float(text) for text in settings.class_weights.split(",")]
    except ValueError:
        values = []
    if len(values) != len(labels) or not all(0 < value < math.inf for value in values):
        raise ConfigError(
            f"classification.class_weights is {shown(settings.class_weights)}, expected balanced or "
            f"{len(labels)} numbers above 0, one for each of {', '.join(labels[:8])}"
        )
    return torch.tensor(values)
