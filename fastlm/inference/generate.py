"""The generation loop: read the prompt once, then one token a step through the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..models.common.cache import KVCache
from . import decoder
from .sampling import check_sampling, sample

if TYPE_CHECKING:
    from ..models import GPT, Llama


def generate(
    model: GPT | Llama,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
) -> Iterator[Tensor]:
    """Continue each row of `tokens`, yielding every new token as it is drawn.

    Generation does not end where the context does. Positions are absolute, so a full cache cannot be
    shifted: the last half context of tokens is read again as a new beginning, which costs one prompt of
    that length for every half context of new tokens. A prompt longer than the context is read from its
    last `context_length` tokens on.

    The model is in evaluation mode until the iterator is exhausted or closed, then as it was. A plain GPT on the CPU
    takes single tokens through `Decoder`, whose copy of the weights is made after the first token.

    Args:
        model: a GPT or a Llama, on any device.
        tokens: (B, T) int64 prompts of one length, T >= 1.
        max_new_tokens: steps at most.
        temperature, top_k, top_p: see `fastlm.inference.sample`.
        seed: makes the draws repeatable and leaves torch's generators alone; None draws from torch's.
        stop_token: ends a row. A finished row goes on yielding it, and the iterator ends when all rows
            are finished.

    Returns:
        An iterator over (B,) int64 tensors, one a step, on the device of the model.

    Raises:
        ConfigError: for a setting out of range.
        ValueError: for tokens of the wrong rank, dtype or range, or an empty prompt.
        CheckpointError: on the first step, if the model's logits are not finite.
    """
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected at least 0")
    vocab_size = model.config.vocab_size
    if stop_token is not None and not 0 <= stop_token < vocab_size:
        raise ConfigError(f"stop_token is {stop_token}, expected an id below the vocabulary of {vocab_size}")
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(f"generate: tokens has shape {tuple(tokens.shape)}, expected (batch, length), not empty")
    device = model.wte.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        return sample(logits, temperature, top_k, top_p, generator)

    return _evaluating(model, _steps(model, tokens.to(device), max_new_tokens, draw, stop_token))


def _evaluating(model: GPT | Llama, steps: Iterator[Tensor]) -> Iterator[Tensor]:
    training = model.training
    model.eval()
    try:
        yield from steps
    finally:
        model.train(training)


def _steps(
    model: GPT | Llama, tokens: Tensor, max_new_tokens: int, draw: Callable[[Tensor], Tensor], stop_token: int | None
) -> Iterator[Tensor]:
    context = model.config.context_length
    window = tokens[:, -context:]  # what the model may look at: never longer than the context
    cache = _make_cache(model, tokens.shape[0], min(context, window.shape[1] + max_new_tokens))
    one_token: decoder.Decoder | None = None
    unread = window
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for step in range(max_new_tokens):
        with torch.inference_mode():
            if cache.length + unread.shape[1] > context:
                cache.clear()
                unread = window = window[:, -max(1, context // 2) :]
            if step == 1 and decoder.unsupported(model, tokens.shape[0]) is None:
                one_token = decoder.Decoder(cast("GPT", model), cache, max_new_tokens >= decoder.STEPS_WORTH_PACKING)
            if one_token is not None and unread.shape[1] == 1:
                logits = one_token.step(unread[:, 0])
            else:
                logits = model.logits(model.hidden(unread, cache)[:, -1])
            if step == 0:
                _check_finite(logits)
            new = draw(logits)
            if stop_token is not None:
                new = torch.where(finished, stop_token, new)
                finished = new == stop_token
            unread = new[:, None]
            window = torch.cat([window, unread], 1)[:, -context:]
        yield new.clone()  # made outside inference mode: an ordinary tensor, which autograd accepts
        if stop_token is not None and finished.all():
            return


def _make_cache(model: GPT | Llama, batch_size: int, max_length: int) -> KVCache:
    weight = model.wte.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    return KVCache(model.config, batch_size, dtype, weight.device, max_length)


def _check_finite(logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise CheckpointError("generate: the model's logits are not finite; do its weights hold NaN?")
