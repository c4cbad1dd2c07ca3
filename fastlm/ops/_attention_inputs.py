"""What attention's public functions accept, and the forms that its backends take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._core.dispatch import autocast_dtype

Window = tuple[int | None, int | None]


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as an autocast region wants them; fp64 stays."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in tensors)


def check_tensors(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Dtypes, devices and numbers of dimensions."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        if not x.is_floating_point():
            raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected a floating-point dtype")
        if x.dtype != q.dtype:
            raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {q.dtype} to match query")
        if x.device != q.device:
            raise ValueError(f"{op}: {name} is on {x.device}, query is on {q.device}")
        if x.dim() < 2 or x.dim() != q.dim():
            wanted = "at least 2" if q.dim() < 2 else f"{q.dim()} to match query"
            raise ValueError(f"{op}: {name} has {x.dim()} dimensions, expected {wanted}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{op}: key has head size {k.shape[-1]}, expected {q.shape[-1]} to match query")


def check_window(op: str, window: Window | None, is_causal: bool) -> tuple[int, int]:
    """(left, right) as kernels take them, -1 for no limit; a causal row's window ends at its own key."""
    if window is None:
        return -1, 0 if is_causal else -1
    sides = tuple(window) if isinstance(window, (tuple, list)) else ()
    if len(sides) != 2 or any(s is not None and (type(s) is not int or s < 0) for s in sides):
        raise ValueError(f"{op}: window is {window!r}, expected (left, right), each an integer >= 0 or None")
    left, right = (-1 if s is None else s for s in sides)
    return left, 0 if is_causal else right


def check_softcap(op: str, softcap: float | None) -> float:
    """The bound of the scores, 0 for none."""
    if softcap is None:
        return 0.0
    if not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}, expected a positive number or None")
    return float(softcap)


def check_mask(op: str, mask: Tensor, is_causal: bool, q: Tensor) -> None:
    if is_causal:
        raise ValueError(f"{op}: attn_mask and is_causal=True were both given, expected one of them")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{op}: attn_mask has dtype {mask.dtype}, expected bool or a floating-point dtype")
    if mask.device != q.device:
        raise ValueError(f"{op}: attn_mask is on {mask.device}, query is on {q.device}")


def unit_stride(x: Tensor) -> Tensor:
    """Kernels read whole rows: the last dimension has to be contiguous, the others may have any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _broadcast(op: str, shapes: list[torch.Size], what: str) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        got = ", ".join(str(tuple(s)) for s in shapes)
        raise ValueError(f"{op}: query, key and value have {what} {got}, which do not broadcast") from None


def check_group(op: str, name: str, heads: int, H: int) -> None:
    if heads != H and (heads == 0 or H % heads):
        raise ValueError(f"{op}: {name} has {heads} heads, expected a divisor of query's {H}")


def _share_heads(op: str, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q with H heads, k and v with the same number of heads that divides H."""
    H, key_heads, value_heads = q.shape[1], k.shape[1], v.shape[1]
    if H == key_heads == value_heads:
        return q, k, v
    if enable_gqa and H == 0:
        return q, k[:, :0], v[:, :0]
    if enable_gqa:
        for name, heads in (("key", key_heads), ("value", value_heads)):
            check_group(op, name, heads, H)
        if key_heads != value_heads:
            k, v = k.repeat_interleave(H // key_heads, 1), v.repeat_interleave(H // value_heads, 1)
    elif key_heads != value_heads or key_heads != 1:
        heads = _broadcast(op, [x.shape[1:2] for x in (q, k, v)], "heads")[0]
        q, k, v = (x.expand(-1, heads, -1, -1) for x in (q, k, v))
    return q, k, v


def as_4d(op: str, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """q, k and v as (B, H, T, D), and the batch dimensions that B stands for; views wherever strides allow."""
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"{op}: value has length {v.shape[-2]}, expected {k.shape[-2]} to match key")
    lead = q.shape[:-3]
    if q.dim() < 4:
        q, k, v = (x[(None,) * (4 - x.dim())] for x in (q, k, v))
    elif not (lead == k.shape[:-3] == v.shape[:-3]):
        lead = _broadcast(op, [x.shape[:-3] for x in (q, k, v)], "batch dimensions")
        q, k, v = (x.expand(*lead, *x.shape[-3:]) for x in (q, k, v))
    if q.dim() > 4:
        q, k, v = (
            x.reshape(-1, *x.shape[-3:]) if x.numel() else x.new_empty(math.prod(lead), *x.shape[-3:])
            for x in (q, k, v)
        )
    return *_share_heads(op, q, k, v, enable_gqa), lead


def mask_4d(op: str, mask: Tensor, lead: torch.Size, sizes: tuple[int, int, int]) -> Tensor:
    """mask as (B, H, T, S) with size 1 where it broadcasts; only a mask of some of several batch dims is copied."""
    wanted = (*lead, *sizes)
    given = (1,) * (len(lead) + 3 - mask.dim()) + tuple(mask.shape)
    if len(given) != len(wanted) or any(g not in (1, w) for g, w in zip(given, wanted, strict=True)):
        raise ValueError(f"{op}: attn_mask has shape {tuple(mask.shape)}, expected it to broadcast to {wanted}")
    mask = mask.view(given) if mask.dim() < len(given) else mask
    if len(lead) == 1:
        return mask
    if all(size == 1 for size in given[:-3]):
        return mask.reshape(1, *given[-3:])
    return mask.expand(*lead, *given[-3:]).reshape(-1, *given[-3:])
