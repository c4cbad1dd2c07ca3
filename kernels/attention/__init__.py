"""Attention for whole batches and for packed sequences: what fastlm.ops calls."""

from __future__ import annotations

from torch import Tensor

from fastlm.backends.cpu import heads_like

from .backward import launch_backward
from .forward import launch_forward
from .tables import geometry


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *options, lse: bool = True, rest: Tensor | None = None
):
    """As fastlm.backends.cpu.attention.attention_fwd."""
    out, sums = launch_forward(q, k, v, mask, None, None, q.shape[0], options, lse, rest)
    return out.transpose(1, 2), sums


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
    size = geometry(q, k, v, q.shape[0], *options[4:6])
    grads = (heads_like(q), heads_like(k), heads_like(v)) if inputs else None
    dmask = launch_backward(dout, dlse, q, k, v, mask, None, None, out, lse, size, options, grads, mask_grad, rest)
    return *(grads or (None, None, None)), dmask


def attention_varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *options, lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As fastlm.backends.cpu.attention.attention_varlen_fwd."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, sums = launch_forward(q, k, v, None, cu_q, cu_k, cu_q.shape[0] - 1, options, lse)
    return out[0], sums if sums is None else sums[0]


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
    dout, q, k, v, out, dq, dk, dv = (x.transpose(0, 1)[None] for x in (dout, q, k, v, out, *grads))
    size = geometry(q, k, v, cu_q.shape[0] - 1, *options[4:6])
    launch_backward(dout, dlse, q, k, v, None, cu_q, cu_k, out, lse, size, options, (dq, dk, dv), False)
    return grads
