"""Training in one call; what it needs is imported when it is called."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .objectives import Evaluation
    from .training.progress import Reporter, StepReport
    from .training.state import TrainResult


def train(
    data: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] = "runs/train",
    objective: str = "causal",
    on_step: Callable[[StepReport], None] | None = None,
    on_evaluation: Callable[[int, Evaluation, bool], None] | None = None,
    on_message: Callable[[str], None] | None = None,
    reporter: Reporter | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> TrainResult:
    """Train a model for an objective, as `fastlm train` does.

    Args:
        data: a folder that `fastlm prepare` wrote, or a table; several with commas between them.
        out: run folder: checkpoints, metrics, plot. `fastlm.load(out)` reads the best model.
        objective: what the model is trained for: "causal", "masked", "classification" and so on.
        on_step: called after each step with what it did.
        on_evaluation: called after each evaluation with the step, its numbers, and whether they are the best so far.
        on_message: called with each line that is told besides.
        reporter: a `fastlm.training.Reporter` is told as well.
        resume, overwrite: go on with the run in `out`, or start afresh in its place.
        settings: those of `fastlm.training.TrainConfig` by name; the objective's own as a mapping under its name, as
            `masked={"probability": 0.2}`.

    Returns:
        How the run ended.

    Raises:
        ConfigError, DataError, CheckpointError, DivergenceError: as `fastlm.training.train`.
    """
    from .training import TrainConfig
    from .training import train as run
    from .training.progress import Callbacks

    given = {"data": os.fspath(data), "out": os.fspath(out), "objective": objective}
    for name in ("init", "tokenizer", "validation", "export"):
        if isinstance(settings.get(name), os.PathLike):
            settings[name] = os.fspath(settings[name])
    config = TrainConfig.from_dict(settings | given)
    told = Callbacks(on_step, on_evaluation, on_message, reporter)
    return run(config, resume=resume, overwrite=overwrite, reporter=told)
