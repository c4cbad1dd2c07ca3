"""Whole models, one readable file each."""

from .gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
