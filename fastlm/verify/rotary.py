"""rotary under `fastlm verify`."""

from __future__ import annotations

import random

import torch
from torch import Tensor

import fastlm

from ..ops.rotary import rotary_ref
from .op import Rounding, Sample, Spec, Tensors, integers, largest, normal, size


def _draw(generator: random.Random, dtype: torch.dtype, exact: bool) -> Sample:
    """The exact kind turns by quarter circles."""
    B, H, L = (size(generator, n) for n in (3, 4, 40))
    R = size(generator, 40)
    D = 2 * R + generator.choice((0, 0, 1, 7))
    lead = (L,) if generator.random() < 0.5 else (B, L)
    if exact:
        quarter = integers(generator, 0, 3, *lead, R)
        cos, sin = (torch.tensor(turn).double()[quarter] for turn in ([1, 0, -1, 0], [0, 1, 0, -1]))
        x = integers(generator, -8, 8, B, H, L, D).double()
    else:
        angle = normal(generator, *lead, R) * 10
        cos, sin, x = angle.cos(), angle.sin(), normal(generator, B, H, L, D)
    tensors: Tensors = {"x": x.to(dtype), "cos": cos.to(dtype), "sin": sin.to(dtype)}
    settings = {"interleaved": generator.random() < 0.5}
    rows = ("x",) if len(lead) == 1 else ("x", "cos", "sin")
    return Sample(dtype, settings, tensors, ("x",), generator.getrandbits(31), exact, rows)


def _call(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    return (fastlm.rotary(t["x"], t["cos"], t["sin"], **sample.settings),)


def _stock(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    return (rotary_ref(t["x"], t["cos"], t["sin"], sample.settings["interleaved"]),)


def _rounding(sample: Sample, t: Tensors, grads: tuple[Tensor, ...]) -> dict[str, Rounding]:
    return {"output 0": Rounding(0.0, largest(t["x"]), 2), "dx": Rounding(0.0, largest(grads[0]), 2)}


ROTARY = Spec("rotary", _draw, _call, _stock, None, _rounding)
