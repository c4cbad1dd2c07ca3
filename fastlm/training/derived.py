"""Settings that follow from others, once the data are known."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from ..objectives.common.setup import data_folders
from .config import TrainConfig

PATHS = ("init", "tokenizer", "export")
LISTS = ("data", "validation")  # of paths, with commas between them


def with_lengths(config: TrainConfig, examples: int) -> TrainConfig:
    """The settings with the steps that `epochs` over so many examples and `warmup_share` say."""
    steps = config.max_steps
    if config.epochs:
        steps = max(1, math.ceil(config.epochs * examples / (config.batch_size * config.gradient_accumulation)))
    warmup = round(config.warmup_share * steps) if config.warmup_share else config.warmup_steps
    return dataclasses.replace(config, max_steps=steps, warmup_steps=warmup)


def from_anywhere(config: TrainConfig) -> TrainConfig:
    """The settings with absolute paths, so that the run can be resumed from anywhere."""
    found: dict[str, Any] = {name: os.path.abspath(value) for name in PATHS if (value := getattr(config, name))}
    found |= {name: ",".join(map(os.path.abspath, data_folders(getattr(config, name)))) for name in LISTS}
    return dataclasses.replace(config, **found)
