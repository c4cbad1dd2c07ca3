"""Gradients of attention, without atomics: each is summed by the one program that writes it.

With weights p_ij = exp(s_ij - lse_i - rest_i), their dropout factors f_ij and delta_i = dout_i . out_i - dlse_i:
  dv_j = sum_i f_ij p_ij dout_i,   ds_ij = p_ij (f_ij dout_i . v_j - delta_i),
  dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i   (a softcap c multiplies ds by 1 - (s / c)^2).
A first kernel makes delta. One pass goes over the queries for each tile of keys (dk, dv), another over the keys for
each tile of queries (dq): the scores are made twice, and nothing is added across programs. The query heads that share
a key head are summed inside its program in order: partial sums would write and read two fp32 matrices a head, and
splitting them only where few programs run would make a row's bits depend on the batch around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import architecture, dropout_arguments, kernel, on_device_of
from .arguments import View, at
from .backward_keys import KEYS, attention_bwd_keys_kernel
from .backward_mask import MASK, mask_gradient
from .backward_queries import QUERIES, attention_bwd_queries_kernel
from .tables import Geometry, blocks_for, compiled_for, mask_strides, swizzle_heads
from .tiles import load_rows

DELTA_ROWS = 64


@kernel(do_not_specialize=["H", "T", "tiles"])
def _attention_bwd_delta_kernel(
    out_ptr,  # (B, H, T, DV)
    dout_ptr,  # (B, H, T, DV)
    dlse_ptr,  # (B, H, T) fp32 or None
    delta_ptr,  # (B, H, T) fp32
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_ot: tl.int64,
    stride_gb: tl.int64,
    stride_gh: tl.int64,
    stride_gt: tl.int64,
    H,
    T,
    tiles,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    M: tl.constexpr,
):
    """delta = sum over DV of dout out - dlse."""
    program = tl.program_id(0)
    head = program // tiles
    b, h = head // H, head % H
    row = program % tiles * M + tl.arange(0, M)
    out = at(View(out_ptr, stride_ob, stride_oh, stride_ot), b, h, 0)
    dout = at(View(dout_ptr, stride_gb, stride_gh, stride_gt), b, h, 0)
    out = load_rows(out, row, T, DV, BLOCK_DV).to(tl.float32)
    dout = load_rows(dout, row, T, DV, BLOCK_DV).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    index = head.to(tl.int64) * T + row
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + index, row < T, 0.0)
    tl.store(delta_ptr + index, delta, row < T)


def _delta(out: Tensor, dout: Tensor, dlse: Tensor | None, size: Geometry) -> Tensor:
    """(B, H, T) fp32."""
    delta = out.new_empty(out.shape[:3], dtype=torch.float32)
    tiles = triton.cdiv(size.T, DELTA_ROWS)
    if tiles * out.shape[0] * size.H:
        _attention_bwd_delta_kernel[(tiles * out.shape[0] * size.H,)](
            out, dout, dlse, delta, *out.stride()[:3], *dout.stride()[:3], size.H, size.T, tiles,
            size.head[1], size.head[3], DELTA_ROWS, num_warps=4,
        )  # fmt: skip
    return delta


def _whole_dmask(mask: Tensor | None, q: Tensor, size: Geometry) -> Tensor | None:
    """The gradient of a mask that broadcasts over nothing, for the pass over the keys; 0 where a window stops it."""
    if mask is None or mask.shape != (q.shape[0], size.H, size.T, size.S):
        return None
    return (torch.zeros_like if any(size.features) else torch.empty_like)(mask, memory_format=torch.contiguous_format)


def launch_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    size: Geometry,
    options: tuple,
    grads: tuple[Tensor, Tensor, Tensor] | None,
    mask_grad: bool,
    rest: Tensor | None = None,
) -> Tensor | None:
    """Write dq, dk and dv into `grads`, and return the mask's gradient if it is asked for.

    Tensors are (B, H, T, D) and so on; packed sequences are one batch.
    """
    _, scale, dropout_p, seed, _, _, softcap = options
    batch, Hkv, packed = q.shape[0], k.shape[1], cu_q is not None
    arch, head, masked = architecture(q.device), max(size.head[2:]), mask is not None or dropout_p > 0
    head_bytes = (size.head[0] + size.head[1]) * q.element_size()
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask_strides(mask), *dout.stride()[:3]
    scalars = float(scale), softcap, size.window_left, size.window_right, *dropout_arguments(dropout_p, seed)
    with on_device_of(q):
        delta = _delta(out, dout, dlse, size)
        dmask = _whole_dmask(mask, q, size) if mask_grad and grads is not None else None
        if grads is not None:
            dq, dk, dv = grads
            blocks = blocks_for(KEYS, arch, q.dtype, head, masked)
            tiles = triton.cdiv(size.S, blocks.N) + packed * size.B
            if tiles * batch * Hkv * size.S:
                swizzle = min(batch * Hkv, swizzle_heads(size.T, head_bytes * size.group, 1))
                attention_bwd_keys_kernel[(tiles * batch * Hkv,)](
                    q, k, v, mask, cu_q, cu_k, dout, lse, rest, delta, dk, dv,
                    *strides, *dk.stride()[:3], *dv.stride()[:3], *size[:5], tiles, batch * Hkv, swizzle, *scalars,
                    compiled_for(size, blocks, mask, softcap, dropout_p, arch),
                    num_warps=blocks.warps, num_stages=blocks.stages,
                )  # fmt: skip
            blocks = blocks_for(QUERIES, arch, q.dtype, head, masked, softcap > 0 or dmask is not None)
            tiles = triton.cdiv(size.T, blocks.M) + packed * size.B
            if tiles * batch * size.H * size.T:
                swizzle = min(batch * size.H, swizzle_heads(size.S, head_bytes, size.group))
                attention_bwd_queries_kernel[(tiles * batch * size.H,)](
                    q, k, v, mask, cu_q, cu_k, dout, lse, rest, delta, dq, dmask,
                    *strides, *dq.stride()[:3], *size[:5], tiles, batch * size.H, swizzle, *scalars,
                    compiled_for(size, blocks, mask, softcap, dropout_p, arch),
                    num_warps=blocks.warps, num_stages=blocks.stages,
                )  # fmt: skip
        if mask is None or not mask_grad or dmask is not None:
            return dmask
        blocks = blocks_for(MASK, arch, q.dtype, head, True)
        config = compiled_for(size, blocks, mask, softcap, dropout_p, arch)
        return mask_gradient(mask, q, k, v, dout, lse, rest, delta, strides, size, scalars, blocks, config)
