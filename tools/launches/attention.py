"""scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from fastlm.kernels import attention

from . import BF16, FP32, MANY, empty


class Attention(NamedTuple):
    """Features of a call, which choose what is compiled; up to 16 queries split the keys."""

    D: int
    Dv: int | None = None
    dtype: torch.dtype = BF16
    mask: str = ""  # bool, or with its gradient: bias (one for all batches) or whole (one for each)
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    p: float = 0.0
    T: int = 1024
    packed: bool = False


def pair(B: int, f: Attention, p: float | None = None, seed: int = 7) -> None:
    """Forward and backward (forward alone with split keys) of 12 heads in groups of 3."""
    Dv, S = f.Dv or f.D, max(f.T, 1024)
    options = (f.right == 0, 0.125, f.p if p is None else p, seed, f.left, f.right, f.softcap)
    q, out = (empty(B, f.T, 12, size, dtype=f.dtype) for size in (f.D, Dv))
    k, v = (empty(B, S, 4, size, dtype=f.dtype) for size in (f.D, Dv))
    if f.packed:
        q, k, v, out = (x.flatten(0, 1) for x in (q, k, v, out))
        cu, lse = empty(B + 1, dtype=torch.int32), empty(12, B * f.T, dtype=FP32)
        attention.attention_varlen_fwd(q, k, v, cu, cu, *options)
        attention.attention_varlen_bwd(out, lse, q, k, v, cu, cu, out, lse, *options)
        return
    q, k, v, out = (x.transpose(1, 2) for x in (q, k, v, out))
    lse = empty(B, 12, f.T, dtype=FP32)
    masks = {"": None, "bool": empty(B, 1, 1, S, dtype=torch.bool), "bias": empty(12, f.T, S, dtype=f.dtype)[None]}
    masks["whole"] = empty(B, 12, f.T, S, dtype=f.dtype)
    mask = masks[f.mask]
    added = f.mask in ("bias", "whole")
    rest = lse if added else None
    attention.attention_fwd(q, k, v, mask, *options, rest=rest)
    if f.T > 16:
        attention.attention_bwd(out, lse, q, k, v, mask, out, lse, *options, mask_grad=added, rest=rest)


# Every row of every table: with what most models run, and with the features that take the most registers.
CASES = (
    Attention(64, right=0),
    Attention(128, right=0),
    Attention(64, left=100, right=0, softcap=30.0),
    Attention(256, left=100, right=0, softcap=30.0),
    Attention(64, dtype=torch.float16, mask="bias", right=0, p=0.1),
    Attention(64, mask="whole", right=0, softcap=30.0, p=0.1),
    Attention(128, mask="bias", right=0, p=0.1),
    Attention(128, mask="whole", left=100, right=100, softcap=30.0, p=0.1),
    Attention(256, mask="bias", right=0, softcap=30.0, p=0.1),
    Attention(64, dtype=FP32, mask="bias", right=0, p=0.1),
    Attention(128, dtype=FP32, mask="bias", right=0, softcap=30.0, p=0.1),
    Attention(256, dtype=FP32, mask="bias", right=0, p=0.1),
    Attention(128, T=1),
    Attention(256, T=1, mask="bias", right=0, softcap=30.0),
    Attention(256, T=1, dtype=FP32, mask="bool"),
    Attention(128, T=16, mask="bool", p=0.1),
    Attention(256, T=16, mask="bool"),
    Attention(256, T=16, mask="bool", dtype=FP32),
)


def cases() -> Iterator[Callable[[], None]]:
    for features in CASES:
        yield partial(pair, 8, features)
    yield partial(pair, MANY // 256, Attention(64, right=0))
    yield partial(pair, MANY // 256, Attention(128, mask="bias", right=0, p=0.1))
    yield partial(pair, MANY, Attention(128, T=1))


def calls(M: int, p: float, seed: int) -> dict[str, Callable[[], None]]:
    return {
        "attention": partial(pair, 2, Attention(64, left=M, right=0, T=M + 16), p, seed),
        "decode": partial(pair, M, Attention(64, T=1), p, seed),
    }
