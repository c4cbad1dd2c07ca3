"""scaled_dot_product_attention under `fastlm verify`."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm

from .op import Rounding, Sample, Spec, Tensors, integers, largest, normal, size


def _mask(generator: random.Random, B: int, H: int, T: int, S: int) -> Tensor | None:
    """None, or a boolean or additive mask in any shape that broadcasts; some rows are masked altogether."""
    kind = generator.choice(("none", "none", "boolean", "additive"))
    if kind == "none":
        return None
    shape = generator.choice(((T, S), (B, 1, T, S), (1, H, T, S), (B, H, T, S), (B, 1, 1, S)))
    if kind == "additive":
        return normal(generator, *shape)
    mask = integers(generator, 0, 3, *shape) > 0
    if generator.random() < 0.3:
        mask[..., generator.randrange(mask.shape[-2]), :] = False
    return mask


def _draw(generator: random.Random, dtype: torch.dtype, exact: bool) -> Sample:
    B = 0 if generator.random() < 0.04 else generator.randint(1, 3)
    kv_heads, group = generator.randint(1, 3), generator.choice((1, 1, 2, 3))
    H = kv_heads * group
    if exact:
        return _exact(generator, dtype, B, kv_heads, group)
    T, S = size(generator, 90), size(generator, 90)
    D = generator.choice((64, 64, 128, 80, size(generator, 256)))
    tensors: Tensors = {
        "query": normal(generator, B, H, T, D),
        "key": normal(generator, B, kv_heads, S, D),
        "value": normal(generator, B, kv_heads, S, D),
        "attn_mask": _mask(generator, B, H, T, S),
    }
    mask = tensors["attn_mask"]
    if mask is None:  # scores of up to thousands, where weights come back from large numbers
        tensors["query"] *= generator.choice((1, 1, 1, 5, 50, 500))
    tensors = {n: t.to(dtype) if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
    settings = {
        "is_causal": mask is None and generator.random() < 0.5,
        "scale": generator.choice((None, None, 0.3)),
        "enable_gqa": group > 1,
        "dropout_p": generator.choice((0.0, 0.0, 0.0, 0.2)),
        **window_and_cap(generator, max(T, S)),
    }
    learned = mask is not None and mask.is_floating_point() and mask.shape == (B, H, T, S)
    differentiable = ("query", "key", "value") + (("attn_mask",) if learned else ())
    per_batch = mask is not None and mask.dim() == 4 and mask.shape[0] == B and B > 1
    rows = ("query", "key", "value") + (("attn_mask",) if per_batch else ())
    rows = () if settings["dropout_p"] else rows
    return Sample(dtype, settings, tensors, differentiable, generator.getrandbits(31), False, rows)


def window_and_cap(generator: random.Random, length: int) -> dict:
    """A window and a soft cap, mostly none."""
    sides = [generator.choice((None, 0, generator.randint(0, length))) for _ in range(2)]
    return {
        "window": generator.choice((None, None, tuple(sides))),
        "softcap": generator.choice((None, None, None, 1.5)),
    }


def _exact(generator: random.Random, dtype: torch.dtype, B: int, kv_heads: int, group: int) -> Sample:
    """A zero query weighs 2^k keys alike, so that weights and outputs are sums of small binary fractions."""
    T, S, D = size(generator, 20), 2 ** generator.randint(0, 4), generator.randint(1, 16)
    tensors: Tensors = {
        "query": torch.zeros(B, kv_heads * group, T, D, dtype=dtype),
        "key": integers(generator, -2, 2, B, kv_heads, S, D).to(dtype),
        "value": integers(generator, -2, 2, B, kv_heads, S, D).to(dtype),
        "attn_mask": None,
    }
    settings = {"is_causal": False, "scale": 0.5, "enable_gqa": group > 1, "dropout_p": 0.0}
    # The backward pass takes the weights from their logarithm, which is exact for a single key alone.
    differentiable = ("query", "key", "value") if S == 1 else ()
    return Sample(dtype, settings, tensors, differentiable, generator.getrandbits(31), True, ("query", "key", "value"))


def _call(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    out = fastlm.scaled_dot_product_attention(t["query"], t["key"], t["value"], t["attn_mask"], **sample.settings)
    assert isinstance(out, Tensor)  # return_lse is off
    return (out,)


def visible(T: int, S: int, settings: dict) -> Tensor | None:
    """(T, S): which keys each query may attend by window and causality; None for all."""
    left, right = settings.get("window") or (None, None)
    right = 0 if settings["is_causal"] else right
    if left is None and right is None:
        return None
    ahead = torch.arange(S) - torch.arange(T)[:, None]
    return (ahead >= -(S + T if left is None else left)) & (ahead <= (S if right is None else right))


def stock_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: dict, gqa: bool) -> Tensor:
    """PyTorch's operator, its mask cut to the window."""
    causal = settings["is_causal"] and settings.get("window") is None
    seen = None if causal else visible(q.shape[-2], k.shape[-2], settings)
    if seen is not None:
        boolean = mask is None or mask.dtype == torch.bool
        mask = seen if mask is None else mask & seen if boolean else mask.masked_fill(~seen, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=settings["scale"], enable_gqa=gqa)


