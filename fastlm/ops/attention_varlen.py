"""Attention over packed sequences: batches without padding, as in FlashAttention's varlen functions (Dao 2023)."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .._core import dropout as _dropout
from .._core.dispatch import (
    Backend,
    LazyModule,
    always,
    as_operator,
    choose,
    must_trace,
    needs_grad,
    request_of,
)
from .._core.registry import Draw, register
from ..backends import cpu as _native
from ..backends.conditions import cpu_unsupported
from ..backends.cpu import attention as _kernels
from ._attention_inputs import (
    Window,
    autocast,
    check_group,
    check_softcap,
    check_tensors,
    check_window,
    unit_stride,
)
from ._attention_reference import Options, attention_varlen_backward_ref, attention_varlen_ref
from ._autograd import by_kernels, operator
from .attention import (
    cuda_attention_unsupported,
    op_options,
    seed_to_trace,
    triton_attention_unsupported,
)

KERNELS: dict[str, Any] = {
    "cpu": _kernels,
    "triton": LazyModule("fastlm.kernels.attention"),
    "cuda": LazyModule("fastlm.backends.cuda.attention"),
}
_NAME = "attention_varlen"


class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, options, backend):
        out, lse = KERNELS[backend].attention_varlen_fwd(q, k, v, cu_q, cu_k, *options)
        ctx.save_for_backward(q, k, v, cu_q, cu_k, out, lse)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @by_kernels(attention_varlen_ref, tensors=5)
    def backward(ctx, dout, dlse):
        q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else unit_stride(dout)
        dlse = None if dlse is None else dlse.contiguous()
        return KERNELS[ctx.backend].attention_varlen_bwd(dout, dlse, q, k, v, cu_q, cu_k, out, lse, *ctx.options)


# Under torch.compile it is one operator.


def _op_backend(q: Tensor, v: Tensor, options: Options) -> str:
    backend = choose(_NAME, _request(q, v, options, lse=True, grad=True))
    return backend if backend in KERNELS else "reference"


def _op_fake(q, k, v, *given):
    tokens, H, _ = q.shape
    return q.new_empty(tokens, H, v.shape[2]), q.new_empty(H, tokens, dtype=_native.compute_dtype(q.dtype))


def _op_gradients(ctx, dout, dlse):
    *tensors, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return torch.ops.fastlm.attention_varlen_backward(dout, dlse, *tensors, out, lse, *ctx.options)


@operator(_NAME, _op_fake, _op_gradients)
def _varlen_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    _check_ends(q, k, cu_q, cu_k)
    options = op_options(
        is_causal, scale, dropout_p, _dropout.traced_seed(seed, q.device), window_left, window_right, softcap
    )
    backend = _op_backend(q, v, options)
    if backend in KERNELS:
        q, k, v, cu_q, cu_k = (unit_stride(x) for x in (q, k, v, cu_q, cu_k))
        return KERNELS[backend].attention_varlen_fwd(q, k, v, cu_q, cu_k, *options)
    return attention_varlen_ref(q, k, v, cu_q, cu_k, *options)


def _backward_fake(dout, dlse, q, k, v, *given):
    return tuple(_native.heads_like(unit_stride(x)) for x in (q, k, v))


@operator("attention_varlen_backward", _backward_fake)
def _varlen_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    options = op_options(
        is_causal, scale, dropout_p, _dropout.traced_seed(seed, q.device), window_left, window_right, softcap
    )
    backend = _op_backend(q, v, options)
    dout, q, k, v, cu_q, cu_k = map(unit_stride, (dout, q, k, v, cu_q, cu_k))
    dlse = None if dlse is None else dlse.contiguous()
    if backend in KERNELS:
        return KERNELS[backend].attention_varlen_bwd(dout, dlse, q, k, v, cu_q, cu_k, out, lse, *options)
    return attention_varlen_backward_ref(dout, dlse, q, k, v, cu_q, cu_k, options)


def _request(q: Tensor, v: Tensor, options: Options, lse: bool, grad: bool | None = None) -> tuple:
    features = (
        ("head_dim", max(q.shape[-1], v.shape[-1])),
        ("dropout", options.dropout_p > 0),
        ("lse", lse),
        ("window", options.window_left >= 0 or options.window_right > 0),  # more than is_causal alone
        ("softcap", options.softcap > 0),
    )
    return request_of(q, features, (q.shape[1], q.shape[0], q.shape[2]) if q.is_cuda else (), grad)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_tensors(_NAME, q, k, v)
    if q.dim() != 3:
        raise ValueError(f"{_NAME}: query has {q.dim()} dimensions, expected 3: (tokens, heads, head size)")
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"{_NAME}: value has {v.shape[0]} tokens, expected {k.shape[0]} to match key")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"{_NAME}: value has {v.shape[1]} heads, expected {k.shape[1]} to match key")
    check_group(_NAME, "key", k.shape[1], q.shape[1])


def _check_offsets(name: str, cu: Tensor, q: Tensor) -> None:
    if cu.dtype != torch.int32:
        raise TypeError(f"{_NAME}: {name} has dtype {cu.dtype}, expected torch.int32")
    if cu.dim() != 1 or cu.shape[0] == 0:
        raise ValueError(f"{_NAME}: {name} has shape {tuple(cu.shape)}, expected (sequences + 1,)")
    if cu.device != q.device:
        raise ValueError(f"{_NAME}: {name} is on {cu.device}, query is on {q.device}")


def _check_ends(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    """What the offsets say, where it can be read without waiting for a device."""
    if q.device.type != "cpu":
        return
    named = (("cu_seqlens_q", cu_q, q, "query"), ("cu_seqlens_k", cu_k, k, "key"))
    for name, cu, x, what in named[: 1 if cu_k is cu_q and len(k) == len(q) else 2]:
        offsets = cu.tolist()
        if offsets[0] != 0 or offsets[-1] != len(x) or any(a > b for a, b in itertools.pairwise(offsets)):
            raise ValueError(f"{_NAME}: {name} is {offsets}, expected to rise from 0 to {what}'s {len(x)} tokens")


def _draw(draw: Draw) -> list[dict[str, Any]]:
    offsets = draw.given([0, 2, 2, 7], torch.int32)
    tensors = {"query": draw(7, 4, 8), "key": draw(7, 4, 8), "value": draw(7, 4, 8), "cu_seqlens_q": offsets}
    shared = {"key": draw(9, 2, 8), "value": draw(9, 2, 8), "cu_seqlens_k": draw.given([0, 3, 5, 9], torch.int32)}
    return [
        tensors | {"is_causal": True},
        tensors | {"dropout_p": 0.3, "softcap": 2.0},
        tensors | shared | {"scale": 0.3, "window": (3, None), "return_lse": True},
    ]


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@register(
    reference=attention_varlen_ref,
    backends=(
        Backend("cpu", cpu_unsupported),
        Backend("triton", triton_attention_unsupported, needs_proof=True),
        Backend("cuda", cuda_attention_unsupported, needs_proof=True),
        Backend("reference", always),
    ),
    differentiable=("query", "key", "value"),
    draw=_draw,
    note="packed sequences",
    opaque=True,
)
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of several sequences that lie one after the other, without padding.

    Args:
        query: (Tq, H, D), float32, float64, bfloat16 or float16; Tq counts the tokens of all sequences.
        key: (Tk, Hkv, D); Hkv divides H, each of its heads serving a group of consecutive query heads.
        value: (Tk, Hkv, Dv). Inputs are read in place whatever their strides, if their last is 1.
        cu_seqlens_q: (B + 1,) int32, the first token of each sequence and, last, Tq; a sequence may be empty.
        cu_seqlens_k: the same for the keys, with Tk; None means cu_seqlens_q. GPU tensors are not read back to
            be checked, which would wait for the device.
        dropout_p, is_causal, scale, window, softcap: as for `scaled_dot_product_attention`, with positions
            counted from each sequence's first token.
        return_lse: also return the logarithm of the sum of exponentials of each row's scores.

    Returns:
        (Tq, H, Dv); with return_lse also lse (H, Tq), float32 (float64 for float64 inputs). A row that attends
        to nothing gives 0, its lse -inf.

    Raises:
        ValueError: if shapes, devices or offsets disagree, or dropout_p, window or softcap is out of range.
        TypeError: if dtypes disagree or are not what is said above.
        BackendError: if a forced backend cannot serve the call.
    """
    q, k, v = autocast(query, key, value)
    _check_shapes(q, k, v)
    k, v = (x[:, :0] for x in (k, v)) if q.shape[1] == 0 else (k, v)
    cu_q, cu_k = cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check_offsets("cu_seqlens_q", cu_q, q)
    _check_offsets("cu_seqlens_k", cu_k, q)
    if len(cu_q) != len(cu_k):
        raise ValueError(f"{_NAME}: cu_seqlens_k has {len(cu_k)} offsets, expected {len(cu_q)} as cu_seqlens_q has")
    dropout_p = _dropout.check_probability(_NAME, dropout_p)
    left, right = check_window(_NAME, window, is_causal)
    scale = 1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    options = Options(right == 0, scale, dropout_p, 0, left, right, check_softcap(_NAME, softcap))
    out, lse = _attend(q, k, v, cu_q, cu_k, options, return_lse)
    return (out, lse) if return_lse else out


