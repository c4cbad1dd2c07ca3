"""linear_cross_entropy: the kernels of cross_entropy, window by window."""

from __future__ import annotations

from collections.abc import Callable

from .cross_entropy import cases as cases


def calls(M: int, p: float, seed: int) -> dict[str, Callable[[], None]]:
    return {}  # cross_entropy's are the same
