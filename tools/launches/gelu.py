"""gelu and bias_gelu."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastlm.kernels import gelu

from . import BF16, FP32, MANY, empty


def pair(M: int, N: int, full: bool, tanh: bool, dtype: torch.dtype = BF16, p: float = 0.1, seed: int = 5) -> None:
    x, bias = empty(M, N, dtype=dtype), empty(N) if full else None
    p = p if full else 0.0
    gelu.gelu_fwd(x, bias, tanh, p, seed)
    gelu.gelu_bwd(x, x, bias, tanh, p, seed)


def cases() -> Iterator[Callable[[], None]]:
    for full in (False, True):
        for tanh in (False, True):
            yield partial(pair, 4096, 3072, full, tanh)
        yield partial(pair, MANY, 3072, full, True)
    yield partial(pair, 4096, 3071, True, False, FP32)


def calls(M: int, p: float, seed: int) -> dict[str, Callable[[], None]]:
    return {"bias_gelu": partial(pair, M, 768, True, True, p=p, seed=seed)}
