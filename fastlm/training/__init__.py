"""Training: configuration, data order, schedules, optimizer, checkpoints and the loop."""

from .config import TrainConfig
from .loop import DivergenceError, TrainResult, train

__all__ = ["DivergenceError", "TrainConfig", "TrainResult", "train"]
