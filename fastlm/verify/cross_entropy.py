"""cross_entropy under `fastlm verify`, and what it shares with linear_cross_entropy."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from .op import Rounding, Sample, Spec, Tensors, integers, largest, normal, size

GAP = 1024.0  # between the likeliest logit and the others: their weights underflow to 0, in fp64 too


def _target(generator: random.Random, N: int, V: int, ignored: int, mean: bool) -> Tensor:
    target = integers(generator, 0, V - 1, N)
    if generator.random() < 0.5:
        target[integers(generator, 0, 3, N) == 0] = ignored
    if mean:
        target[0] = generator.randrange(V)  # with nothing to average the mean is NaN
    return target


Draw = Callable[[random.Random, torch.dtype, bool, int, int], Tensors]  # (..., rows, classes) -> what has gradients


def draw_loss(generator: random.Random, dtype: torch.dtype, exact: bool, draw: Draw) -> Sample:
    reduction = generator.choice(("none", "sum") if exact else ("none", "sum", "mean", "mean"))
    empty = reduction != "mean" and generator.random() < 0.05
    N = 0 if empty else size(generator, 40)
    V = size(generator, generator.choice((64, 600, 3000))) + 1
    # An id that is no class, or one that is.
    ignored = generator.choice((-100, -100, -1, generator.randrange(V)))
    settings = {
        "ignore_index": ignored,
        "reduction": reduction,
        "label_smoothing": 0.0 if exact else generator.choice((0.0, 0.0, 0.1)),
    }
    target = _target(generator, N, V, ignored, reduction == "mean" and ignored < 0)
    if reduction == "mean" and ignored >= 0:
        target[0] = (ignored + 1) % V
    weight = None if exact or generator.random() < 0.7 else (normal(generator, V).abs() + 0.1).to(dtype)
    tensors = draw(generator, dtype, exact, N, V)
    differentiable = tuple(name for name, t in tensors.items() if t is not None)
    # Where rows are summed into one number, a row alone is another call.
    rows = (next(iter(tensors)), "target") if reduction == "none" else ()
    tensors |= {"target": target, "class_weight": weight}
    return Sample(dtype, settings, tensors, differentiable, generator.getrandbits(31), exact, rows)


def _logits_alone(generator: random.Random, dtype: torch.dtype, exact: bool, N: int, V: int) -> Tensors:
    likeliest = integers(generator, 0, V - 1, N)
    logits = F.one_hot(likeliest, V) * GAP if exact else normal(generator, N, V) * generator.choice((1, 4))
    return {"input": logits.to(dtype)}


def _call(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    return (fastlm.cross_entropy(t["input"], t["target"], t["class_weight"], **sample.settings),)


def _logits(t: Tensors) -> Tensor:
    return F.linear(t["hidden"], t["weight"], t["bias"]) if "hidden" in t else t["input"]


def stock(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    return (F.cross_entropy(_logits(t), t["target"], t["class_weight"], **sample.settings),)


def rounding(sample: Sample, t: Tensors, grads: tuple[Tensor, ...]) -> dict[str, Rounding]:
    """Logits may be rounded before the softmax, and their gradients before the products with them."""
    with torch.no_grad():
        logits = _logits(t)
    N, V = logits.shape
    if not N:
        return {}
    top = 1 + 2 * largest(logits)
    weight = largest(t["class_weight"]) or 1.0
    each = largest(grads[0]) * weight
    if sample.settings["reduction"] == "mean":
        counted = t["target"][t["target"] != sample.settings["ignore_index"]]
        each /= float(t["class_weight"][counted].sum()) if t["class_weight"] is not None else len(counted)
    rows = N if sample.settings["reduction"] == "sum" else 1
    found = {"output 0": Rounding(top * weight * rows, top * weight * rows, V + N)}
    if "input" in t:
        return found | {"dinput": Rounding(0.0, each * top, V)}
    h, w, K = largest(t["hidden"]), largest(t["weight"]), t["hidden"].shape[1]
    # A row of the logits' gradient sums to at most 2 each in magnitude.
    return found | {
        "dhidden": Rounding(2 * each * top * w, 2 * each * top * w * K**0.5, V + K),
        "dweight": Rounding(each * top * h * N, each * top * h * N, N + V + K),
        "dbias": Rounding(each * top * N, each * top * N, N + V + K),
    }


CROSS_ENTROPY = Spec("cross_entropy", lambda g, d, e: draw_loss(g, d, e, _logits_alone), _call, stock, None, rounding)
