"""Scaled dot-product attention (Vaswani et al. 2017) by an online softmax (Dao et al. 2022).

_attention_reference.py has the definition, _attention_inputs.py what is accepted, attention_varlen.py the
form for packed sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import dropout as _dropout
from .._core.dispatch import (
    Backend,
    LazyModule,
    Request,
    always,
    as_operator,
    choose,
    must_trace,
    needs_grad,
    request_of,
)
from .._core.registry import Draw, register
from ..backends import cpu as _native
from ..backends.conditions import cpu_unsupported, cuda_unsupported, triton_unsupported
from ..backends.cpu import attention as _kernels
from ._attention_inputs import (
    Window,
    as_4d,
    autocast,
    check_mask,
    check_softcap,
    check_tensors,
    check_window,
    mask_4d,
    unit_stride,
)
from ._attention_reference import Options, attention_backward_ref, attention_ref
from ._autograd import by_kernels, operator
from ._thresholds import SHORT_DECODE

KERNELS: dict[str, Any] = {
    "cpu": _kernels,
    "triton": LazyModule("fastlm.kernels.attention"),
    "cuda": LazyModule("fastlm.backends.cuda.attention"),
}
_NAME = "scaled_dot_product_attention"
OBSERVERS: list[Callable[..., None]] = []  # called with what decides the weights, while somebody watches


def _torch_unsupported(request: Request) -> str | None:
    features = dict(request.features)
    if features["lse"]:
        return "it returns no log-sum-exp"
    if features["dropout"]:
        return "its dropout draws another mask for the same seed"
    if features["window"]:
        return "it has no window"
    if features["softcap"]:
        return "it has no soft cap"
    return None


def _too_wide(request: Request) -> str | None:
    head_dim = dict(request.features)["head_dim"]
    return f"its kernels take head sizes up to 256, not {head_dim}" if head_dim > 256 else None


def triton_attention_unsupported(request: Request) -> str | None:
    return _too_wide(request) or triton_unsupported(request)


def cuda_attention_unsupported(request: Request) -> str | None:
    return _too_wide(request) or cuda_unsupported(request)


def _slower(request: Request) -> str | None:
    short = dict(request.features).get("short_decode", False)
    return "PyTorch's is faster for one query without mask and gradients, and few keys" if short else None


def _is_short(keys: int, dtype: torch.dtype) -> bool:
    """Whether PyTorch's kernel is the faster one for one query and so many keys of all heads and sequences."""
    return 0 < keys <= SHORT_DECODE.get(dtype, 0)


def _is_short_decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> bool:
    """The same, where every key is attended to: PyTorch lets a NaN of the others through."""
    B, H, T, D = q.shape
    if T != 1 or mask is not None or options.is_causal or k.shape[1] != H or v.shape[3] != D:
        return False
    return _is_short(B * H * k.shape[2], q.dtype) and not needs_grad(q, k, v)


def _rest_like(q: Tensor, mask: Tensor | None) -> Tensor | None:
    """Room for what rounding takes from the log-sum-exp; None without an additive mask, where that does not show.

    Beside the lowest number of a dtype it takes the logarithm of the sum, and the weights of a row with nothing else
    would come back from the log-sum-exp as ones.
    """
    if mask is None or mask.dtype == torch.bool:
        return None
    return q.new_empty(q.shape[:3], dtype=_native.compute_dtype(q.dtype))


def rest_of(kernels: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lse: Tensor, options: Options):
    """The same, made anew for a backward pass that got the log-sum-exp alone; None where it is small on a CPU."""
    rest = _rest_like(q, mask)
    if rest is None or (lse.is_cpu and not ((lse.abs() > 2**12) & lse.isfinite()).any()):
        return None
    kernels.attention_fwd(q, k, v, mask, *options, rest=rest)
    return rest


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, options, backend):
        rest = _rest_like(q, mask)
        out, lse = KERNELS[backend].attention_fwd(q, k, v, mask, *options, rest=rest)
        ctx.save_for_backward(q, k, v, mask, out, lse, rest)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @by_kernels(attention_ref, tensors=4)
    def backward(ctx, dout, dlse):
        q, k, v, mask, out, lse, rest = ctx.saved_tensors
        need = ctx.needs_input_grad
        dout = torch.zeros_like(out) if dout is None else unit_stride(dout)
        dq, dk, dv, dmask = KERNELS[ctx.backend].attention_bwd(
            dout, None if dlse is None else dlse.contiguous(), q, k, v, mask, out, lse, *ctx.options,
            inputs=any(need[:3]), mask_grad=need[3], rest=rest,
        )  # fmt: skip
        return dq, dk, dv, None if dmask is None else dmask.to(mask.dtype)


