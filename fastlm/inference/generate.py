"""The generation loop: read the prompt once, then one token a step through the cache."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from .._core.dispatch import autocast_dtype
from ..errors import CheckpointError, ConfigError, shown
from ..models.common.cache import KVCache
from ..models.common.generation import FEW_TOKENS, Generation, generation_of
from . import decoder
from .logits import Span, apply, processors
from .modes import evaluate_again, evaluating
from .sampling import Cuts, check_sampling, sample

if TYPE_CHECKING:
    from ..models import GPT, CausalLM


def generate(
    model: CausalLM,
    tokens: Tensor,
    max_new_tokens: int | None = None,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | Iterable[int] | Literal["folder"] | None = None,
) -> Generator[Tensor, None, None]:
    """Continue each row of `tokens`, yielding every new token as it is drawn.

    Generation does not end where the context does. Positions are absolute, so a full cache cannot be
    shifted: the last half context of tokens is read again as a new beginning, which costs one prompt of
    that length for every half context of new tokens. A prompt longer than the context is read from its
    last `context_length` tokens on.

    The model is in evaluation mode until its last open iterator is exhausted or closed, then as it was. A plain GPT on
    the CPU takes single tokens through `Decoder`, whose copy of the weights is made after the first token.

    What the folder of a loaded model says (`model.generation`) holds where an argument is None: with transformers'
    meaning and defaults, so that a folder which speaks of sampling without `do_sample` means the likeliest tokens. Its
    penalties, forbidden and forced tokens and shortest lengths always hold. What is said and cannot be followed, such
    as several beams, is listed in one UserWarning.

    Args:
        model: one that continues text, such as a GPT or a Llama, on any device.
        tokens: (B, T) int64 prompts of one length, T >= 1.
        max_new_tokens: steps at most; None takes the folder's, or else 20.
        temperature, top_k, top_p: see `fastlm.inference.sample`; a folder that says nothing leaves a temperature of 1.
        seed: makes the draws repeatable and leaves torch's generators alone; None draws from torch's.
        stop_token: one id or several, each of which ends a row; "folder" stands for those that the folder names. A
            finished row goes on yielding its last token, and the iterator ends when all rows are finished. None
            goes on to max_new_tokens.

    Returns:
        An iterator over (B,) int64 tensors, one a step, on the device of the model.

    Raises:
        ConfigError: for a setting out of range.
        ValueError: for tokens of the wrong rank, dtype or range, or an empty prompt.
        CheckpointError: on the first step, if the model's logits are not finite.
    """
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed is {shown(seed)}, expected an integer of 64 bits")
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(f"generate: tokens has shape {tuple(tokens.shape)}, expected (batch, length), not empty")
    said = generation_of(model)
    steps = _length(said, tokens.shape[1], max_new_tokens)
    temperature, top_k, top_p, cuts = _sampling(said, temperature, top_k, top_p)
    check_sampling(temperature, top_k, top_p)
    ends = _ends(said, model.config.vocab_size, stop_token)
    device = model.wte.weight.device
    tokens = tokens.to(device)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    span = Span(tokens.shape[1], tokens.shape[1] + steps)
    changes = processors(said.settings, ends or said.ends(model.config.vocab_size), span)
    said.warn_of_unfollowed("generate", num_beams=(1,))
    history = [tokens]  # the processors' alone: it has no other reader

    def draw(logits: Tensor) -> Tensor:
        if changes:
            logits = apply(changes, torch.cat(history, 1), logits.float())
            if (logits == -torch.inf).all(-1).any():
                raise ConfigError(f"generate: {said.source} forbids every token")
        return sample(logits, temperature, top_k, top_p, generator, cuts)

    def note(new: Tensor) -> None:
        if changes:
            history.append(new)

    return _evaluating(model, _steps(model, tokens, steps, draw, note, tokens.new_tensor(ends)))


def _length(said: Generation, prompt_length: int, max_new_tokens: int | None) -> int:
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected at least 0")
    if max_new_tokens is None:
        max_new_tokens = said.settings.new_tokens(prompt_length)
    if max_new_tokens is None:
        return FEW_TOKENS
    if max_new_tokens < 0:
        raise ConfigError(
            f"the prompt has {prompt_length} tokens, more than the max_length of {said.settings.max_length} that "
            f"{said.source} says; give max_new_tokens"
        )
    return max_new_tokens


def _sampling(
    said: Generation, temperature: float | None, top_k: int | None, top_p: float | None
) -> tuple[float, int | None, float | None, Cuts]:
    """The settings of `sample`: those given, then the folder's, then its defaults if it speaks of sampling at all."""
    s = said.settings
    if not said.speaks_of_sampling:
        return 1.0 if temperature is None else temperature, top_k, top_p, Cuts()
    if temperature is None:
        temperature = s.temperature if s.do_sample or top_k is not None or top_p is not None else 0.0
    cuts = Cuts(s.min_p, s.typical_p, s.epsilon_cutoff, s.eta_cutoff)
    return temperature, (s.top_k or None) if top_k is None else top_k, s.top_p if top_p is None else top_p, cuts


