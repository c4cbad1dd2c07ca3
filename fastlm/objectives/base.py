"""What the training loop asks of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError, nearest, shown


@dataclass(frozen=True)
class Batch:
    """Examples as tensors.

    Attributes:
        tensors: by name, the examples in the first dimension.
        targets: how many values are predicted, over which the loss is a mean.
    """

    tensors: dict[str, Tensor]
    targets: int

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device: torch.device) -> Batch:
        """On a device; on CUDA through pinned memory, without waiting."""
        if device.type == "cuda":
            moved = {name: t.pin_memory().to(device, non_blocking=True) for name, t in self.tensors.items()}
        else:
            moved = {name: t.to(device) for name, t in self.tensors.items()}
        return Batch(moved, self.targets)


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on held-out examples; every field is a number, and is written to metrics.jsonl.

    Attributes:
        loss: mean over the targets.
    """

    loss: float

    def describe(self) -> str:
        """The numbers in a line, for people."""
        return f"loss {self.loss:.4f}"


class Objective(ABC):
    """What a model is trained for, apart from the model and from the loop.

    Attributes:
        name: as settings name it.
        decides: the field of its evaluations that says which of two models is the better one.
        higher_is_better: of that field.
        units: of the loss, for people.
        costs: the fields of its evaluations of which less is better.
        metrics: the fields that may decide, the default first; () where they are not known before an evaluation.
    """

    name: ClassVar[str]
    decides: str = "loss"
    higher_is_better: bool = False
    units: ClassVar[str] = ""
    costs: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bits_per_byte", "bits_per_char")
    metrics: tuple[str, ...] = ()

    def decide_by(self, metric: str) -> None:
        """Let another field of the evaluations decide.

        Raises:
            ConfigError: for one that is not in `metrics`.
        """
        if self.metrics and metric not in self.metrics:
            wanted = " or ".join(self.metrics)
            raise ConfigError(f"metric is {shown(metric)}, expected {wanted}{nearest(metric, self.metrics)}")
        self.decides, self.higher_is_better = metric, metric not in self.costs

    @abstractmethod
    def collate(self, examples: Sequence[Any], positions: Sequence[int]) -> Batch:
        """Make a batch on the CPU.

        Args:
            examples: of which the batch is made.
            positions: the number of each in the stream of examples. What is drawn at random for an example is drawn
                from its position and a seed alone, so that it is the same in every batch and after every resumption.
        """

    @abstractmethod
    def loss(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The mean loss over the batch's targets, a scalar that can be differentiated.

        `model(...)` is what `compile` compiles; other methods of the model, as BERT's `loss`, run as they are written.
        """

    def score(self, model: Callable[..., Any], batch: Batch) -> dict[str, Any]:
        """Sums over a batch of held-out examples by name, or lists with what each gave.

        `evaluation` gets the totals of the sums, and the lists of all batches one behind the other.
        """
        return {"loss": self.loss(model, batch).item() * batch.targets}

    def evaluation(self, totals: dict[str, Any], targets: int) -> Evaluation:
        """The result of held-out examples with so many targets, from the totals of what `score` gave."""
        return Evaluation(totals["loss"] / targets)
