"""Training: configuration, data order, schedules, optimizer, checkpoints and the loop."""

from ..objectives import Task
from .adamw import AdamW
from .config import TrainConfig
from .loop import DivergenceError, TrainResult, train

__all__ = ["AdamW", "DivergenceError", "Task", "TrainConfig", "TrainResult", "train"]