# Under torch.compile attention is one operator.


def op_options(
    is_causal: bool, scale: float, dropout_p: float, seed: int, left: int, right: int, cap: float
) -> Options:
    """An operator's arguments as kernels take them."""
    right = 0 if is_causal else right
    return Options(right == 0, scale, dropout_p, seed, left, right, cap)


def _op_backend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> str:
    backend = choose(_NAME, _request(q, k, v, mask, options, lse=True, grad=True))
    return backend if backend in KERNELS else "reference"


def _op_fake(q, k, v, mask, *given):
    B, H, T, _ = q.shape
    out = q.new_empty(B, T, H, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(B, H, T, dtype=_native.compute_dtype(q.dtype))


def _op_gradients(ctx, dout, dlse):
    q, k, v, mask, seed, out, lse = ctx.saved_tensors
    mask_grad = ctx.needs_input_grad[3]
    dout = torch.zeros_like(out) if dout is None else dout
    *grads, dmask = torch.ops.fastlm.attention_backward(
        dout, dlse, q, k, v, mask, seed, out, lse, *ctx.options, mask_grad
    )
    return *grads, dmask if mask_grad else None


@operator("attention", _op_fake, _op_gradients)
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    options = op_options(
        is_causal, scale, dropout_p, _dropout.traced_seed(seed, q.device), window_left, window_right, softcap
    )
    backend = _op_backend(q, k, v, mask, options)
    if backend in KERNELS:
        return KERNELS[backend].attention_fwd(*map(unit_stride, (q, k, v)), mask, *options)
    out, lse = attention_ref(q, k, v, mask, *options)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _backward_fake(dout, dlse, q, k, v, mask, *given):
    dmask = mask.new_empty(mask.shape) if given[-1] else q.new_empty(0)
    return *(_native.heads_like(unit_stride(x)) for x in (q, k, v)), dmask


@operator("attention_backward", _backward_fake)
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
    window_left: int,
    window_right: int,
    softcap: float,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = op_options(
        is_causal, scale, dropout_p, _dropout.traced_seed(seed, q.device), window_left, window_right, softcap
    )
    backend = _op_backend(q, k, v, mask, options)
    dout, q, k, v = map(unit_stride, (dout, q, k, v))
    dlse = None if dlse is None else dlse.contiguous()
    if backend in KERNELS:
        rest = rest_of(KERNELS[backend], q, k, v, mask, lse, options)
        dq, dk, dv, dmask = KERNELS[backend].attention_bwd(
            dout, dlse, q, k, v, mask, out, lse, *options, mask_grad=mask_grad, rest=rest
        )
    else:
        dq, dk, dv, dmask = attention_backward_ref(dout, dlse, q, k, v, mask, options, mask_grad)
    return dq, dk, dv, q.new_empty(0) if mask is None or dmask is None else dmask.to(mask.dtype)


def _request(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, lse: bool, grad: bool | None = None
) -> tuple:
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    left, right = options.window_left, options.window_right
    features = (
        ("head_dim", max(q.shape[-1], v.shape[-1])),
        ("mask", kind),
        ("dropout", options.dropout_p > 0),
        ("lse", lse),
        ("window", left >= 0 or right > 0 or (right == 0 and mask is not None)),  # more than is_causal alone
        ("softcap", options.softcap > 0),
        ("short_decode", q.is_cpu and _is_short_decode(q, k, v, mask, options)),
    )
    extents = (q.shape[0] * q.shape[1], q.shape[2], k.shape[2], q.shape[3]) if q.is_cuda else ()
    return request_of(q, features, extents, grad)


def _draw(draw: Draw) -> list[dict[str, Any]]:
    q, k, v = draw(2, 4, 6, 8), draw(2, 4, 7, 8), draw(2, 4, 7, 8)
    shared = {"key": k[:, :2], "value": v[:, :2], "enable_gqa": True}
    tensors = {"query": q, "key": k, "value": v}
    return [
        tensors,
        tensors | {"is_causal": True, "scale": 0.3},
        tensors | {"attn_mask": draw(6, 7) > 0, "softcap": 2.0},
        tensors | shared | {"attn_mask": draw(6, 7), "dropout_p": 0.3, "window": (3, None), "return_lse": True},
    ]


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
    window: Window | None = None,
    softcap: float | None = None,
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
    window: Window | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@register(
    reference=attention_ref,
    backends=(
        Backend("cpu", cpu_unsupported, slower=_slower),
        Backend("triton", triton_attention_unsupported, needs_proof=True),
        Backend("cuda", cuda_attention_unsupported, needs_proof=True),
        Backend("torch", _torch_unsupported),
        Backend("reference", always),
    ),
    differentiable=("query", "key", "value", "attn_mask"),
    draw=_draw,
    opaque=True,
)
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
    window: Window | None = None,
    softcap: float | None = None,
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
        window: (left, right): query i attends to keys i - left to i + right; None on a side is no limit there.
            is_causal makes right 0; attn_mask applies inside the window.
        softcap: bounds the scores smoothly, before the mask: softcap tanh(scale query key / softcap).
        return_lse: also return the logarithm of the sum of exponentials of each row's scores.

    Returns:
        (..., H, T, Dv) over (..., T, H, Dv) memory; with return_lse also lse (..., H, T), float32 (float64
        for float64 inputs). A row that attends to nothing gives 0, its lse -inf. Any extent may be 0.

    Keys that a row does not attend to, by window or by a mask of False or -inf, count for nothing in it: their
    infinities and NaN reach neither its output nor its query's gradient, nor the gradients of keys and values that no
    row shares with them. The reference promises that of keys that no row of a head attends to, PyTorch's operator
    nothing (it is not chosen over the CPU's kernels where there are such keys), and Hopper's own CUDA kernels not for
    gradients. A finite number in a mask closes no key, be it the lowest
    one: a row of it alone gives the mean of the values.

    Raises:
        ValueError: if shapes or devices disagree, dropout_p is no probability, is_causal meets a mask, or window or
            softcap is out of range.
        TypeError: if dtypes disagree or are not floating-point.
        BackendError: if a forced backend cannot serve the call.
    """
    if dropout_p == 0 and window is softcap is None and not (return_lse or OBSERVERS):
        quick = _quick(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if quick is not None:
            return quick
    query, key, value = autocast(query, key, value)
    check_tensors(_NAME, query, key, value)
    for observe in OBSERVERS:
        observe(query, key, attn_mask, is_causal=is_causal, scale=scale, window=window, softcap=softcap)
    if attn_mask is not None:
        check_mask(_NAME, attn_mask, is_causal, query)
    dropout_p = _dropout.check_probability(_NAME, dropout_p)
    left, right = check_window(_NAME, window, is_causal)
    cap = check_softcap(_NAME, softcap)
    q, k, v, lead = as_4d(_NAME, query, key, value, enable_gqa)
    mask = None
    if attn_mask is not None:
        batch = query.dim() - 3 if query.dim() < 4 else 0
        sizes = q.shape[1], q.shape[2], k.shape[2]
        mask = mask_4d(_NAME, attn_mask, lead if batch == 0 else torch.Size((1,)), sizes)
    if scale is None:
        scale = 1.0 / math.sqrt(max(q.shape[-1], 1))
    out, lse = _attend(q, k, v, mask, Options(right == 0, scale, dropout_p, 0, left, right, cap), return_lse)
    if query.dim() != 4:
        heads = () if query.dim() == 2 else (q.shape[1],)
        out = out.reshape(*lead, *heads, *out.shape[-2:])
        lse = lse if lse is None else lse.reshape(*lead, *heads, lse.shape[-1])
    return (out, cast(Tensor, lse)) if return_lse else out


_PLAIN_REQUESTS: dict[tuple, tuple] = {}


def _quick(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor | None:
    """The result for plain 4-d CPU tensors without gradients; None where a call has to be looked at more closely.

    What the general way checks and builds takes 15 us, for a kernel of 3 us where there is one row.
    """
    if not (q.is_cpu and q.dim() == 4) or must_trace(q, k, v, mask) or needs_grad(q, k, v, mask):
        return None
    dtype, keys = q.dtype, k.shape
    B, H, T, D = q.shape
    if keys != v.shape or len(keys) != 4 or keys[0] != B or keys[3] != D or D == 0:
        return None
    grouped = keys[1] != H
    if grouped and not (enable_gqa and keys[1] and H % keys[1] == 0):
        return None
    if k.dtype is not dtype or v.dtype is not dtype or dtype not in _native.TYPE_CODE:
        return None
    if not (k.is_cpu and v.is_cpu) or torch.is_autocast_enabled("cpu"):
        return None
    if mask is not None and (is_causal or not _spans(mask, (B, H, T, keys[2]), dtype)):
        return None
    short = T == 1 and mask is None and not (grouped or is_causal) and _is_short(B * H * keys[2], dtype)
    kind = dtype, D, short, None if mask is None else mask.dtype
    request = _PLAIN_REQUESTS.get(kind)
    if request is None:
        request = _PLAIN_REQUESTS[kind] = _request(q, k, v, mask, Options(is_causal, 1.0), False)
    backend = choose(_NAME, request)
    if backend == "torch":
        return _torch_attention(q, k, v, mask, is_causal, scale)
    if backend != "cpu" or not (q.stride(3) == k.stride(3) == v.stride(3) == 1):
        return None
    scale = D**-0.5 if scale is None else scale
    if grouped or mask is not None:
        right = 0 if is_causal else -1
        return _kernels.attention_fwd(q, k, v, mask, is_causal, scale, window_right=right, lse=False)[0]
    return _kernels.attention_plain_fwd(q, k, v, is_causal, scale)


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """PyTorch's operator, which up to 2.10 ends the process where there are no heads: that is left to the reference."""
    if q.shape[1] == 0:
        return attention_ref(q, k, v, mask, *Options(is_causal, q.shape[3] ** -0.5 if scale is None else scale))[0]
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=gqa)


def _spans(mask: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a mask is 4-d, on the CPU, boolean or of `dtype`, and has `sizes` or ones for extents."""
    if mask.dim() != 4 or not mask.is_cpu or (mask.dtype is not torch.bool and mask.dtype is not dtype):
        return False
    return all(given == 1 or given == size for given, size in zip(mask.shape, sizes, strict=True))


def seed_to_trace(dropout_p: float) -> Tensor | None:
    """Dropout's seed for the registered op, where it is a tensor, so that each run draws its own."""
    return torch.randint(-(2**63), 2**63 - 1, ()) if dropout_p > 0 else None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`options` has its seed still to be drawn."""
    is_causal, scale, dropout_p, _, left, right, cap = options
    if as_operator(q, k, v, mask):
        seed = seed_to_trace(dropout_p)
        return torch.ops.fastlm.attention(q, k, v, mask, seed, is_causal, scale, dropout_p, left, right, cap)
    traced = must_trace(q, k, v, mask)
    backend = "reference" if traced else choose(_NAME, _request(q, k, v, mask, options, return_lse))
    if backend == "torch":
        return _torch_attention(q, k, v, mask, is_causal, scale), None
    if dropout_p > 0:
        options = options._replace(seed=_dropout.draw_seed(q.device))
    if backend == "reference":
        return attention_ref(q, k, v, mask, *options)
    q, k, v = map(unit_stride, (q, k, v))
    if needs_grad(q, k, v, mask):
        return _Attention.apply(q, k, v, mask, options, backend)
    return KERNELS[backend].attention_fwd(q, k, v, mask, *options, lse=return_lse)
