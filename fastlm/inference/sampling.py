"""Choosing the next token from its logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError

# Sorting the 50257 probabilities of GPT-2 took 2.7 ms on one core, their 1024 largest 0.3 ms; these nearly
# always hold the mass that top_p asks for.
HEAD = 1024


class Cuts(NamedTuple):
    """Rarer ways to leave out unlikely ids, applied in this order after top_k and top_p; see transformers' warpers."""

    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon: float = 0.0
    eta: float = 0.0


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    cuts: Cuts | None = None,
) -> Tensor:
    """Draw one id a row.

    Args:
        logits: (B, V), any floating dtype; probabilities are computed in fp32.
        temperature: divides the logits; 0 takes the likeliest id.
        top_k: draw from the k likeliest ids only.
        top_p: draw from the smallest set of likeliest ids whose probability reaches `top_p`, at least one
            (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"). Probabilities are
            those after `temperature` and `top_k`.
        generator: source of the draws, on the device of `logits`; None means torch's default one.
        cuts: further ids to leave out.

    Returns:
        (B,) int64.

    Raises:
        ConfigError: for a negative or infinite temperature, top_k below 1, or top_p outside (0, 1].
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = candidates(logits, temperature, top_k, top_p)
    if cuts is not None and cuts != Cuts():
        probabilities = cut(probabilities, cuts)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)


def candidates(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor | None]:
    """Weights of the ids that may be drawn, and these ids, likeliest first; None means all, in order."""
    logits, ids = logits.float(), None
    if top_k is not None:
        logits, ids = logits.topk(min(top_k, logits.shape[-1]))
    # The maximum goes first, so that a temperature near 0 gives weights of 0 and 1 rather than inf - inf.
    scaled = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
    probabilities = scaled.softmax(-1)
    if top_p is not None and top_p < 1:
        if ids is None:
            probabilities, ids = _likeliest(probabilities, top_p)
        ahead = probabilities.cumsum(-1) - probabilities  # exactly 0 for the first, which thus stays
        probabilities = probabilities.masked_fill(ahead >= top_p, 0)
    return probabilities, ids


def cut(probabilities: Tensor, cuts: Cuts) -> Tensor:
    """Weights (B, V) with those at 0 that `cuts` leave out; the likeliest id stays.

    min_p: Nguyen et al. 2024. Typical: Meister et al. 2022. Epsilon and eta: Hewitt et al. 2022.
    """
    p = probabilities / probabilities.sum(-1, keepdim=True)
    if cuts.min_p:
        p = _keep(p, p >= cuts.min_p * p.amax(-1, keepdim=True))
    if cuts.typical_p < 1:
        surprise = -p.log()
        distance = (surprise - _entropy(p)).abs()
        ordered, order = distance.sort(-1)
        last = (p.gather(-1, order).cumsum(-1) < cuts.typical_p).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
        p = _keep(p, distance <= ordered.gather(-1, last))
    likeliest = p == p.amax(-1, keepdim=True)
    if cuts.epsilon:
        p = _keep(p, (p >= cuts.epsilon) | likeliest)
    if cuts.eta:
        p = _keep(p, (p >= torch.exp(-_entropy(p)).mul(cuts.eta**0.5).clamp(max=cuts.eta)) | likeliest)
    return p


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1, keepdim=True)


def _keep(p: Tensor, kept: Tensor) -> Tensor:
    p = p.masked_fill(~kept, 0)
    return p / p.sum(-1, keepdim=True)


def _likeliest(probabilities: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The likeliest ids of each row in order, as many as surely hold `mass`, and their probabilities."""
    V = probabilities.shape[-1]
    if V > HEAD:
        head, ids = probabilities.topk(HEAD)
        if head.sum(-1).min() > mass:
            return head, ids
    return probabilities.topk(V)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ConfigError for settings that `sample` cannot follow."""
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature is {temperature}, expected a finite number of at least 0")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}, expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}, expected a number in (0, 1]")
