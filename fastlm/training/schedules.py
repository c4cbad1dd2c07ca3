"""Learning-rate schedules: pure functions of the step, as a factor of the peak learning rate.

All rise linearly over the warm-up, reaching 1 at `step == warmup_steps`, and never fall below `min_ratio`
afterwards. Steps are counted from 0, so that step k of the warm-up uses (k + 1) / (warmup_steps + 1): the
first step already learns and the step after the warm-up is the first at the peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def constant(step: float, warmup_steps: int, decay_steps: int, min_ratio: float = 0.0) -> float:
    """1 after the warm-up."""
    return _warmup(step, warmup_steps) if step < warmup_steps else 1.0


def linear(step: float, warmup_steps: int, decay_steps: int, min_ratio: float = 0.0) -> float:
    """Falls in a straight line from 1 at the end of the warm-up to `min_ratio` at `decay_steps`."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return 1 - (1 - min_ratio) * _fraction(step, warmup_steps, decay_steps)


def cosine(step: float, warmup_steps: int, decay_steps: int, min_ratio: float = 0.0) -> float:
    """Half a cosine from 1 at the end of the warm-up to `min_ratio` at `decay_steps`.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, eq. 5.
    """
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    fraction = _fraction(step, warmup_steps, decay_steps)
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * fraction)) / 2


def inverse_sqrt(step: float, warmup_steps: int, decay_steps: int, min_ratio: float = 0.0) -> float:
    """sqrt(warmup_steps / step) after the warm-up; `decay_steps` plays no part.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 5.3, scaled to a peak of 1.
    """
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return max(min_ratio, math.sqrt(max(1, warmup_steps) / max(1, step)))


SCHEDULES: dict[str, Callable[[float, int, int, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
}


def _warmup(step: float, warmup_steps: int) -> float:
    return (step + 1) / (warmup_steps + 1)


def _fraction(step: float, warmup_steps: int, decay_steps: int) -> float:
    """How much of the decay lies behind `step`, from 0 to 1; a decay of no length is over at once."""
    if step >= decay_steps:
        return 1.0
    return max(0.0, (step - warmup_steps) / (decay_steps - warmup_steps))
