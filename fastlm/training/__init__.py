"""Training: configuration, data order, schedules, optimizer, checkpoints and the loop."""

from .adamw import AdamW
from .config import TrainConfig
from .loop import DivergenceError, TrainResult, train
from .task import Task

__all__ = ["AdamW", "DivergenceError", "Task", "TrainConfig", "TrainResult", "train"]
