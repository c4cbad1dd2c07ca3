"""What a training run remembers between steps, and what it tells at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from ..errors import CheckpointError, shown
from ..objectives import Evaluation

RENAMED = {"best_loss": "best"}  # what earlier versions called an entry
OF_ANY_SIGN = ("best", "loss_sum")  # by the objective


@dataclass
class State:
    """What the loop remembers besides tensors; it travels in the checkpoint's metadata."""

    step: int = 0
    seconds: float = 0.0  # wall time of the run so far, earlier sittings included
    train_seconds: float = 0.0  # of that, time in training steps
    evaluated_at: int = 0  # step of the last evaluation
    best: float | None = None  # of the evaluations' deciding number
    best_step: int = 0
    stale_evaluations: int = 0  # in a row, without a new best
    bad_steps: int = 0  # in a row, skipped since the loss or gradient was not finite
    loss_sum: float = 0.0  # over the steps since the last line of metrics
    loss_count: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)  # float16's loss scale
    data: dict[str, str] = field(default_factory=dict)  # sha256 of each split's tokens; earlier versions kept none

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> State:
        """The state that the checkpoint `source` holds.

        Raises:
            CheckpointError: on an unknown entry, as of another version, or one of another type.
        """
        kinds = get_type_hints(cls)
        values = {RENAMED.get(name, name): value for name, value in values.items() if name != "model"}
        for name, value in values.items():
            if name not in kinds:
                raise CheckpointError(f"{source}: state of another version: it has the entry {shown(name)}")
            if not _fits(name, value, kinds[name]):
                kind = getattr(kinds[name], "__name__", kinds[name])
                raise CheckpointError(f"{source}: state.{name} is not a possible {kind}")
        return cls(**values)

    def add_loss(self, loss: float) -> None:
        self.loss_sum += loss
        self.loss_count += 1

    def take_mean_loss(self) -> float | None:
        """Mean of the losses added since the last call; None without any."""
        mean = self.loss_sum / self.loss_count if self.loss_count else None
        self.loss_sum, self.loss_count = 0.0, 0
        return mean

    def record_evaluation(self, value: float, higher_is_better: bool = False) -> bool:
        """Note the deciding number of an evaluation at the current step; True if it is the best so far."""
        self.evaluated_at = self.step
        better = self.best is None or (value > self.best if higher_is_better else value < self.best)
        best = math.isfinite(value) and better
        if best:
            self.best, self.best_step, self.stale_evaluations = value, self.step, 0
        else:
            self.stale_evaluations += 1
        return best


def _fits(name: str, value: Any, kind: Any) -> bool:
    if get_origin(kind) is dict:
        plain = isinstance(value, dict)
        return plain and (kind == dict[str, Any] or all(isinstance(text, str) for text in value.values()))
    if value is None:
        return kind == (float | None)
    # A whole number may stand for a float; counts and times are not negative, and none is beyond 64 bits.
    numbers = (int,) if kind is int else (int, float)
    least = -(2**63) if name in OF_ANY_SIGN else 0
    return type(value) in numbers and least <= value < 2**63  # which not a number is not


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        out: the run folder.
        reason: "max_steps", "max_minutes", "patience" or "interrupted".
        step: optimizer steps done, earlier sittings included.
        evaluation: the last evaluation of this sitting, None if there was none.
        best: the best of the objective's deciding number on held-out examples, None before the first evaluation.
        best_step: the step it was found at.
        seconds: wall time of the run after set-up, earlier sittings included.
        tokens_per_second: training tokens over the time in training steps, evaluations left out.
        parameters: of the model.
        device, dtype: where it ran, and the type of its matrix products.
        metric: the deciding number.
        units: of the loss.
    """

    out: Path
    reason: str
    step: int
    evaluation: Evaluation | None
    best: float | None
    best_step: int
    seconds: float
    tokens_per_second: float
    parameters: int
    device: str
    dtype: str
    metric: str = "loss"
    units: str = ""

    @property
    def interrupted(self) -> bool:
        return self.reason == "interrupted"

    @property
    def best_loss(self) -> float | None:
        """`best`, of objectives whose loss decides."""
        return self.best
