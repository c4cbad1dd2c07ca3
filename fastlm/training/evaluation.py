"""How good a model is on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..errors import DataError
from ..objectives import Batch, Evaluation, Objective


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    *,
    autocast: Callable[[], AbstractContextManager] = torch.no_grad,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate in eval mode on batches that are where the model is, always the same ones.

    Windows of text start with no context, so their first tokens cost more than they would in running text: the
    result is an upper bound of the model's loss on it.

    Args:
        stop: asked before each batch; None is returned as soon as it is true.

    Raises:
        DataError: if the batches have no target.
    """
    was_training = model.training
    model.eval()
    totals: dict[str, Any] = {}
    targets = 0
    try:
        for batch in batches:
            if stop():
                return None
            with autocast():
                for name, value in objective.score(model, batch).items():
                    if isinstance(value, list):
                        totals.setdefault(name, []).extend(value)
                    else:
                        totals[name] = totals.get(name, 0.0) + value
            targets += batch.targets
    finally:
        model.train(was_training)
    if not targets:
        raise DataError("the held-out examples have no target")
    return objective.evaluation(totals, targets)
