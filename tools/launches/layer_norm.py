"""layer_norm and add_layer_norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastlm.kernels import layer_norm

from . import BF16, FP32, MANY, empty
from ._norms import sizes


def pair(M: int, N: int, full: bool, dtype: torch.dtype = BF16, p: float = 0.1, seed: int = 7) -> None:
    """Forward and backward: plain, or with an fp32 residual stream, dropout and every optional tensor."""
    x, w, b, rows = empty(M, N, dtype=dtype), empty(N), empty(N), empty(M, dtype=FP32)
    stream = empty(M, N, dtype=FP32)
    if full:
        layer_norm.layer_norm_fwd(x, stream, w, b, N, 1e-5, p, seed)
        layer_norm.layer_norm_bwd(stream, stream, w, rows, rows, N, stream, p, seed, dtype)
    else:
        layer_norm.layer_norm_fwd(x, None, w, b, N, 1e-5)
        layer_norm.layer_norm_bwd(x, x, w, rows, rows, N)


def cases() -> Iterator[Callable[[], None]]:
    for N, full in sizes():
        yield partial(pair, 4096, N, full)
    yield partial(pair, MANY, 4096, True)
    # without 16-byte loads, and with the most bytes a row
    yield partial(pair, 4096, 8191, True)
    yield partial(pair, 4096, 4095, True)
    yield partial(pair, 4096, 16383, True)
    yield partial(pair, 4096, 8191, False)
    yield partial(pair, 4096, 8192, True, p=0.0)
    yield partial(pair, 4096, 8192, False, FP32)
    yield partial(pair, 4096, 8192, True, FP32, p=0.0)
    yield partial(pair, 4096, 16384, False, FP32)


def calls(M: int, p: float, seed: int) -> dict[str, Callable[[], None]]:
    return {
        "layer_norm": partial(pair, M, 768, True, p=p, seed=seed),
        "wide layer_norm": partial(pair, M, 65536, True, p=p, seed=seed),
    }
