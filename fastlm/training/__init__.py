"""Training: configuration, data order, schedules, optimizer, checkpoints and the loop."""

from ..objectives import Task
from .adamw import AdamW
from .config import TrainConfig
from .loop import DivergenceError, TrainResult, train
from .progress import Callbacks, Reporter

__all__ = ["AdamW", "Callbacks", "DivergenceError", "Reporter", "Task", "TrainConfig", "TrainResult", "train"]
