"""What attention looks at: its weights, and statistics of its scores, of any layer of any model.

Nothing here runs, and nothing is kept, unless it is called. While a model is watched, every call of
`fastlm.scaled_dot_product_attention` and of PyTorch's own is seen with the name of the module that makes it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..nn.attention import MultiheadAttention
from ..ops.attention import OBSERVERS

ROWS = 256  # queries whose scores exist at one time


class AttentionStatistics(NamedTuple):
    """Of each query, and each head; differentiable.

    Attributes:
        logsumexp: (B, H, T), logarithm of the sum of exponentials of the scores; -inf where no key is seen.
        entropy: (B, H, T), of the attention weights, in nats: 0 for one key, log(n) for n alike.
        max_logit: (B, H), the largest score of any query and key.
    """

    logsumexp: Tensor
    entropy: Tensor
    max_logit: Tensor


def attention_statistics(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
) -> AttentionStatistics:
    """Statistics of attention's scores, a few rows of which are held at a time.

    Args:
        query: (B, H, T, D).
        key: (B, Hkv, S, D), Hkv a divisor of H.
        attn_mask, is_causal, scale, window, softcap: as for `scaled_dot_product_attention`.

    Returns:
        Statistics in fp32 or wider.
    """
    parts = []
    options = (is_causal, scale, window, softcap)
    for first in range(0, query.shape[2], ROWS):
        rows = query[:, :, first : first + ROWS]
        mask = attn_mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask[..., first : first + ROWS, :]
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
            parts.append(checkpoint(_row_statistics, rows, key, mask, first, options, use_reentrant=False))
        else:
            parts.append(_row_statistics(rows, key, mask, first, options))
    lse, entropy, most = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    return AttentionStatistics(lse, entropy, most.amax(-1))


def _row_statistics(query: Tensor, key: Tensor, mask: Tensor | None, first: int, options: tuple) -> tuple[Tensor, ...]:
    """(logsumexp, entropy, largest score) of each query."""
    is_causal, scale, window, softcap = options
    scores = attention_scores(query, key, mask, is_causal, scale, window, softcap, first)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    filled = scores.masked_fill(empty, 0.0)
    # Beside the lowest number of a dtype the logarithm of the sum is lost, so it is taken once the level is off.
    level = filled.detach().logsumexp(-1, keepdim=True)
    filled = filled - level
    rest = filled.logsumexp(-1, keepdim=True)
    weights = torch.exp(filled - rest)
    # lse - E[score]; a key that is not seen has weight 0, and takes no part
    entropy = rest.squeeze(-1) - (weights * filled.masked_fill(filled == -math.inf, 0.0)).sum(-1)
    empty = empty.squeeze(-1)
    return (level + rest).squeeze(-1).masked_fill(empty, -math.inf), entropy.masked_fill(empty, 0.0), scores.amax(-1)


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The weights that attention gives to each key, in full; differentiable.

    Args:
        query: (B, H, T, D).
        key: (B, Hkv, S, D), Hkv a divisor of H.
        attn_mask, is_causal, scale, window, softcap: as for `scaled_dot_product_attention`.
        sinks: (H,) scores of one more key that every query sees; its weights are left out.

    Returns:
        (B, H, T, S) in query's dtype, computed in fp32 or wider; 0 in the rows of queries that see no key.
    """
    scores = attention_scores(query, key, attn_mask, is_causal, scale, window, softcap)
    if sinks is not None:
        more = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, more), -1)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    # Filled before and after the softmax: its gradient at a row of -inf is NaN, whatever comes in.
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return weights[..., : key.shape[2]].to(query.dtype)


