"""The attention kernels behind tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu
from . import TYPE_CODE, compute_dtype, heads_like, ptr

BOOL = 4  # the mask type beside TYPE_CODE's


def _attention_mask(mask: Tensor | None, sizes: tuple[int, ...]) -> tuple[int, tuple[int, ...], int]:
    """Address, strides and type of a (B, H, T, S) mask whose broadcast dimensions have size 1."""
    if mask is None:
        return 0, (), 0
    mask = mask.expand(sizes)
    return mask.data_ptr(), mask.stride(), TYPE_CODE.get(mask.dtype, BOOL)


def _attention_sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    B, H, T, D = q.shape
    return B, H, k.shape[1], T, k.shape[2], D, v.shape[3]


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    lse: bool = True,
    rest: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q (B, H, T, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), last dimensions contiguous -> (out, lse or None).

    out is (B, H, T, Dv) over (B, T, H, Dv) memory, lse (B, H, T) in compute dtype. is_causal says no more than
    window_right does. rest, like lse, receives what rounding takes from lse, which is then made.
    """
    B, H, _, T, S, _, Dv = sizes = _attention_sizes(q, k, v)
    out = q.new_empty(B, T, H, Dv).transpose(1, 2)
    sums = q.new_empty(B, H, T, dtype=compute_dtype(q.dtype)) if lse else None
    cpu._cpu.attention_fwd(
        q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(),
        *_attention_mask(mask, (B, H, T, S)), out.data_ptr(), out.stride(), ptr(sums), ptr(rest), 0, 0,
        sizes, scale, dropout_p, seed, window_left, window_right, softcap, TYPE_CODE[q.dtype],
    )  # fmt: skip
    return out, sums


def attention_plain_fwd(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    """attention_fwd of q (B, H, T, D), k and v (B, H, S, D) without anything else, at the least cost of a call."""
    B, H, T, D = q.shape
    row = H * D
    out = torch.empty_strided((B, H, T, D), (T * row, D, row, 1), dtype=q.dtype)
    cpu._cpu.attention_plain_fwd(
        q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(), out.data_ptr(),
        B, H, T, k.shape[2], D, scale, is_causal, TYPE_CODE[q.dtype],
    )  # fmt: skip
    return out


def _packed(x: Tensor) -> tuple[int, tuple[int, ...]]:
    """Address and (B, H, T) strides of (tokens, heads, size)."""
    return x.data_ptr(), (0, x.stride(1), x.stride(0))


def _packed_sizes(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor) -> tuple[int, ...]:
    Tq, H, D = q.shape
    return cu_q.shape[0] - 1, H, k.shape[1], Tq, k.shape[0], D, v.shape[2]


def attention_varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """q (Tq, H, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv), cu_q and cu_k (B + 1,) int32 -> (out, lse (H, Tq) or None)."""
    _, H, _, Tq, _, _, Dv = sizes = _packed_sizes(q, k, v, cu_q)
    out = q.new_empty(Tq, H, Dv)
    sums = q.new_empty(H, Tq, dtype=compute_dtype(q.dtype)) if lse else None
    cpu._cpu.attention_fwd(
        *_packed(q), *_packed(k), *_packed(v), 0, (), 0, *_packed(out), ptr(sums), 0,
        cu_q.data_ptr(), cu_k.data_ptr(), sizes,
        scale, dropout_p, seed, window_left, window_right, softcap, TYPE_CODE[q.dtype],
    )  # fmt: skip
    return out, sums


def zeros_like_heads(x: Tensor) -> Tensor:
    """`heads_like` where there is no pair of query and key, and no kernel to write it."""
    return heads_like(x).zero_()


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    inputs: bool = True,
    mask_grad: bool = False,
    rest: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> (dq, dk, dv) like q, k and v where `inputs`, and dmask in mask's shape and compute dtype where `mask_grad`.

    rest is what the forward pass made of it; None stands for zeros.
    """
    B, H, _, T, S, _, _ = sizes = _attention_sizes(q, k, v)
    empty = 0 in (B, H, T, S)
    like = zeros_like_heads if empty else heads_like
    dq, dk, dv = (like(x) if inputs else None for x in (q, k, v))
    dmask = None
    if mask is not None and mask_grad:
        dmask = (torch.zeros if empty else torch.empty)(mask.shape, dtype=lse.dtype)
    if empty:
        return dq, dk, dv, dmask
    cpu._cpu.attention_bwd(
        q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(),
        *_attention_mask(mask, (B, H, T, S)), out.data_ptr(), out.stride(), lse.data_ptr(), ptr(rest), 0, 0,
        dout.data_ptr(), dout.stride(), ptr(dlse), *_heads(dq), *_heads(dk), *_heads(dv),
        ptr(dmask), () if dmask is None else tuple(dmask.shape),
        sizes, scale, dropout_p, seed, window_left, window_right, softcap, TYPE_CODE[q.dtype],
    )  # fmt: skip
    return dq, dk, dv, dmask


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
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (dq, dk, dv) like q, k and v."""
    B, H, _, Tq, Tk, _, _ = sizes = _packed_sizes(q, k, v, cu_q)
    empty = 0 in (B, H, Tq, Tk)
    dq, dk, dv = ((zeros_like_heads if empty else heads_like)(x) for x in (q, k, v))
    if empty:
        return dq, dk, dv
    cpu._cpu.attention_bwd(
        *_packed(q), *_packed(k), *_packed(v), 0, (), 0, *_packed(out), lse.data_ptr(), 0,
        cu_q.data_ptr(), cu_k.data_ptr(), *_packed(dout), ptr(dlse), *_packed(dq), *_packed(dk), *_packed(dv), 0, (),
        sizes, scale, dropout_p, seed, window_left, window_right, softcap, TYPE_CODE[q.dtype],
    )  # fmt: skip
    return dq, dk, dv


def _heads(x: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, ()) if x is None else (x.data_ptr(), x.stride())
