"""rms_norm and add_rms_norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastlm.kernels import rms_norm

from . import BF16, FP32, MANY, empty
from ._norms import sizes


def pair(M: int, N: int, full: bool, dtype: torch.dtype = BF16) -> None:
    x, w, stream, rstd = empty(M, N, dtype=dtype), empty(N), empty(M, N, dtype=FP32), empty(M, dtype=FP32)
    if full:
        rms_norm.rms_norm_fwd(x, stream, w, N, 1e-5)
        rms_norm.rms_norm_bwd(stream, stream, w, rstd, N, stream, dtype)
    else:
        rms_norm.rms_norm_fwd(x, None, w, N, 1e-5)
        rms_norm.rms_norm_bwd(x, x, w, rstd, N)


def cases() -> Iterator[Callable[[], None]]:
    for N, full in sizes():
        yield partial(pair, 4096, N, full)
    yield partial(pair, MANY, 4096, True)
    # without 16-byte loads, and with the most bytes a row
    yield partial(pair, 4096, 4095, True)
    yield partial(pair, 4096, 8191, False)
    yield partial(pair, 4096, 16383, True)
    yield partial(pair, 4096, 8192, False, FP32)
    yield partial(pair, 4096, 16384, False, FP32)


def calls(M: int, p: float, seed: int) -> dict[str, Callable[[], None]]:
    return {"rms_norm": partial(pair, M, 768, True)}
