"""The attention kernels behind tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cuda
from ..cpu import TYPE_CODE, heads_like
from ..cpu.attention import BOOL
from . import addresses, call, seed_argument

_FEW_QUERIES = 16  # with more, keys are never split over blocks


def _attention_arguments(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, options: tuple
) -> tuple[Any, ...]:
    """What both directions take, q, k and v as (B, H, T, D); B is 1 for packed sequences."""
    _, scale, dropout_p, seed, left, right, softcap = options
    B, H, T, D = q.shape
    S = k.shape[2]
    at, kind = 0, 0
    strides: tuple[int, ...] = ()
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.float32, q.dtype):
            mask = mask.float()
        strides = tuple(0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))
        at, kind = cuda.ptr(mask), TYPE_CODE.get(mask.dtype, BOOL)
    batch = B if cu_q is None else cu_q.shape[0] - 1
    return (
        *_attention_heads(q), *_attention_heads(k), *_attention_heads(v), at, strides, kind, mask,
        *addresses(cu_q, cu_k), (batch, H, k.shape[1], T, S, D, v.shape[3], left, right),
        scale, softcap, dropout_p, *seed_argument(seed), TYPE_CODE[q.dtype],
    )  # fmt: skip


def _mask_gradient(q: Tensor, S: int, D: int, mask: Tensor, wholly_written: bool) -> tuple[Tensor, Tensor | None]:
    """(the gradient's tensor, a workspace of partial sums or None); D: the larger head size."""
    B, H, T, _ = q.shape
    partials = call(cuda._cuda.attention_mask_partials, q, tuple(mask.shape), (B, H, T, S, D), TYPE_CODE[q.dtype])
    if partials == 0:  # as large as the scores, in its own dtype
        dtype = mask.dtype if mask.dtype == q.dtype else torch.float32
        return (q.new_empty if wholly_written else q.new_zeros)(mask.shape, dtype=dtype), None
    partial = q.new_empty(partials, *mask.shape, dtype=torch.float32) if partials > 1 else None
    return q.new_empty(mask.shape, dtype=torch.float32), partial


def _attention_heads(x: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, ()) if x is None else (cuda.ptr(x), x.stride())


def _decode_workspace(q: Tensor, k: Tensor, v: Tensor, window_right: int) -> Tensor | None:
    """The partial results of every split of the keys, or None where they are not split."""
    B, H, T, D = q.shape
    width = v.shape[3]
    if 0 in (B, H, T, width):
        return None
    sizes = H, k.shape[1], T, k.shape[2], max(D, width)
    splits = call(cuda._cuda.attention_splits, q, *sizes, window_right, TYPE_CODE[q.dtype])
    return q.new_empty(B * H * T * splits * (width + 2), dtype=torch.float32) if splits else None


def _attention_fwd(q, k, v, mask, cu_q, cu_k, options, lse, rest=None) -> tuple[Tensor, Tensor | None]:
    B, H, T, _ = q.shape
    width = v.shape[3]
    out = q.new_empty_strided((B, H, T, width), (T * H * width, width, H * width, 1))
    sums = q.new_empty(B, H, T, dtype=torch.float32) if lse else None
    partial = _decode_workspace(q, k, v, options[5]) if cu_q is None and T <= _FEW_QUERIES else None
    arguments = _attention_arguments(q, k, v, mask, cu_q, cu_k, options)
    call(
        cuda._cuda.attention_fwd,
        q,
        *arguments,
        *_attention_heads(out),
        *addresses(sums, rest, partial),
    )
    return out, sums


def _attention_bwd(
    dout, dlse, q, k, v, mask, cu_q, cu_k, out, lse, options, grads, mask_grad, rest=None
) -> Tensor | None:
    """Writes dq, dk and dv into `grads`, those that are not None, and returns the mask's."""
    B, H, T, D = q.shape
    if 0 in (B, H, T, k.shape[2]):
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return None if mask is None or not mask_grad else torch.zeros_like(mask, dtype=torch.float32)
    plain = mask is None and cu_q is None and options[2] == 0
    sizes = B, H, T, D, v.shape[3], TYPE_CODE[q.dtype], plain
    stats = lse.new_empty(call(cuda._cuda.attention_bwd_workspace, q, *sizes))
    dmask = partial = None
    if mask is not None and mask_grad:
        everywhere = options[4] < 0 and options[5] < 0  # tiles outside of a window are left out
        dmask, partial = _mask_gradient(q, k.shape[2], max(D, v.shape[3]), mask, everywhere)
    arguments = _attention_arguments(q, k, v, mask, cu_q, cu_k, options)
    call(
        cuda._cuda.attention_bwd, q, *arguments, *_attention_heads(out), *addresses(lse, rest),
        *_attention_heads(dout), cuda.ptr(dlse), *(part for grad in grads for part in _attention_heads(grad)),
        *addresses(stats, dmask),
        *((0, 0, ()) if dmask is None else (TYPE_CODE[dmask.dtype], cuda.ptr(partial), tuple(dmask.shape))),
    )  # fmt: skip
    return dmask


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *options, lse: bool = True, rest: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As fastlm.backends.cpu.attention.attention_fwd."""
    return _attention_fwd(q, k, v, mask, None, None, options, lse, rest)


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *options,
    inputs: bool = True,
    mask_grad: bool = False,
    rest: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As fastlm.backends.cpu.attention.attention_bwd."""
    grads = (heads_like(q), heads_like(k), heads_like(v)) if inputs else (None, None, None)
    dmask = _attention_bwd(dout, dlse, q, k, v, mask, None, None, out, lse, options, grads, mask_grad, rest)
    return *grads, dmask


def attention_varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *options, lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As fastlm.backends.cpu.attention.attention_varlen_fwd."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, sums = _attention_fwd(q, k, v, None, cu_q, cu_k, options, lse)
    return out[0].transpose(0, 1), None if sums is None else sums[0]


def attention_varlen_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    out: Tensor,
    lse: Tensor,
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    """As fastlm.backends.cpu.attention.attention_varlen_bwd."""
    grads = heads_like(q), heads_like(k), heads_like(v)
    dout, q, k, v, out, *packed = (x.transpose(0, 1)[None] for x in (dout, q, k, v, out, *grads))
    _attention_bwd(dout, dlse, q, k, v, None, cu_q, cu_k, out, lse, options, packed, False)
    return grads
