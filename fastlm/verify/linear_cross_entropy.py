"""linear_cross_entropy under `fastlm verify`."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from .cross_entropy import draw_loss, rounding, stock
from .op import Sample, Spec, Tensors, integers, normal, size


def _draw(generator: random.Random, dtype: torch.dtype, exact: bool, N: int, V: int) -> Tensors:
    """hidden (N, K), weight (V, K), bias (V,) or None; the exact kind makes one logit GAP and the others 0."""
    K = size(generator, 130)
    if exact:
        hidden = F.one_hot(integers(generator, 0, K - 1, N), K) * 32
        weight = torch.zeros(V, K, dtype=torch.int64)
        weight[integers(generator, 0, V - 1, K), torch.arange(K)] = 32
        return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "bias": None}
    bias = normal(generator, V).to(dtype) if generator.random() < 0.3 else None
    return {
        "hidden": normal(generator, N, K).to(dtype),
        "weight": (normal(generator, V, K) * K**-0.5).to(dtype),
        "bias": bias,
    }


def _call(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    return (
        fastlm.linear_cross_entropy(
            t["hidden"], t["weight"], t["target"], t["bias"], class_weight=t["class_weight"], **sample.settings
        ),
    )


LINEAR_CROSS_ENTROPY = Spec(
    "linear_cross_entropy", lambda g, d, e: draw_loss(g, d, e, _draw), _call, stock, None, rounding, invariant=False
)
