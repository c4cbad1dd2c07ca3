"""Hugging Face transformers: attn_implementation="fastlm", through its own AttentionInterface.

Importing this module, or `fastlm.accelerate(model)` of one of its models, registers the implementation:

    import fastlm.integrations.huggingface
    model = AutoModel.from_pretrained(folder, attn_implementation="fastlm")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils, modeling_utils

from ..ops.attention import scaled_dot_product_attention
from ..ops.attention_varlen import attention_varlen
from . import losses

NAME = "fastlm"
_PREVIOUS = "_fastlm_attention"  # of a model: the attention implementation that it had
_WINDOW = "_fastlm_window"  # of a mask: the window of the kernel that it stands for
_PACKED = "_fastlm_packed"  # of a mask: (cu_seqlens, window) of the packed sequences that it keeps apart


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fastlm.scaled_dot_product_attention` with the signature of transformers' attention functions.

    Args:
        query: (B, H, T, D).
        key, value: (B, Hkv, S, D), one key head for a group of query heads.
        attention_mask: (B, 1 or H, T, S), boolean (True attends) or added; it has the model's sliding window in it.
            One of `boolean_mask` that is nothing but causal with a window is left to the kernel, whose tiles
            outside the window cost nothing.
        is_causal: module.is_causal if None; holds where there is no mask and more than one query.
        position_bias: (1 or B, H, T, S), added to the scores (T5).
        s_aux: (H,) attention sinks: the score of one more key, whose value is 0.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,) int32, for B = 1: the sequences are packed one after the
            other, and each attends to itself alone, whatever the mask lets through.

    Returns:
        (output (B, T, H, D), the weights (B, H, T, S) where output_attentions asks for them, else None).

    Raises:
        NotImplementedError: for a paged cache, or packed sequences of other lengths of queries than of keys with
            a mask, a position bias, sinks or output_attentions.
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError("fastlm attention: it does not read a paged cache; use attn_implementation='sdpa'")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "softcap": softcap}
    T, S = query.shape[2], key.shape[2]
    by_kernel = position_bias is None and s_aux is None and not kwargs.get("output_attentions")
    packed, window = getattr(attention_mask, _PACKED, None), getattr(attention_mask, _WINDOW, None)
    lengths_k = None
    if packed is None and cu_seq_lens_q is not None:
        size = _window(kwargs)
        if by_kernel and (attention_mask is None or window is not None):
            packed, lengths_k = (cu_seq_lens_q, size), cu_seq_lens_k
        else:
            apart = _packed_mask(cu_seq_lens_q, cu_seq_lens_k, T, S, causal, size)
            attention_mask, window = apart if attention_mask is None else _both(attention_mask, apart), None
    if packed is not None and by_kernel:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, H, D)
        out = attention_varlen(q, k, v, packed[0], lengths_k, is_causal=causal, window=packed[1], **options)
        return out.unsqueeze(0), None
    if window is not None:
        attention_mask, causal = None, True
    causal = bool(causal) and T > 1 and attention_mask is None
    mask = None if attention_mask is None else _of_keys(attention_mask, S)
    if position_bias is not None:
        mask, causal = _biased_mask(_of_keys(position_bias, S), mask, causal), False
    weights = None
    if kwargs.get("output_attentions"):
        from ..interpret.maps import attention_weights

        weights = attention_weights(
            query, key, mask, is_causal=causal, scale=scaling, window=window, softcap=softcap, sinks=s_aux
        )
    arguments: Any = (query, key, value, mask, dropout, causal, scaling, True)
    if s_aux is None:
        out = scaled_dot_product_attention(*arguments, window=window, softcap=softcap)
    else:
        out, lse = scaled_dot_product_attention(*arguments, window=window, softcap=softcap, return_lse=True)
        out = out * torch.sigmoid(lse - s_aux.view(-1, 1)).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2), weights


def _window(kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """The window of packed sequences, whose mask is not there to hold it, as transformers' flash attention has it."""
    size = kwargs.get("sliding_window")
    return None if size is None else (size - 1, size - 1)


def _packed_mask(
    cu_q: Tensor, cu_k: Tensor | None, T: int, S: int, causal: bool, window: tuple[int, int] | None
) -> Tensor:
    """(1, 1, T, T), True where a query of packed sequences sees a key."""
    if cu_k is not None and not (T == S and torch.equal(cu_q, cu_k)):
        raise NotImplementedError(
            "fastlm attention: packed sequences with a mask, position bias, sinks or output_attentions need "
            "cu_seq_lens_k to equal cu_seq_lens_q"
        )
    places = torch.arange(T, device=cu_q.device)
    sequence = torch.searchsorted(cu_q, places.to(cu_q.dtype), right=True)
    distance = places[:, None] - places
    seen = sequence[:, None] == sequence
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance <= window[0]) & (distance >= -window[1])
    return seen[None, None]


def _both(mask: Tensor, seen: Tensor) -> Tensor:
    """The mask with what is not `seen` left out too."""
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


def _of_keys(mask: Tensor, S: int) -> Tensor:
    """The mask of the first S keys: a cache may hold fewer than a mask is made for."""
    return mask if mask.shape[-1] == S else mask[..., :S]


