"""gelu and bias_gelu under `fastlm verify`."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from .._core import dropout as _dropout
from .op import Rounding, Sample, Spec, Tensors, integers, largest, normal, size


def _draw(generator: random.Random, dtype: torch.dtype, exact: bool, fused: bool) -> Sample:
    """The exact kind stays at 16 to 32 on the right, where GELU is the identity in every dtype."""
    M = 0 if generator.random() < 0.05 else size(generator, 70)
    N = size(generator, 600)
    scale = generator.choice((1, 1, 4))
    x = integers(generator, 20, 28, M, N).double() if exact else normal(generator, M, N) * scale
    tensors: Tensors = {"x": x.to(dtype)}
    settings: dict = {"approximate": generator.choice(("none", "tanh"))}
    if fused:
        bias = integers(generator, -4, 4, N).double() if exact else normal(generator, N)
        tensors["bias"] = bias.to(dtype)
        settings["dropout_p"] = 0.0 if exact else generator.choice((0.0, 0.0, 0.1, 0.5))
    rows = () if settings.get("dropout_p") else ("x",)
    return Sample(dtype, settings, tensors, tuple(tensors), generator.getrandbits(31), exact, rows)


def _call(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    if "bias" in t:
        return (fastlm.bias_gelu(t["x"], t["bias"], **sample.settings),)
    return (fastlm.gelu(t["x"], **sample.settings),)


def _stock(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    x, p = t["x"], sample.settings.get("dropout_p", 0.0)
    seed = _dropout.draw_seed() if p else 0
    y = F.gelu(x + t["bias"] if "bias" in t else x, approximate=sample.settings["approximate"])
    return (y * _dropout.factors(x.shape[0], x.shape[1], p, seed, x.dtype) if p else y,)


def _rounding(sample: Sample, t: Tensors, grads: tuple[Tensor, ...]) -> dict[str, Rounding]:
    """exp's argument, x^2 / 2, carries its rounding into Phi and into the derivative."""
    M = t["x"].shape[0]
    x = largest(t["x"]) + largest(t.get("bias"))
    kept = 1 / (1 - sample.settings.get("dropout_p", 0.0))
    slope = largest(grads[0]) * kept * 1.2
    return {
        "output 0": Rounding(0.0, x * kept, 4),
        "dx": Rounding(0.0, slope * (1 + x), 4),
        "dbias": Rounding(0.0, slope * (1 + x), M),
    }


GELU = Spec("gelu", lambda g, d, e: _draw(g, d, e, False), _call, _stock, None, _rounding)
BIAS_GELU = Spec("bias_gelu", lambda g, d, e: _draw(g, d, e, True), _call, _stock, None, _rounding)
