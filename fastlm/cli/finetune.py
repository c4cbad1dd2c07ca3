"""`fastlm finetune TABLE --init FOLDER`: train a model that is there on a table of examples."""

from __future__ import annotations

from ..training.config import TrainConfig
from . import train

DEFAULTS = TrainConfig(
    objective="classification",
    out="runs/finetune",
    eval_interval=50,
    batch_size=32,
    dropout=0.1,
    learning_rate=5e-5,
    weight_decay=0.01,
    beta2=0.999,
    schedule="linear",
    warmup_share=0.06,
    min_lr_ratio=0.0,
    epochs=3.0,
)

Arguments = train.Arguments


def main(argv: list[str]) -> int:
    """As `fastlm train`, with defaults for a model that is there already. Returns 0, or 130 after Ctrl-C."""
    return train.run(argv, "fastlm finetune", Arguments, DEFAULTS)
