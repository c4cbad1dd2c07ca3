"""rms_norm and add_rms_norm under `fastlm verify`."""

from __future__ import annotations

import random

import torch
from torch import Tensor

import fastlm

from .op import Rounding, Sample, Spec, Tensors, integers, largest, normal, size


def _draw(generator: random.Random, dtype: torch.dtype, exact: bool, fused: bool) -> Sample:
    """The exact kind has one magnitude a row, a power of two, so that rstd has no rounding."""
    M = 0 if generator.random() < 0.05 else size(generator, 70)
    N = 2 ** generator.randint(1, 9) if exact else size(generator, 600)
    if exact:
        x = (2.0 * integers(generator, 0, 1, M, N) - 1) * 2.0 ** integers(generator, 0, 2, M, 1)
    else:
        x = normal(generator, M, N) * 2
    drawn: Tensors = {"x": x}
    if fused:
        drawn["residual"] = torch.zeros(M, N).double() if exact else normal(generator, M, N)
    weight = integers(generator, -4, 4, N).double() if exact else normal(generator, N)
    drawn["weight"] = None if generator.random() < 0.25 else weight
    tensors = {name: None if t is None else t.to(dtype) for name, t in drawn.items()}
    settings = {"eps": 0.0 if exact else generator.choice((1e-6, 1e-3))}
    differentiable = tuple(name for name, t in tensors.items() if t is not None)
    return Sample(dtype, settings, tensors, differentiable, generator.getrandbits(31), exact, ("x", "residual"))


def _call(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    if "residual" in t:
        return fastlm.add_rms_norm(t["x"], t["residual"], t["weight"], sample.settings["eps"])
    return (fastlm.rms_norm(t["x"], t["x"].shape[-1], t["weight"], sample.settings["eps"]),)


def _norm(z: Tensor, t: Tensors, sample: Sample) -> Tensor:
    y = z * (z.square().mean(-1, keepdim=True) + sample.settings["eps"]).rsqrt()
    return y if t["weight"] is None else y * t["weight"]


def _stock(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    if "residual" not in t:
        return (_norm(t["x"], t, sample),)
    z = t["residual"] + t["x"]
    return _norm(z, t, sample), z


def _truth(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    if "residual" not in t:
        return _stock(t, sample)
    z = t["residual"] + t["x"]  # stored in its own dtype before it is normalized
    z = z + (z.detach().to(sample.dtype).double() - z.detach())
    return _norm(z, t, sample), z


def _rounding(sample: Sample, t: Tensors, grads: tuple[Tensor, ...]) -> dict[str, Rounding]:
    with torch.no_grad():
        z = _truth(t, sample)[-1] if "residual" in t else t["x"]
    M, N = z.shape
    if not M:
        return {}
    rstd = (z.square().mean(-1, keepdim=True) + sample.settings["eps"]).rsqrt()
    normed, weight, dy = largest(z * rstd) or 1.0, largest(t["weight"]) or 1.0, largest(grads[0])
    dx = Rounding(0.0, largest(rstd) * dy * weight * (1 + normed**2) + sum(largest(g) for g in grads[1:]), N)
    return {
        "output 0": Rounding(0.0, normed * weight, N),
        "dx": dx,
        "dresidual": dx,
        "dweight": Rounding(0.0, dy * normed, M + N),
    }


RMS_NORM = Spec("rms_norm", lambda g, d, e: _draw(g, d, e, False), _call, _stock, _truth, _rounding)
ADD_RMS_NORM = Spec("add_rms_norm", lambda g, d, e: _draw(g, d, e, True), _call, _stock, _truth, _rounding)
