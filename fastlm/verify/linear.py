"""linear under `fastlm verify`."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from .op import Rounding, Sample, Spec, Tensors, integers, largest, normal, size


def _draw(generator: random.Random, dtype: torch.dtype, exact: bool) -> Sample:
    """Few rows, mostly, without gradients: those are the library's."""
    rows = generator.choice((1, 1, 2, 3, 4, 5, 8))
    N, K = size(generator, 200), size(generator, 300)

    def values(*shape: int) -> Tensor:
        return (integers(generator, -1, 1, *shape).double() if exact else normal(generator, *shape)).to(dtype)

    tensors: Tensors = {"x": values(rows, K), "weight": values(N, K)}
    tensors["bias"] = values(N) if generator.random() < 0.5 else None
    return Sample(dtype, {}, tensors, (), generator.getrandbits(31), exact, ("x",))


def _call(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    return (fastlm.linear(t["x"], t["weight"], t["bias"]),)


def _stock(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    return (F.linear(t["x"], t["weight"], t["bias"]),)


def _rounding(sample: Sample, t: Tensors, grads: tuple[Tensor, ...]) -> dict[str, Rounding]:
    """Partial sums of K products are rounded on the way, up to the sum of their magnitudes."""
    K = t["x"].shape[1]
    products = largest(t["x"].abs() @ t["weight"].abs().T) + largest(t["bias"])
    return {"output 0": Rounding(largest(_stock(t, sample)[0]), products, K)}


LINEAR = Spec("linear", _draw, _call, _stock, None, _rounding, invariant=True)
