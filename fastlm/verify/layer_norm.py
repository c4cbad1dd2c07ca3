"""layer_norm and add_layer_norm under `fastlm verify`."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from .._core import dropout as _dropout
from .op import Rounding, Sample, Spec, Tensors, integers, largest, normal, size


def _values(generator: random.Random, exact: bool, M: int, N: int) -> Tensor:
    """Rows of N; the exact kind is half +a and half -a, so that mean 0 and rstd 1 / a have no rounding."""
    if not exact:
        return normal(generator, M, N) * 2 + generator.choice((0, 3))
    signs = torch.tensor([1.0, -1.0] * (N // 2), dtype=torch.float64)
    signs = signs[torch.randperm(N, generator=torch.Generator().manual_seed(generator.getrandbits(62)))]
    return signs * 2.0 ** integers(generator, 0, 2, M, 1)


def _draw(generator: random.Random, dtype: torch.dtype, exact: bool, fused: bool) -> Sample:
    M = 0 if generator.random() < 0.05 else size(generator, 70)
    N = 2 ** generator.randint(1, 9) if exact else size(generator, 600)
    values = integers if exact else normal
    drawn: Tensors = {"x": _values(generator, exact, M, N)}
    if fused:
        drawn["residual"] = torch.zeros(M, N).double() if exact else normal(generator, M, N)
    bounds = (-4, 4) if exact else ()
    for name in ("weight", "bias"):
        drawn[name] = None if generator.random() < 0.25 else values(generator, *bounds, N).double()
    tensors = {name: None if t is None else t.to(dtype) for name, t in drawn.items()}
    settings: dict = {"eps": 0.0 if exact else generator.choice((1e-5, 1e-3))}
    if fused:
        settings["dropout_p"] = 0.0 if exact else generator.choice((0.0, 0.0, 0.1, 0.5))
    differentiable = tuple(name for name, t in tensors.items() if t is not None)
    rows = () if settings.get("dropout_p") else ("x", "residual")
    return Sample(dtype, settings, tensors, differentiable, generator.getrandbits(31), exact, rows)


def _call(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    x = t["x"]
    if "residual" not in t:
        return (fastlm.layer_norm(x, x.shape[-1], t["weight"], t["bias"], sample.settings["eps"]),)
    return fastlm.add_layer_norm(x, t["residual"], t["weight"], t["bias"], **sample.settings)


def _sum(t: Tensors, sample: Sample) -> Tensor:
    """residual + dropout(x), by the mask that the op's seed gives."""
    x, residual, p = t["x"], t.get("residual"), sample.settings.get("dropout_p", 0.0)
    if p:
        seed = _dropout.draw_seed()
        x = x * _dropout.factors(x.shape[0], x.shape[1], p, seed, x.dtype)
    return x if residual is None else residual + x


def _stock(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    z = _sum(t, sample)
    y = F.layer_norm(z, z.shape[-1:], t["weight"], t["bias"], sample.settings["eps"])
    return (y, z) if "residual" in t else (y,)


def _truth(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    z = _sum(t, sample)
    if "residual" in t:  # the stream is stored in its own dtype before it is normalized
        z = z + (z.detach().to(sample.dtype).double() - z.detach())
    # By the formula: PyTorch's running mean divides by every count on the way, which small integers show.
    centred = z - z.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + sample.settings["eps"]).rsqrt()
    y = y if t["weight"] is None else y * t["weight"]
    y = y if t["bias"] is None else y + t["bias"]
    return (y, z) if "residual" in t else (y,)


def _rounding(sample: Sample, t: Tensors, grads: tuple[Tensor, ...]) -> dict[str, Rounding]:
    """Centring loses eps |z|, which rstd then enlarges: that, not y itself, is what is rounded."""
    with torch.no_grad():
        z = _truth(t, sample)[-1] if "residual" in t else t["x"]
    M, N = z.shape
    if not M:
        return {}
    rstd = (z.var(-1, correction=0, keepdim=True) + sample.settings["eps"]).rsqrt()
    normed = largest(z * rstd) or 1.0
    weight, bias, dy = largest(t["weight"]) or 1.0, largest(t["bias"]), largest(grads[0])
    dz = largest(rstd) * dy * weight * (1 + normed**2) + sum(largest(g) for g in grads[1:])
    dz *= 2 if sample.settings.get("dropout_p") else 1
    y = Rounding(0.0, normed * weight + bias, N)
    dx = Rounding(0.0, dz, N)
    return {
        "output 0": y,
        "dx": dx,
        "dresidual": dx,
        "dweight": Rounding(0.0, dy * normed, M + N),
        "dbias": Rounding(0.0, dy, M),
    }


LAYER_NORM = Spec("layer_norm", lambda g, d, e: _draw(g, d, e, False), _call, _stock, _truth, _rounding)
ADD_LAYER_NORM = Spec("add_layer_norm", lambda g, d, e: _draw(g, d, e, True), _call, _stock, _truth, _rounding)
