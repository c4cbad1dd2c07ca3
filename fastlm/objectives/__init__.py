"""What a model is trained for: examples to batches, batches to a loss, and the numbers that judge a model.

A file here is an objective and registers itself; `base` and `registry` are the seam, `common` is what they share.
"""

from .base import Batch, Evaluation, Objective
from .causal import Causal, TextEvaluation
from .common.setup import Setup, make_task
from .common.task import Task
from .registry import Settings, objective, objectives

__all__ = [
    "Batch",
    "Causal",
    "Evaluation",
    "Objective",
    "Settings",
    "Setup",
    "Task",
    "TextEvaluation",
    "make_task",
    "objective",
    "objectives",
]
