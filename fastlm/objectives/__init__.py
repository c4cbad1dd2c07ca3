"""What a model is trained for: examples to batches, batches to a loss, and the numbers that judge a model."""

from .base import Batch, Evaluation, Objective
from .causal import Causal, TextEvaluation

__all__ = ["Batch", "Causal", "Evaluation", "Objective", "TextEvaluation"]
