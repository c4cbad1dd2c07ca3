"""Scaled dot-product attention (Vaswani et al. 2017) by an online softmax (Dao et al. 2022).

out = dropout(softmax(scale query key^T + mask)) value, and lse = logsumexp(scale query key^T + mask).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from .._dispatch import Backend, Request, always, choose, cpu_unsupported, must_trace, needs_grad, register
from . import _dropout
from ._autograd import reference_gradients

KERNELS = {"cpu": _native}
_NAME = "scaled_dot_product_attention"


class _Options(NamedTuple):
    is_causal: bool
    scale: float
    dropout_p: float = 0.0
    seed: int = 0


def _wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 or wider, with as many heads in k and v as in q."""
    dtype = _native.compute_dtype(q.dtype)
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = (x.to(dtype).repeat_interleave(group, 1) if group > 1 else x.to(dtype) for x in (k, v))
    return q.to(dtype), k, v


def _weights_ref(q: Tensor, k: Tensor, mask: Tensor | None, options: _Options) -> tuple[Tensor, Tensor, Tensor | float]:
    """(softmax weights (B, H, T, S), lse (B, H, T), dropout's factors of the weights)."""
    scores = q @ k.transpose(-2, -1) * options.scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(q.dtype)
    B, H, T, S = scores.shape
    if options.is_causal:
        scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    closed = (scores == -math.inf).all(-1, keepdim=True)  # rows that attend to nothing
    lse = scores.masked_fill(closed, 0.0).logsumexp(-1, keepdim=True)
    factors: Tensor | float = 1.0
    if options.dropout_p > 0:
        rows = _dropout.factors(B * H * T, S, options.dropout_p, options.seed, q.dtype, q.device)
        factors = rows.view(B, H, T, S)
    return torch.exp(scores - lse), lse.masked_fill(closed, -math.inf).squeeze(-1), factors


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """The definition in fp32 or wider: q (B, H, T, D), k and v (B, Hkv, S, ...) -> (out, lse (B, H, T))."""
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = _wide(q, k, v)
        weights, lse, factors = _weights_ref(queries, keys, mask, _Options(is_causal, scale, dropout_p, seed))
        return (weights * factors @ values).to(q.dtype), lse


