"""cross_entropy, and what of it linear_cross_entropy calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastlm.kernels import cross_entropy

from . import BF16, FP32, MANY, empty


def pair(M: int, N: int, full: bool, dtype: torch.dtype = BF16, ignore_index: int = -100) -> None:
    """With the gradient in the forward pass and after it; or, `full`, weighted, smoothed and in windows."""
    x, target, one = empty(M, N, dtype=dtype), empty(M, dtype=torch.int64), empty(dtype=FP32)
    if full:
        w, states, rows = empty(N), empty(M, 5, dtype=FP32), empty(M, dtype=FP32)
        cross_entropy.cross_entropy_fwd(x, target, w, ignore_index, 0.1, 0.5)
        cross_entropy.cross_entropy_update(x, target, w, states, 2048, 2 * N, ignore_index, 0.1)
        cross_entropy.cross_entropy_finish(states, target, w, N, ignore_index, 0.1)
        cross_entropy.cross_entropy_bwd(x, target, w, empty(M, 3, dtype=FP32), rows, ignore_index, 0.1, x, 2048, 2 * N)
    else:
        cross_entropy.cross_entropy_fwd(x, target, None, ignore_index, 0.0, one)
        stats = empty(M, 3, dtype=FP32)
        cross_entropy.cross_entropy_bwd(x, target, None, stats, one, ignore_index, 0.0, x, unless=(one, 1.0))


def cases() -> Iterator[Callable[[], None]]:
    for full in (False, True):
        for N in (1024, 50304):
            yield partial(pair, 4096, N, full)
        yield partial(pair, MANY, 50304, full)
    yield partial(pair, 4096, 50257, False)
    yield partial(pair, 4096, 50257, True, FP32)


def calls(M: int, p: float, seed: int) -> dict[str, Callable[[], None]]:
    return {"cross_entropy": partial(pair, M, 50257, True, ignore_index=seed)}