def attention_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    first: int = 0,
) -> Tensor:
    """(B, H, T, S) scores in fp32 or wider, -inf where a key is not seen; the first query stands at `first`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window or (None, None)
    right = 0 if is_causal else right
    places = torch.arange(first, first + query.shape[2], device=query.device)[:, None]
    keys = torch.arange(key.shape[2], device=query.device)
    if right is not None:
        scores = scores.masked_fill(keys > places + right, -math.inf)
    if left is not None:
        scores = scores.masked_fill(keys < places - left, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -math.inf)
    return scores if attn_mask is None else scores + attn_mask.to(wide)


class AttentionMaps(dict[str, Tensor]):
    """Attention weights (B, H, T, S) by the name of the module that attends; a second call there is `name (2)`."""

    def plot(self, batch: int = 0, head: int | None = None, tokens: list[str] | None = None, path: Any = None) -> Any:
        """Draw the weights: layers down, heads across.

        Args:
            batch: which sequence of the batch.
            head: one head alone; the mean over heads if negative; None for all.
            tokens: labels of the keys and queries.
            path: also save the picture there.

        Returns:
            A matplotlib Figure.

        Raises:
            ValueError: if there is nothing to draw.
        """
        if not self:
            raise ValueError("AttentionMaps.plot: no attention was seen, so there is nothing to draw")
        from .plots import draw_maps

        return draw_maps({name: weights[batch].float().cpu() for name, weights in self.items()}, head, tokens, path)


def attention_maps(model: nn.Module, inputs: Tensor | tuple | Mapping[str, Any]) -> AttentionMaps:
    """The attention weights of every layer while `model` runs on `inputs`, without gradients.

    Args:
        model: any module whose attention is fastlm's, torch.nn.MultiheadAttention or PyTorch's
            scaled_dot_product_attention; a Hugging Face model with one of attn_implementation="fastlm" or "sdpa".
        inputs: what to call the model with: a tensor, a tuple of arguments or a mapping of keywords.

    Returns:
        Weights by module name; `maps.plot()` draws them. Dropout is left out of them.
    """
    maps = AttentionMaps()
    with torch.no_grad(), _watching(model, lambda name, call: _store(maps, name, call.weights())):
        if isinstance(inputs, Mapping):
            model(**inputs)
        elif isinstance(inputs, tuple):
            model(*inputs)
        else:
            model(inputs)
    return maps


@contextlib.contextmanager
def attention_telemetry(model: nn.Module) -> Iterator[dict[str, AttentionStatistics]]:
    """Collects `AttentionStatistics` of every attention of `model`, by module name, while the context is open.

    They are differentiable: a penalty on them, such as of the largest logit, trains the model.

        with fastlm.attention_telemetry(model) as telemetry:
            loss = model(x).loss
        loss = loss + 1e-4 * sum(s.max_logit.relu().mean() for s in telemetry.values())
    """
    found: dict[str, AttentionStatistics] = {}
    with _watching(model, lambda name, call: _store(found, name, call.statistics())):
        yield found


def _store(found: dict[str, Any], name: str, value: Any) -> None:
    times = 2
    key = name
    while key in found:
        key, times = f"{name} ({times})", times + 1
    found[key] = value


class Call(NamedTuple):
    """The arguments of one attention that matter to its weights."""

    query: Tensor
    key: Tensor
    attn_mask: Tensor | None
    options: dict[str, Any]

    def weights(self) -> Tensor:
        return attention_weights(*self[:3], **self.options)

    def statistics(self) -> AttentionStatistics:
        return attention_statistics(*self[:3], **self.options)


class _Watch(TorchFunctionMode):
    """Follows which module runs, and hands every attention to `record` with that module's name."""

    def __init__(self, record: Callable[[str, Call], None]):
        super().__init__()
        self.record = record
        self.running: list[str] = []
        self.last: Call | None = None

    def observe(self, query: Tensor, key: Tensor, attn_mask: Tensor | None, **options: Any) -> None:
        if query.dim() != 4:
            query, key = (x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.flatten(0, -4) for x in (query, key))
        self.last = Call(query, key, attn_mask, options)
        self.record(self.running[-1] if self.running else "", self.last)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._observe_torchs(*args, **kwargs)
        return func(*args, **kwargs)

    def _observe_torchs(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        # fastlm's own op may run on PyTorch's: then it has been seen.
        if self.last is None or self.last.query.data_ptr() != query.data_ptr():
            self.observe(query, key, attn_mask, is_causal=is_causal, scale=scale)


@contextlib.contextmanager
def _watching(model: nn.Module, record: Callable[[str, Call], None]) -> Iterator[None]:
    watch = _Watch(record)
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            for handle in _follow(watch, name, module):
                stack.callback(handle.remove)
            if type(module) is nn.MultiheadAttention:  # what torch's calls is out of sight
                stack.callback(setattr, module, "__class__", type(module))
                module.__class__ = MultiheadAttention
        fast_path = torch.backends.mha.get_fastpath_enabled()  # runs attention where nobody sees it
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        OBSERVERS.append(watch.observe)
        stack.callback(OBSERVERS.remove, watch.observe)
        stack.enter_context(watch)
        yield


def _follow(watch: _Watch, name: str, module: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Hooks that keep `watch.running`, and make a MultiheadAttention run where its attention is seen."""
    wanted: list[tuple[bool, bool]] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        watch.running.append(name)
        if not isinstance(module, nn.MultiheadAttention):
            return None
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        wanted.append((kwargs.get("need_weights", True), kwargs.get("average_attn_weights", True)))
        return (), {**kwargs, "need_weights": False}

    def leave(module: nn.Module, args: tuple, output: Any) -> Any:
        watch.running.pop()
        if not isinstance(module, nn.MultiheadAttention):
            return None
        need_weights, average = wanted.pop()
        if not need_weights or watch.last is None or output is None:
            return None
        weights = watch.last.weights()
        weights = weights.mean(1) if average else weights
        return output[0], weights if output[0].dim() == 3 else weights.squeeze(0)

    yield module.register_forward_pre_hook(enter, with_kwargs=True)
    yield module.register_forward_hook(leave, always_call=True)
