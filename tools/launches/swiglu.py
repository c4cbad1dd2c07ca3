"""swiglu."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastlm.kernels import swiglu

from . import BF16, FP32, MANY, empty


def pair(M: int, N: int, dtype: torch.dtype = BF16) -> None:
    gate, up = empty(M, 2 * N, dtype=dtype).chunk(2, -1)
    swiglu.swiglu_fwd(gate, up)
    swiglu.swiglu_bwd(empty(M, N, dtype=dtype), gate, up)


def cases() -> Iterator[Callable[[], None]]:
    yield partial(pair, 4096, 11008)
    yield partial(pair, 4096, 2731, FP32)
    yield partial(pair, MANY, 11008)


def calls(M: int, p: float, seed: int) -> dict[str, Callable[[], None]]:
    return {"swiglu": partial(pair, M, 768)}
