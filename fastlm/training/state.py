"""What a training run remembers between steps, and what it tells at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .evaluation import Evaluation


@dataclass
class State:
    """What the loop remembers besides tensors; it travels in the checkpoint's metadata."""

    step: int = 0
    seconds: float = 0.0  # wall time of the run so far, earlier sittings included
    train_seconds: float = 0.0  # of that, time in training steps
    evaluated_at: int = 0  # step of the last evaluation
    best_loss: float | None = None
    best_step: int = 0
    stale_evaluations: int = 0  # in a row, without a new best
    bad_steps: int = 0  # in a row, skipped since the loss or gradient was not finite
    loss_sum: float = 0.0  # over the steps since the last line of metrics
    loss_count: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)  # float16's loss scale

    def add_loss(self, loss: float) -> None:
        self.loss_sum += loss
        self.loss_count += 1

    def take_mean_loss(self) -> float | None:
        """Mean of the losses added since the last call; None without any."""
        mean = self.loss_sum / self.loss_count if self.loss_count else None
        self.loss_sum, self.loss_count = 0.0, 0
        return mean

    def record_evaluation(self, loss: float) -> bool:
        """Note an evaluation at the current step; True if it is the best so far."""
        self.evaluated_at = self.step
        best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if best:
            self.best_loss, self.best_step, self.stale_evaluations = loss, self.step, 0
        else:
            self.stale_evaluations += 1
        return best


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        out: the run folder.
        reason: "max_steps", "max_minutes", "patience" or "interrupted".
        step: optimizer steps done, earlier sittings included.
        evaluation: the last evaluation of this sitting, None if there was none.
        best_loss: lowest validation loss in nats a token, None before the first evaluation.
        best_step: the step it was found at.
        seconds: wall time of the run after set-up, earlier sittings included.
        tokens_per_second: training tokens over the time in training steps, evaluations left out.
        parameters: of the model.
        device, dtype: where it ran, and the type of its matrix products.
    """

    out: Path
    reason: str
    step: int
    evaluation: Evaluation | None
    best_loss: float | None
    best_step: int
    seconds: float
    tokens_per_second: float
    parameters: int
    device: str
    dtype: str

    @property
    def interrupted(self) -> bool:
        return self.reason == "interrupted"
