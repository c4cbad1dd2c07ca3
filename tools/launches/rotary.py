"""rotary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastlm.kernels import rotary

from . import BF16, FP32, MANY, empty


def both(L: int, D: int, R: int, dtype: torch.dtype = BF16) -> None:
    cos = empty(L, R, dtype=FP32)
    for interleaved in (False, True):
        rotary.rotary(empty(4, L, 12, D, dtype=dtype).transpose(1, 2), cos, cos, interleaved, False)


def cases() -> Iterator[Callable[[], None]]:
    yield partial(both, 1024, 128, 64)
    yield partial(both, 1024, 80, 16, FP32)
    yield partial(both, MANY, 128, 64)


def calls(M: int, p: float, seed: int) -> dict[str, Callable[[], None]]:
    return {"rotary": partial(both, M, 64, 32)}