def attention_backward_ref(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: _Options,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients by formula, for the registered operator, inside which autograd does not record."""
    queries, keys, values = _wide(q, k, v)
    dout = dout.to(queries.dtype)
    weights, _, factors = _weights_ref(queries, keys, mask, options)
    dweights = dout @ values.transpose(-2, -1) * factors
    delta = (dweights * weights).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta + (0.0 if dlse is None else dlse.unsqueeze(-1)))
    dq = dscores @ keys * options.scale
    dk = dscores.transpose(-2, -1) @ queries * options.scale
    dv = (weights * factors).transpose(-2, -1) @ dout
    shared = (g.unflatten(1, (x.shape[1], -1)).sum(2) for g, x in ((dk, k), (dv, v)))
    dq, dk, dv = (_native.heads_like(x).copy_(g) for x, g in zip((q, k, v), (dq, *shared), strict=True))
    return dq, dk, dv, dscores.sum_to_size(mask.shape) if mask is not None and mask_grad else None


def _torch_unsupported(request: Request) -> str | None:
    features = dict(request.features)
    if features["lse"]:
        return "it returns no log-sum-exp"
    if features["dropout"]:
        return "its dropout draws another mask for the same seed"
    return None


register(
    _NAME,
    Backend("cpu", cpu_unsupported),
    Backend("torch", _torch_unsupported),
    Backend("reference", always),
)


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels read whole rows: the last dimension has to be contiguous, the others may have any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, options, backend):
        out, lse = KERNELS[backend].attention_fwd(q, k, v, mask, *options)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, mask, out, lse = ctx.saved_tensors
        need = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            grads = reference_gradients(
                lambda *inputs: attention_ref(*inputs, *ctx.options), (q, k, v, mask), need, (dout, dlse)
            )
            return *grads, None, None
        dout = torch.zeros_like(out) if dout is None else _unit_stride(dout)
        dq, dk, dv, dmask = KERNELS[ctx.backend].attention_bwd(
            dout, None if dlse is None else dlse.contiguous(), q, k, v, mask, out, lse, *ctx.options,
            inputs=any(need[:3]), mask_grad=need[3],
        )  # fmt: skip
        return dq, dk, dv, None if dmask is None else dmask.to(mask.dtype), None, None


# Under torch.compile attention is one operator. The seed is a tensor there, so that each run draws its own.


def _op_options(is_causal: bool, scale: float, dropout_p: float, seed: Tensor | None) -> _Options:
    return _Options(is_causal, scale, dropout_p, 0 if seed is None else int(seed.item()))


def _op_backend(q: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> str:
    backend = choose(_NAME, _request(q, v, mask, dropout_p, lse=True))
    return backend if backend in KERNELS else "reference"


@torch.library.custom_op("fastlm::attention", mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    options = _op_options(is_causal, scale, dropout_p, seed)
    backend = _op_backend(q, v, mask, dropout_p)
    if backend in KERNELS:
        return KERNELS[backend].attention_fwd(*map(_unit_stride, (q, k, v)), mask, *options)
    out, lse = attention_ref(q, k, v, mask, *options)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


@_attention_op.register_fake
def _(q, k, v, mask, seed, is_causal, scale, dropout_p):
    B, H, T, _ = q.shape
    out = q.new_empty(B, T, H, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(B, H, T, dtype=_native.compute_dtype(q.dtype))


@torch.library.custom_op("fastlm::attention_backward", mutates_args=())
def _attention_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = _op_options(is_causal, scale, dropout_p, seed)
    backend = _op_backend(q, v, mask, dropout_p)
    dout, q, k, v = map(_unit_stride, (dout, q, k, v))
    dlse = None if dlse is None else dlse.contiguous()
    if backend in KERNELS:
        dq, dk, dv, dmask = KERNELS[backend].attention_bwd(
            dout, dlse, q, k, v, mask, out, lse, *options, mask_grad=mask_grad
        )
    else:
        dq, dk, dv, dmask = attention_backward_ref(dout, dlse, q, k, v, mask, options, mask_grad)
    return dq, dk, dv, q.new_empty(0) if mask is None or dmask is None else dmask.to(mask.dtype)


@_attention_backward_op.register_fake
def _(dout, dlse, q, k, v, mask, seed, out, lse, is_causal, scale, dropout_p, mask_grad):
    dmask = mask.new_empty(mask.shape) if mask_grad else q.new_empty(0)
    return *(_native.heads_like(_unit_stride(x)) for x in (q, k, v)), dmask


def _op_setup(ctx, inputs, output):
    q, k, v, mask, seed, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, mask, seed, *output)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dout, dlse):
    q, k, v, mask, seed, out, lse = ctx.saved_tensors
    mask_grad = ctx.needs_input_grad[3]
    dout = torch.zeros_like(out) if dout is None else dout
    *grads, dmask = torch.ops.fastlm.attention_backward(
        dout, dlse, q, k, v, mask, seed, out, lse, *ctx.options, mask_grad
    )
    return *grads, dmask if mask_grad else None, None, None, None, None


_attention_op.register_autograd(_op_backward, setup_context=_op_setup)


def _request(q: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, lse: bool) -> Request:
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    features = ("head_dim", max(q.shape[-1], v.shape[-1])), ("mask", kind), ("dropout", dropout_p > 0), ("lse", lse)
    return Request(q.device.type, q.dtype, features)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("query", q), ("key", k), ("value", v)):
        if not x.is_floating_point():
            raise TypeError(f"{_NAME}: {name} has dtype {x.dtype}, expected a floating-point dtype")
        if x.dtype != q.dtype:
            raise TypeError(f"{_NAME}: {name} has dtype {x.dtype}, expected {q.dtype} to match query")
        if x.device != q.device:
            raise ValueError(f"{_NAME}: {name} is on {x.device}, query is on {q.device}")
        if x.dim() < 2 or x.dim() != q.dim():
            wanted = "at least 2" if q.dim() < 2 else f"{q.dim()} to match query"
            raise ValueError(f"{_NAME}: {name} has {x.dim()} dimensions, expected {wanted}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{_NAME}: key has head size {k.shape[-1]}, expected {q.shape[-1]} to match query")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"{_NAME}: value has length {v.shape[-2]}, expected {k.shape[-2]} to match key")


def _check_mask(mask: Tensor, is_causal: bool, q: Tensor) -> None:
    if is_causal:
        raise ValueError(f"{_NAME}: attn_mask and is_causal=True were both given, expected one of them")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{_NAME}: attn_mask has dtype {mask.dtype}, expected bool or a floating-point dtype")
    if mask.device != q.device:
        raise ValueError(f"{_NAME}: attn_mask is on {mask.device}, query is on {q.device}")


def _broadcast(shapes: list[torch.Size], what: str) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        got = ", ".join(str(tuple(s)) for s in shapes)
        raise ValueError(f"{_NAME}: query, key and value have {what} {got}, which do not broadcast") from None


def _share_heads(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q with H heads, k and v with the same number of heads that divides H."""
    H, key_heads, value_heads = q.shape[1], k.shape[1], v.shape[1]
    if H == key_heads == value_heads:
        return q, k, v
    if enable_gqa:
        for name, heads in (("key", key_heads), ("value", value_heads)):
            if heads == 0 or H % heads:
                raise ValueError(f"{_NAME}: {name} has {heads} heads, expected a divisor of query's {H}")
        if key_heads != value_heads:
            k, v = k.repeat_interleave(H // key_heads, 1), v.repeat_interleave(H // value_heads, 1)
    elif key_heads != value_heads or key_heads != 1:
        heads = _broadcast([x.shape[1:2] for x in (q, k, v)], "heads")[0]
        q, k, v = (x.expand(-1, heads, -1, -1) for x in (q, k, v))
    return q, k, v


def _as_4d(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """q, k and v as (B, H, T, D), and the batch dimensions that B stands for; views wherever strides allow."""
    lead = q.shape[:-3]
    if q.dim() < 4:
        q, k, v = (x[(None,) * (4 - x.dim())] for x in (q, k, v))
    elif not (lead == k.shape[:-3] == v.shape[:-3]):
        lead = _broadcast([x.shape[:-3] for x in (q, k, v)], "batch dimensions")
        q, k, v = (x.expand(*lead, *x.shape[-3:]) for x in (q, k, v))
    if q.dim() > 4:
        q, k, v = (
            x.reshape(-1, *x.shape[-3:]) if x.numel() else x.new_empty(math.prod(lead), *x.shape[-3:])
            for x in (q, k, v)
        )
    return *_share_heads(q, k, v, enable_gqa), lead


def _mask_4d(mask: Tensor, lead: torch.Size, sizes: tuple[int, int, int]) -> Tensor:
    """mask as (B, H, T, S) with size 1 where it broadcasts; only a mask of some of several batch dims is copied."""
    wanted = (*lead, *sizes)
    given = (1,) * (len(lead) + 3 - mask.dim()) + tuple(mask.shape)
    if len(given) != len(wanted) or any(g not in (1, w) for g, w in zip(given, wanted, strict=True)):
        raise ValueError(f"{_NAME}: attn_mask has shape {tuple(mask.shape)}, expected it to broadcast to {wanted}")
    mask = mask.view(given) if mask.dim() < len(given) else mask
    if len(lead) == 1:
        return mask
    if all(size == 1 for size in given[:-3]):
        return mask.reshape(1, *given[-3:])
    return mask.expand(*lead, *given[-3:]).reshape(-1, *given[-3:])


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query over the keys, as `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (..., H, T, D), float32, float64, bfloat16 or float16; (T, D) and (H, T, D) work too.
        key: (..., H, S, D).
        value: (..., H, S, Dv). Inputs are read in place whatever their strides, if their last is 1.
        attn_mask: broadcasts to (..., H, T, S); bool (True attends) or floating (added to the scores).
        dropout_p: probability of dropping a weight; the mask comes from torch's default generator's seed and
            is recomputed, not stored, for the backward pass.
        is_causal: query i attends to keys 0 to i.
        scale: factor of the scores, 1/sqrt(D) if None.
        enable_gqa: key and value may have fewer heads, each serving a group of consecutive query heads.
        return_lse: also return the logarithm of the sum of exponentials of each row's scores.

    Returns:
        (..., H, T, Dv) over (..., T, H, Dv) memory; with return_lse also lse (..., H, T), float32 (float64
        for float64 inputs). A row that attends to nothing gives 0, its lse -inf.

    Raises:
        ValueError: if shapes or devices disagree, dropout_p is no probability, or is_causal meets a mask.
        TypeError: if dtypes disagree or are not floating-point.
        BackendError: if a forced backend cannot serve the call.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (
            x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in (query, key, value)
        )
    _check_inputs(query, key, value)
    if attn_mask is not None:
        _check_mask(attn_mask, is_causal, query)
    dropout_p = _dropout.check_probability(_NAME, dropout_p)
    q, k, v, lead = _as_4d(query, key, value, enable_gqa)
    mask = None
    if attn_mask is not None:
        batch = query.dim() - 3 if query.dim() < 4 else 0
        mask = _mask_4d(attn_mask, lead if batch == 0 else torch.Size((1,)), (q.shape[1], q.shape[2], k.shape[2]))
    if scale is None:
        scale = 1.0 / math.sqrt(max(q.shape[-1], 1))
    out, lse = _attend(q, k, v, mask, is_causal, scale, dropout_p, return_lse)
    if query.dim() != 4:
        heads = () if query.dim() == 2 else (q.shape[1],)
        out = out.reshape(*lead, *heads, *out.shape[-2:])
        lse = lse if lse is None else lse.reshape(*lead, *heads, lse.shape[-1])
    return (out, cast(Tensor, lse)) if return_lse else out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if torch.compiler.is_compiling():
        seed = torch.randint(-(2**63), 2**63 - 1, ()) if dropout_p > 0 else None
        return torch.ops.fastlm.attention(q, k, v, mask, seed, is_causal, scale, dropout_p)
    traced = must_trace(q, k, v, mask)
    backend = "reference" if traced else choose(_NAME, _request(q, v, mask, dropout_p, return_lse))
    if backend == "torch":
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=gqa), None
    options = _Options(is_causal, scale, dropout_p, _dropout.draw_seed() if dropout_p > 0 else 0)
    if backend == "reference":
        return attention_ref(q, k, v, mask, *options)
    q, k, v = map(_unit_stride, (q, k, v))
    if needs_grad(q, k, v, mask):
        return _Attention.apply(q, k, v, mask, options, backend)
    return KERNELS[backend].attention_fwd(q, k, v, mask, *options, lse=return_lse)