def _has_stock(sample: Sample) -> bool:
    """Whether PyTorch computes the same: it draws another mask for dropout, and has no soft cap."""
    return not (sample.settings["dropout_p"] or sample.settings.get("softcap"))


def _stock(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    s = sample.settings
    if not _has_stock(sample):
        return ()
    return (stock_attention(t["query"], t["key"], t["value"], t["attn_mask"], s, s["enable_gqa"]),)


def _heads(t: Tensors) -> tuple[Tensor, Tensor]:
    """Keys and values, one head for each head of the query."""
    H, kv_heads = t["query"].shape[1], t["key"].shape[1]
    return tuple(t[name].repeat_interleave(H // kv_heads, 1) for name in ("key", "value"))


def _weights(t: Tensors, sample: Sample) -> Tensor:
    """The softmax of the scores under mask and window, and 0 where every key is closed."""
    q, mask, scale = t["query"], t["attn_mask"], sample.settings["scale"]
    keys, _ = _heads(t)
    scores = q @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    softcap = sample.settings.get("softcap")
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = visible(scores.shape[-2], scores.shape[-1], sample.settings)
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask if allowed is None else mask & allowed
    elif mask is not None:
        scores = scores + mask
    if allowed is None:
        return scores.softmax(-1)
    dead = ~allowed.any(-1, keepdim=True)
    return scores.masked_fill(~allowed, float("-inf")).masked_fill(dead, 0).softmax(-1).masked_fill(~allowed, 0)


def attend(t: Tensors, sample: Sample) -> Tensor:
    """Attention without dropout, by its definition."""
    return _weights(t, sample) @ _heads(t)[1]


def _truth(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    if sample.settings["dropout_p"]:  # only the reference knows the mask
        with fastlm.backend("reference"):
            return _call(t, sample)
    return (attend(t, sample),)


def attention_rounding(sample: Sample, t: Tensors, grads: tuple[Tensor, ...]) -> dict[str, Rounding]:
    """Weights and their gradients may be rounded to the storage dtype before the second product.

    A score's rounding counts as many times as it is large where PyTorch has nothing to compare with, and in 16 bits; in
    fp32 a kernel makes the gradients from the very scores of its forward pass, as PyTorch's does.
    """
    if not t["query"].numel() or not t["key"].numel():
        return {}
    q, do = t["query"], grads[0]
    keys, values = _heads(t)
    T, S, D = q.shape[-2], keys.shape[-2], q.shape[-1]
    scale = D**-0.5 if sample.settings["scale"] is None else sample.settings["scale"]
    weights = _weights(t, sample)
    kept = 1 / (1 - sample.settings["dropout_p"])
    column = float(weights.sum(-2).max()) * keys.shape[1] / t["key"].shape[1] * kept
    scores = 1 + scale * largest(q @ keys.transpose(-1, -2)) + largest(_additive(t))
    if sample.dtype is torch.float32 and _has_stock(sample):
        scores = 1.0
    v = largest(values) * kept
    dp = 2 * largest(do @ values.transpose(-1, -2)) * kept
    return {
        "output 0": Rounding(v, v * scores, S + D),
        "dvalue": Rounding(largest(do) * column, largest(do) * column * scores, T + D),
        "dquery": Rounding(scale * dp * largest(keys), scale * dp * largest(keys) * scores, S + D),
        "dkey": Rounding(scale * dp * largest(q) * column, scale * dp * largest(q) * column * scores, T + D),
        "dattn_mask": Rounding(dp, dp * scores, S + D),
    }


def _additive(t: Tensors) -> Tensor | None:
    """The additive mask, if there is one."""
    mask = t["attn_mask"]
    return mask if mask is not None and mask.is_floating_point() else None


ATTENTION = Spec("scaled_dot_product_attention", _draw, _call, _stock, _truth, attention_rounding)
