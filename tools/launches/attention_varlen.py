"""attention_varlen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from .attention import Attention, pair


def cases() -> Iterator[Callable[[], None]]:
    yield partial(pair, 8, Attention(80, 128, left=100, right=100, softcap=30.0, packed=True))


def calls(M: int, p: float, seed: int) -> dict[str, Callable[[], None]]:
    return {"attention_varlen": partial(pair, M, Attention(64, packed=True, right=0), p, seed)}
