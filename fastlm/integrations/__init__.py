"""fastlm in models that others wrote: `accelerate`, `restore`, Hugging Face transformers and PyTorch's SDPA."""

from .accelerate import Report, Row, accelerate, restore

__all__ = ["Report", "Row", "accelerate", "restore"]
