"""attention_varlen under `fastlm verify`: each sequence's truth is that of scaled_dot_product_attention."""

from __future__ import annotations

import random

import torch
from torch import Tensor

import fastlm

from .attention import attend, attention_rounding, stock_attention, window_and_cap
from .op import Rounding, Sample, Spec, Tensors, integers, normal, size


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _draw(generator: random.Random, dtype: torch.dtype, exact: bool) -> Sample:
    B = generator.randint(1, 4)
    kv_heads, group = generator.randint(1, 2), generator.choice((1, 1, 2, 3))
    queries = [0 if generator.random() < 0.1 else size(generator, 20 if exact else 90) for _ in range(B)]
    keys = [2 ** generator.randint(0, 4) for _ in range(B)] if exact else [size(generator, 90) for _ in range(B)]
    if not exact and generator.random() < 0.5:
        keys = queries
    D = generator.randint(1, 16) if exact else generator.choice((64, 64, 128, 80, size(generator, 256)))
    shapes = (sum(queries), kv_heads * group, D), (sum(keys), kv_heads, D)
    tensors: Tensors = {
        "query": torch.zeros(shapes[0]) if exact else normal(generator, *shapes[0]),
        "key": integers(generator, -2, 2, *shapes[1]) if exact else normal(generator, *shapes[1]),
        "value": integers(generator, -2, 2, *shapes[1]) if exact else normal(generator, *shapes[1]),
    }
    tensors = {n: t.to(dtype) for n, t in tensors.items()}
    tensors |= {"cu_seqlens_q": _offsets(queries), "cu_seqlens_k": None if keys is queries else _offsets(keys)}
    settings = {
        "is_causal": not exact and generator.random() < 0.5,
        "scale": 0.5 if exact else generator.choice((None, None, 0.3)),
        "dropout_p": 0.0 if exact else generator.choice((0.0, 0.0, 0.0, 0.2)),
        **({} if exact else window_and_cap(generator, max(1, *queries, *keys))),
    }
    # As for scaled_dot_product_attention, the backward pass is exact for single keys alone.
    differentiable = ("query", "key", "value") if not exact or max(keys) == 1 else ()
    return Sample(dtype, settings, tensors, differentiable, generator.getrandbits(31), exact)


def _call(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    out = fastlm.attention_varlen(
        t["query"], t["key"], t["value"], t["cu_seqlens_q"], t["cu_seqlens_k"], **sample.settings
    )
    assert isinstance(out, Tensor)  # return_lse is off
    return (out,)


def _sequences(t: Tensors, rows: Tensor) -> list[tuple[Tensors, Tensor]]:
    """What scaled_dot_product_attention would be given for each sequence, and its part of `rows` (Tq, H, ...)."""
    first_q = t["cu_seqlens_q"].tolist()
    first_k = first_q if t["cu_seqlens_k"] is None else t["cu_seqlens_k"].tolist()

    def part(x: Tensor, first: list[int], b: int) -> Tensor:
        return x[first[b] : first[b + 1]].transpose(0, 1)[None]

    return [
        (
            {
                "query": part(t["query"], first_q, b),
                "key": part(t["key"], first_k, b),
                "value": part(t["value"], first_k, b),
                "attn_mask": None,
            },
            part(rows, first_q, b),
        )
        for b in range(len(first_q) - 1)
    ]


def _packed(outputs: list[Tensor]) -> tuple[Tensor, ...]:
    return (torch.cat([out[0].transpose(0, 1) for out in outputs]),)


def _stock(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    s = sample.settings
    if s["dropout_p"] or s.get("softcap"):
        return ()  # as for scaled_dot_product_attention
    return _packed(
        [stock_attention(p["query"], p["key"], p["value"], None, s, True) for p, _ in _sequences(t, t["query"])],
    )


def _truth(t: Tensors, sample: Sample) -> tuple[Tensor, ...]:
    if sample.settings["dropout_p"]:  # only the reference knows the mask
        with fastlm.backend("reference"):
            return _call(t, sample)
    return _packed([attend(p, sample) for p, _ in _sequences(t, t["query"])])


def _rounding(sample: Sample, t: Tensors, grads: tuple[Tensor, ...]) -> dict[str, Rounding]:
    """The largest of any sequence's."""
    found: dict[str, Rounding] = {}
    for tensors, grad in _sequences(t, grads[0]):
        for name, extra in attention_rounding(sample, tensors, (grad,)).items():
            before = found.get(name, Rounding())
            found[name] = Rounding(
                max(before.stored, extra.stored), max(before.summed, extra.summed), max(before.size, extra.size)
            )
    return found


ATTENTION_VARLEN = Spec("attention_varlen", _draw, _call, _stock, _truth, _rounding)