def _by_op(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    is_causal, scale, dropout_p, _, left, right, cap = options
    seed = seed_to_trace(dropout_p)
    return torch.ops.fastlm.attention_varlen(q, k, v, cu_q, cu_k, seed, is_causal, scale, dropout_p, left, right, cap)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, options: Options, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """`options` has its seed still to be drawn."""
    if as_operator(q, k, v, cu_q, cu_k):
        return _by_op(q, k, v, cu_q, cu_k, options)
    _check_ends(q, k, cu_q, cu_k)
    traced = must_trace(q, k, v, cu_q, cu_k)
    backend = "reference" if traced else choose(_NAME, _request(q, v, options, return_lse))
    if backend == "reference" and q.is_meta:  # of which the definition could not read the offsets
        return _by_op(q, k, v, cu_q, cu_k, options)
    if options.dropout_p > 0:
        options = options._replace(seed=_dropout.draw_seed(q.device))
    if backend == "reference":
        return attention_varlen_ref(q, k, v, cu_q, cu_k, *options)
    q, k, v, cu_q, cu_k = map(unit_stride, (q, k, v, cu_q, cu_k))
    if needs_grad(q, k, v):
        return _AttentionVarlen.apply(q, k, v, cu_q, cu_k, options, backend)
    return KERNELS[backend].attention_varlen_fwd(q, k, v, cu_q, cu_k, *options, lse=return_lse)