def _biased_mask(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """One mask to add: the bias where a key is seen, -inf elsewhere."""
    if mask is not None and mask.dtype != torch.bool:
        return bias + mask
    if causal:
        T, S = bias.shape[-2:]
        mask = torch.ones(T, S, dtype=torch.bool, device=bias.device).tril()
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def boolean_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int | None = None,
    *args: Any,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' boolean mask for SDPA.

    A mask of padding alone is a view with one row for all queries. A causal mask with a sliding window alone has the
    window's size as an attribute, which lets the kernel skip keys; a model that slices or moves the mask loses the
    attribute, and the mask's values still give the same result.
    """
    if mask_function is not None:
        kwargs["mask_function"] = mask_function
    sdpa_mask: Any = masking_utils.sdpa_mask
    make = partial(sdpa_mask, batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)
    mask = make()
    # Without a local size, transformers writes no mask where a causal one is all that is needed.
    if mask is not None and _is_sliding(mask_function, kwargs) and make(local_size=None) is None:
        setattr(mask, _WINDOW, (kwargs["local_size"] - 1, None))
        return mask
    packed = None if mask is None or attention_mask is not None else _packed(mask_function, kwargs)
    if packed is not None:
        setattr(mask, _PACKED, packed)
        return mask
    both_ways = getattr(masking_utils, "bidirectional_mask_function", None)  # transformers before 5.0 has none
    only_keys = mask_function is not None and mask_function is both_ways
    if mask is None or not only_keys or mask.dim() != 4:
        return mask
    return mask[:, :, :1].expand(-1, -1, mask.shape[2], -1)


def _is_sliding(mask_function: Callable | None, kwargs: dict[str, Any]) -> bool:
    """Whether the mask is causal with a sliding window and nothing else, and starts with the first key."""
    size = kwargs.get("local_size")
    if size is None or mask_function is None or torch.compiler.is_compiling():
        return False
    if not (isinstance(kwargs.get("q_offset"), int) and kwargs["q_offset"] == kwargs.get("kv_offset")):
        return False
    return _contents(mask_function) == _contents(masking_utils.sliding_window_causal_mask_function(size))


def _packed(mask_function: Callable | None, kwargs: dict[str, Any]) -> tuple[Tensor, tuple[int, int] | None] | None:
    """(cu_seqlens, window) of a mask that is causal, perhaps with a window, within the packed sequences of one row."""
    keep_apart: Any = getattr(masking_utils, "packed_sequence_compatibility_function", None)
    if keep_apart is None or torch.compiler.is_compiling():  # older transformers: the mask does without
        return None
    parts = _enclosed(mask_function, "mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    sequence, positions = _enclosed(parts[0], "packed_sequence_mask"), _enclosed(parts[1], "position_ids")
    if not isinstance(sequence, Tensor) or positions is None or len(sequence) != 1:
        return None
    size = kwargs.get("local_size")
    base = masking_utils.causal_mask_function
    base = base if size is None else masking_utils.sliding_window_causal_mask_function(size)
    if _contents(mask_function) != _contents(keep_apart(base, positions, sequence)):
        return None
    lengths = sequence[0].unique_consecutive(return_counts=True)[1]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return cu_seqlens, None if size is None else (size - 1, size - 1)


def _enclosed(function: Any, name: str) -> Any:
    """What a function made within another has from there under this name."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return function.__closure__[names.index(name)].cell_contents if name in names else None


def _contents(value: Any) -> Any:
    """A function as its code and what it encloses: equal for functions made in the same way."""
    if isinstance(value, tuple):
        return tuple(map(_contents, value))
    if not hasattr(value, "__code__"):
        return value
    return value.__code__, tuple(_contents(cell.cell_contents) for cell in value.__closure__ or ())


def register() -> None:
    """Make "fastlm" known to transformers as an attention implementation."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, boolean_mask)


register()


def _models(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """The transformers models in `model`, one for each configuration, outermost first."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            yield name, module


def accelerate_models(model: nn.Module, attention: bool, loss: bool) -> Iterator[tuple[str, str, str, str]]:
    """Switch attention and losses of the transformers models in `model`; yields the report's rows."""
    models = list(_models(model))
    before = [module.config._attn_implementation for _, module in models]  # a switch reaches the models inside too
    for (name, module), previous in zip(models, before, strict=True):
        kind = type(module).__name__
        if attention and _PREVIOUS not in module.__dict__:
            yield name, f"{kind} attention", *_switch_attention(module, previous)
        if loss and losses.switch(module):
            yield name, f"{kind} loss", "fastlm.cross_entropy", ""


def _switch_attention(model: PreTrainedModel, previous: str) -> tuple[str, str]:
    """(replacement, reason), one of them empty."""
    if getattr(model.config, "output_attentions", False):
        return "", "its configuration asks for attention weights"
    if not model._can_set_attn_implementation():
        return "", "its attention does not go through transformers' AttentionInterface"
    if not _is_supported(model):
        return "", "it supports neither PyTorch's nor other attention implementations"
    for _, inside in _models(model):  # a switch reaches them; those of transformers' own are switched by themselves
        if not _is_theirs(inside.config._attn_implementation):
            return "", f"its attention, {inside.config._attn_implementation!r}, is none of transformers' own"
    model.set_attn_implementation(NAME)
    model.__dict__[_PREVIOUS] = previous
    return f"attn_implementation={NAME!r}", ""


def _is_theirs(name: str) -> bool:
    """Whether an attention implementation and its mask are transformers' or ours, not others' under this name."""
    for table in (modeling_utils.ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS):
        function = table.get(name)
        home = getattr(function, "__globals__", {}).get("__name__", "")  # a wrapper has its own, unlike its __module__
        if function is not None and home.partition(".")[0] not in ("transformers", "fastlm"):
            return False
    return True


def _is_supported(model: PreTrainedModel) -> bool:
    """Whether another implementation than the eager one is known to give its attention all that it computes."""
    flags = ("_supports_attention_backend", "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")
    return any(getattr(model, flag, False) for flag in flags)


def restore_models(model: nn.Module) -> None:
    """Undo what `accelerate_models` did."""
    for _, module in list(_models(model)):
        losses.restore(module)
        before = module.__dict__.pop(_PREVIOUS, None)
        if before is not None:
            module.set_attn_implementation(before)
