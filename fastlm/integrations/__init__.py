"""fastlm in models that others wrote: `accelerate`, `restore`, Hugging Face transformers and PyTorch's SDPA."""

from .accelerate import Report, Row, accelerate, restore
from .interpret import (
    AttentionMaps,
    AttentionStatistics,
    attention_maps,
    attention_statistics,
    attention_telemetry,
    attention_weights,
)
from .sdpa import register_sdpa

__all__ = [
    "AttentionMaps",
    "AttentionStatistics",
    "Report",
    "Row",
    "accelerate",
    "attention_maps",
    "attention_statistics",
    "attention_telemetry",
    "attention_weights",
    "register_sdpa",
    "restore",
]
