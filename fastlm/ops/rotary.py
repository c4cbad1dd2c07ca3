"""Rotary position embedding (Su et al. 2021): pairs of a head's elements turn by an angle of their position.

y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin, over the first 2 R elements; the rest pass unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.dispatch import Backend, LazyModule, always, choose, must_trace, needs_grad, request_of
from .._core.registry import Draw, register
from ..backends import cpu as _native
from ..backends.conditions import cpu_unsupported, triton_unsupported
from ..backends.cpu import rotary as _kernels
from ._autograd import is_batch

KERNELS: dict[str, Any] = {"cpu": _kernels, "triton": LazyModule("fastlm.kernels.rotary")}


def rotary_ref(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The definition, in fp32 or wider."""
    wide = _native.compute_dtype(x.dtype)
    R = cos.shape[-1]
    cos, sin = (t.to(wide) if t.dim() == 2 else t.to(wide).unsqueeze(1) for t in (cos, sin))
    turned = x[..., : 2 * R].to(wide)
    x1, x2 = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :R], turned[..., R:])
    pair = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y = torch.stack(pair, -1).reshape(turned.shape) if interleaved else torch.cat(pair, -1)
    return torch.cat((y.to(x.dtype), x[..., 2 * R :]), -1)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Rotary(torch.autograd.Function):
    """A rotation is its own inverse's gradient, so backward is this function again, to any order."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved, inverse, backend):
        ctx.save_for_backward(cos, sin)
        ctx.options = interleaved, inverse, backend
        return KERNELS[backend].rotary(_unit_stride(x), cos, sin, interleaved, inverse)

    @staticmethod
    def backward(ctx, dy):
        interleaved, inverse, backend = ctx.options
        cos, sin = ctx.saved_tensors
        if is_batch(dy):
            return rotary_ref(dy, cos, sin if inverse else -sin, interleaved), None, None, None, None, None
        dx = _Rotary.apply(dy, cos, sin, interleaved, not inverse, backend)
        return dx, None, None, None, None, None


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"rotary: x has shape {tuple(x.shape)}, expected (B, H, L, D)")
    B, _, L, D = x.shape
    for name, t in (("x", x), ("cos", cos), ("sin", sin)):
        if not t.is_floating_point():
            raise TypeError(f"rotary: {name} has dtype {t.dtype}, expected a floating-point dtype")
        if t.device != x.device:
            raise ValueError(f"rotary: {name} is on {t.device}, x is on {x.device}")
    if tuple(cos.shape[:-1]) not in ((L,), (B, L)) or cos.dim() < 2 or 2 * cos.shape[-1] > D:
        raise ValueError(
            f"rotary: cos has shape {tuple(cos.shape)}, expected ({L}, R) or ({B}, {L}, R) with 2 R <= {D} to match x"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"rotary: sin has shape {tuple(sin.shape)}, expected {tuple(cos.shape)} to match cos")
    if needs_grad(cos, sin):
        raise ValueError("rotary: cos or sin requires a gradient, which this op does not have; detach them")


def _draw(draw: Draw) -> list[dict[str, Any]]:
    x = draw(2, 4, 6, 11)
    return [
        {"x": x, "cos": draw(6, 4), "sin": draw(6, 4)},
        {"x": x, "cos": draw(2, 6, 5), "sin": draw(2, 6, 5), "interleaved": True},
    ]


@register(
    reference=rotary_ref,
    backends=(
        Backend("cpu", cpu_unsupported),
        Backend("triton", triton_unsupported, needs_proof=True),
        Backend("reference", always),
    ),
    differentiable=("x",),
    draw=_draw,
)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary position embedding of queries or keys.

    Args:
        x: (B, H, L, D), float32, float64, bfloat16 or float16; any strides.
        cos, sin: (L, R) for the positions of all sequences, or (B, L, R), of any floating-point dtype; 2 R <= D.
            No gradient reaches them.
        interleaved: pairs are neighbours (2 i, 2 i + 1), as in the paper, instead of (i, i + R), as in
            Hugging Face's Llama and GPT-NeoX.

    Returns:
        Like x, computed in fp32 or wider; elements from 2 R on are x's.

    Raises:
        ValueError: if shapes or devices disagree, or cos or sin requires a gradient.
        TypeError: if a tensor is not floating-point.
        BackendError: if a forced backend cannot serve the call.
    """
    _check(x, cos, sin)
    if must_trace(x, cos, sin):
        return rotary_ref(x, cos, sin, interleaved)
    backend = choose("rotary", ("cpu", x.dtype, ()) if x.is_cpu else request_of(x))
    if backend == "reference":
        return rotary_ref(x, cos, sin, interleaved)
    cos, sin = cos.contiguous(), sin.contiguous()
    if needs_grad(x):
        return _Rotary.apply(x, cos, sin, interleaved, False, backend)
    return KERNELS[backend].rotary(_unit_stride(x), cos, sin, interleaved, False)