def _ends(said: Generation, vocab_size: int, stop_token: int | Iterable[int] | str | None) -> list[int]:
    if stop_token == "folder":
        return list(said.ends(vocab_size))
    ends = [] if stop_token is None else [stop_token] if isinstance(stop_token, int) else list(stop_token)
    for token in ends:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ConfigError(f"stop_token is {token}, expected an id below the vocabulary of {vocab_size}")
    return ends  # type: ignore[return-value]


def _evaluating(model: CausalLM, steps: Iterator[Tensor]) -> Generator[Tensor, None, None]:
    with evaluating(model):
        yield from steps


def _steps(
    model: CausalLM,
    tokens: Tensor,
    max_new_tokens: int,
    draw: Callable[[Tensor], Tensor],
    note: Callable[[Tensor], None],
    ends: Tensor,
) -> Iterator[Tensor]:
    context = model.config.context_length
    window = tokens[:, -context:]  # what the model may look at: never longer than the context
    cache = _make_cache(model, tokens.shape[0], max(1, min(context, window.shape[1] + max_new_tokens)))
    one_token: decoder.Decoder | None = None
    unread = window
    new = tokens[:, -1]
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for step in range(max_new_tokens):
        evaluate_again(model)
        with torch.inference_mode():
            length = cache.length + unread.shape[1]
            if length > context:
                cache.clear()
                unread = window = window[:, -max(1, context // 2) :]
            elif cache.length and model.outgrows(cache.length, length):
                cache.clear()
                unread = window
            if step == 1 and decoder.unsupported(model, tokens.shape[0]) is None:
                one_token = decoder.Decoder(cast("GPT", model), cache, max_new_tokens >= decoder.STEPS_WORTH_PACKING)
            if one_token is not None and unread.shape[1] == 1:
                logits = one_token.step(unread[:, 0])
            else:
                logits = model.logits(model.hidden(unread, cache)[:, -1])
            if step == 0:
                _check_finite(logits)
            drawn = draw(logits)
            new = torch.where(finished, new, drawn) if ends.numel() else drawn
            if ends.numel():
                finished = torch.isin(new, ends)
            unread = new[:, None]
            note(unread)
            window = torch.cat([window, unread], 1)[:, -context:]
        yield new.clone()  # made outside inference mode: an ordinary tensor, which autograd accepts
        if ends.numel() and finished.all():
            return


def _make_cache(model: CausalLM, batch_size: int, max_length: int) -> KVCache:
    weight = model.wte.weight
    dtype = autocast_dtype(weight.device.type) or weight.dtype
    return KVCache(model.config, batch_size, dtype, weight.device, max_length)


def _check_finite(logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise CheckpointError("generate: the model's logits are not finite; do its weights hold NaN?")
