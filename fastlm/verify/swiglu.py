"""swiglu under `fastlm verify`."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from .op import Rounding, Sample, Spec, Tensors, integers, largest, normal, size


def _draw(generator: random.Random, dtype: torch.dtype, exact: bool) -> Sample:
    """The exact kind has gates so large that silu is the identity in fp32, or so small that it is 0."""
    M = 0 if generator.random() < 0.05 else size(generator, 70)
    N = size(generator, 600)
    if exact:
        gate = 128.0 * (2 * integers(generator, 0, 1, M, N) - 1)
        up = integers(generator, -4, 4, M, N).double()
    else:
        gate, up = normal(generator, M, N) * generator.choice((1, 4)), normal(generator, M, N)
    tensors: Tensors = {"gate": gate.to(dtype), "up": up.to(dtype)}
    # In fp64 e^-128 is not nothing.
    exact = exact and dtype != torch.float64
    return Sample(dtype, {}, tensors, ("gate", "up"), generator.getrandbits(31), exact, ("gate", "up"))


def _call(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    return (fastlm.swiglu(t["gate"], t["up"]),)


def _stock(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    return (F.silu(t["gate"]) * t["up"],)


def _truth(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    if not sample.exact:
        return _stock(t, sample)
    return (t["gate"].clamp(min=0) * t["up"],)


def _rounding(sample: Sample, t: Tensors, grads: tuple[Tensor, ...]) -> dict[str, Rounding]:
    """exp's argument carries its rounding into the sigmoid and into its slope."""
    gate, up, dy = largest(t["gate"]), largest(t["up"]), largest(grads[0])
    return {
        "output 0": Rounding(0.0, gate * up, 4),
        "dgate": Rounding(0.0, dy * up * (1 + gate), 4),
        "dup": Rounding(0.0, dy * gate, 4),
    }


SWIGLU = Spec("swiglu", _draw, _call, _stock, _truth, _rounding)
