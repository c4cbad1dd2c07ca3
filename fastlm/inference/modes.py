"""Evaluation mode while any generation of a model is under way, and the modes that it had once the last one ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn


class _Held:
    """How many generations are under way, and the modules that were in training mode before the first."""

    def __init__(self) -> None:
        self.count = 0
        self.training: list[nn.Module] = []


_LOCK = threading.Lock()
_HELD: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold the model in evaluation mode, together with whoever else holds it, in any thread."""
    with _LOCK:
        held = _HELD.setdefault(model, _Held())
        held.count += 1
        _evaluate(model, held)
    try:
        yield
    finally:
        with _LOCK:
            held.count -= 1
            if not held.count:
                del _HELD[model]
                for module in held.training:
                    module.training = True


def evaluate_again(model: nn.Module) -> None:
    """Back to evaluation mode where a held model was put into training mode meanwhile; that is then its mode after."""
    if model.training:
        with _LOCK:
            _evaluate(model, _HELD[model])


def _evaluate(model: nn.Module, held: _Held) -> None:
    training = [module for module in model.modules() if module.training]
    if training:
        held.training = training
        model.eval()
