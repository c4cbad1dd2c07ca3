"""AdamW with decay on matrices and embeddings only."""

from __future__ import annotations

import torch
from torch import nn

from .adamw import AdamW
from .config import TrainConfig

FUSED_DEVICES = ("cpu", "cuda")


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over the model's parameters, in one fused kernel where there is one for the device.

    Tensors of two or more dimensions (matrices, embeddings) decay; biases and norms do not.
    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # Where our kernel does not serve: PyTorch's default on a CPU passes over the parameters once an operation.
    fused = all(p.device.type in FUSED_DEVICES for p in parameters)
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
