"""Which library multiplies large matrices on a CPU: fastlm's own GEMM, MKL or oneDNN; no gradients."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..backends import cpu as _native
from ..backends.cpu import gemm as _kernels
from . import _thresholds


@functools.cache
def has_tiles() -> bool:
    return "amx" in _native.cpu_isas()


def leads(dtype: torch.dtype) -> bool:
    """Whether our matmul of large matrices of this dtype is faster than the libraries' on this CPU.

    It is with AVX-512, and in bf16 with its dot products, but on Intel's CPUs: MKL and oneDNN make as much of these
    there, and more of AMX (docs/design/linear.md).
    """
    return _kernels.gemm_serves(dtype) and not _native.is_intel()


def suits(dtype: torch.dtype, multiplications: int, gradient: bool = False) -> bool:
    """Whether our own GEMM is worth its call on the CPU, perhaps with the matmuls of its gradients."""
    least = _thresholds.SMALL_IN_TRAINING if gradient else _thresholds.SMALL_PRODUCT
    return multiplications > least and leads(dtype)


def too_deep(a: Tensor) -> bool:
    """Whether sums over the columns of a (..., K) have too many terms for our own GEMM, which rounds at their end."""
    deepest = _thresholds.DEEPEST if a.stride(-1) == 1 else _thresholds.DEEPEST_BELOW
    return a.shape[-1] > deepest


def as_matrix(x: Tensor) -> Tensor:
    """(..., K) -> (M, K), also where K is 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _side_by_side(x: Tensor) -> Tensor:
    """x (M, N), or a copy where neither its rows nor its columns are contiguous."""
    rows = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return x if rows or (x.stride(0) == 1 and x.stride(1) >= x.shape[0]) else x.contiguous()


def _by_ours(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> Tensor:
    if out.stride(1) != 1 and out.shape[1] > 1:
        made = _by_ours(a, b, out.new_empty(out.shape), bias)
        return out.add_(made) if add else out.copy_(made)
    _kernels.gemm(_side_by_side(a), _side_by_side(b), out, None if bias is None else bias.float().contiguous(), add)
    return out


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (K, N) + bias (N,), in halves where oneDNN would leave a thread idle; no gradients."""
    rows, columns = a.shape[0], b.shape[1]
    out = a.new_empty(rows, columns) if out is None else out
    rounded = out.dtype is not torch.float32
    if a.is_cpu and suits(a.dtype, a.numel() * columns) and not (rounded and too_deep(a)):
        return _by_ours(a, b, out, bias)
    halves = (
        rows in _thresholds.LONE_ROWS
        and columns in _thresholds.LONE_COLUMNS
        and a.dtype is torch.bfloat16
        and a.device.type == "cpu"
        and torch.get_num_threads() == 2
        and has_tiles()
    )
    step = -(-rows // 2) if halves else max(rows, 1)
    for i in range(0, rows, step):
        part = slice(i, i + step)
        if bias is None:
            torch.mm(a[part], b, out=out[part])
        else:
            torch.addmm(bias, a[part], b, out=out[part])
    return out


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's dtype, which may be wider: then by oneDNN in quarters of the rows, which pack less.

    The extra memory of linear_cross_entropy falls from 0.12 to 0.10 of the logits by that (docs/design/linear.md).
    """
    if total.dtype is torch.float32 and a.is_cpu and suits(a.dtype, a.numel() * b.shape[1]):
        _by_ours(a, b, total, add=True)
        return
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
        return
    rows = a.shape[0]
    step = max(1, rows) if total.device.type != "cpu" else max(256, -(-rows // 4))
    for i in range(0, rows, step):
        total[i : i + step] += multiply(a[i : i + step], b)
