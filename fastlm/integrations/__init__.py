"""fastlm in models that others wrote: `accelerate`, `restore`, Hugging Face transformers and PyTorch's SDPA."""

from ..interpret.maps import (
    AttentionMaps,
    AttentionStatistics,
    attention_maps,
    attention_statistics,
    attention_telemetry,
    attention_weights,
)
from .accelerate import Report, Row, accelerate, restore
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
