"""Matrix products on a CPU by whichever library is the faster, and bf16 copies of weights for training in bfloat16."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.dispatch import must_trace, needs_grad, products_are_watched
from .._core.torch_private import version_of
from ..backends import cpu as _native
from ..backends.cpu import gemm as _kernels
from ._autograd import by_reference
from ._thresholds import (
    DEEPEST,
    DEEPEST_BELOW,
    LONE_COLUMNS,
    LONE_ROWS,
    MANY_CLASSES,
    SMALL_IN_TRAINING,
    SMALL_PRODUCT,
)


class Copy:
    """A parameter rounded to bf16, and the version of the parameter that it was made of."""

    def __init__(self, parameter: Tensor):
        self.tensor = parameter.detach().to(torch.bfloat16)
        self.version = version_of(parameter)


def attach_copy(parameter: Tensor) -> None:
    """Let an fp32 CPU parameter carry its values in bf16; `fastlm.training.AdamW` refreshes them."""
    parameter.fastlm_copy = Copy(parameter)  # type: ignore[attr-defined]


def copy_of(parameter: Tensor) -> Tensor | None:
    """The copy that a parameter carries, if it still fits it; its values may be old."""
    copy = getattr(parameter, "fastlm_copy", None)
    if copy is None or copy.tensor.shape != parameter.shape or copy.tensor.device != parameter.device:
        return None
    return copy.tensor


def rounded(parameter: Tensor) -> Tensor:
    """A parameter in bf16, without gradient: its copy where that is up to date, else newly made."""
    tensor = copy_of(parameter)
    if tensor is not None and parameter.fastlm_copy.version == version_of(parameter):  # type: ignore[attr-defined]
        return tensor
    return parameter.detach().to(torch.bfloat16)


def serves(*tensors: Tensor | None) -> bool:
    """Whether a call under autocast is training in bfloat16 on a CPU, which the functions here are for."""
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and needs_grad(*tensors)
        and not must_trace(*tensors)
        and all(t is None or t.device.type == "cpu" for t in tensors)
    )


@functools.cache
def _has_tiles() -> bool:
    return "amx" in _native.cpu_isas()


def mkl_lags() -> bool:
    """Whether this CPU has AVX-512 that MKL makes little of."""
    return "avx512" in _native.cpu_isas() and not _native.is_intel()


def leads(dtype: torch.dtype) -> bool:
    """Whether our products of large matrices of this dtype are faster than the libraries' on this CPU.

    They are for AVX-512, and in bf16 for its dot products: Intel's libraries make as much of these on Intel's CPUs, and
    more of AMX. What was measured on another stands in csrc/cpu/gemm.cpp.
    """
    return _kernels.gemm_serves(dtype) and not _native.is_intel()


def suits(x: Tensor, multiplications: int, gradient: bool = False) -> bool:
    """Whether a product of x, with so many multiplications and perhaps those of gradients, is ours."""
    large = multiplications > (SMALL_IN_TRAINING if gradient else SMALL_PRODUCT)
    return large and x.is_cpu and not torch.compiler.is_compiling() and leads(x.dtype)


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
    too_deep = out.dtype is not torch.float32 and a.shape[1] > (DEEPEST if a.stride(1) == 1 else DEEPEST_BELOW)
    if suits(a, a.numel() * columns) and not too_deep:
        return _by_ours(a, b, out, bias)
    halves = (
        rows in LONE_ROWS
        and columns in LONE_COLUMNS
        and a.dtype is torch.bfloat16
        and a.device.type == "cpu"
        and torch.get_num_threads() == 2
        and _has_tiles()
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
    """total += a @ b, in total's dtype, which may be wider: then by oneDNN in quarters of the rows.

    With 1024 x 2048 x 768 in bf16, quarters take 1.2 times as long as halves, but oneDNN packs less of b for them: the
    extra memory of linear_cross_entropy falls from 0.12 to 0.10 of the logits or less, and its time rises by a
    twentieth.
    """
    if total.dtype is torch.float32 and suits(a, a.numel() * b.shape[1]):
        _by_ours(a, b, total, add=True)
        return
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
        return
    rows = a.shape[0]
    step = max(1, rows) if total.device.type != "cpu" else max(256, -(-rows // 4))
    for i in range(0, rows, step):
        total[i : i + step] += multiply(a[i : i + step], b)


def _rows_that_count(d: Tensor, x: Tensor) -> Tensor | None:
    """The rows of the gradient d (M, N) that are not all zeros, where they are few; x (M, K) is what d is of.

    A row of zeros adds nothing to the weight's gradient unless its x is not finite: NaN then, as without this.
    """
    if d.shape[1] < MANY_CLASSES or not d.is_cpu:
        return None
    zero = d[:, 0] == 0
    if int(zero.sum()) <= 0.1 * d.shape[0]:
        return None
    zero &= (d.amax(1) == 0) & (d.amin(1) == 0)
    if int(zero.sum()) <= 0.1 * d.shape[0] or not bool(x[zero].isfinite().all()):
        return None
    return (~zero).nonzero().squeeze(1)


def _rows(x: Tensor) -> Tensor:
    """(..., K) -> (M, K), also where K is 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


class _Linear(torch.autograd.Function):
    """y = x weight^T + bias in x's dtype, fp32 or bf16, for weights in it or in fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        w = rounded(weight) if x.dtype is torch.bfloat16 else weight
        ctx.save_for_backward(x, w, weight)
        ctx.with_bias = bias is not None
        rows = _rows(x)
        y = x.new_empty(*x.shape[:-1], w.shape[0])  # a view made here could not be edited in place afterwards
        multiply(rows, w.t(), None if bias is None else bias.to(x.dtype), y.view(rows.shape[0], w.shape[0]))
        return y

    @staticmethod
    def backward(ctx, grad):
        x, w, weight = ctx.saved_tensors
        rows, d = _rows(x), _rows(grad)
        bias_grad = d.sum(0) if ctx.with_bias and ctx.needs_input_grad[2] else None
        if by_reference(grad):
            return (d @ weight.to(d.dtype)).view_as(x), d.t() @ rows, bias_grad
        dx = dw = None
        kept = _rows_that_count(d, rows)
        if kept is not None:
            d, every, rows = d[kept], rows, rows[kept]
        if ctx.needs_input_grad[0]:
            dx = multiply(d, w)
            dx = (dx if kept is None else torch.zeros_like(every).index_copy_(0, kept, dx)).view_as(x)
        if ctx.needs_input_grad[1]:  # laid out as the weight is
            dw = multiply(d.t(), rows) if weight.is_contiguous() else multiply(rows.t(), d).t()
        return dx, dw, bias_grad


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by the faster library, with the weight's bf16 copy under autocast to bfloat16 in training on a CPU."""
    if products_are_watched():
        from .linear import chosen

        return chosen(x, weight, bias)
    if x.dtype is torch.bfloat16 and weight.dtype is torch.float32 and serves(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    if weight.dim() == 2 and (suits(x, x.numel() * weight.shape[0]) or trains_classes(x, weight)):
        return _large_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def trains_classes(x: Tensor, weight: Tensor) -> bool:
    """Whether this is an output layer of many classes in training, whose backward pass may have rows to leave out."""
    many = weight.shape[0] >= MANY_CLASSES and x.numel() * weight.shape[0] > SMALL_IN_TRAINING
    return many and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and needs_grad(x, weight)


def _large_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A large product, unless another dtype, tracing or a mistake in its arguments makes it PyTorch's."""
    fits = weight.dtype is x.dtype and x.shape[-1] == weight.shape[1] and weight.is_cpu
    fits = fits and (bias is None or (bias.dtype is x.dtype and bias.shape == weight.shape[:1] and bias.is_cpu))
    if not fits or torch.is_autocast_enabled("cpu") or must_trace(x, weight, bias):
        return F.linear(x, weight, bias)
    if not needs_grad(x, weight, bias):
        return multiply(_rows(x), weight.t(), bias).view(*x.shape[:-1], weight.shape[0])
    if not (suits(x, x.numel() * weight.shape[0], gradient=True) or trains_classes(x, weight)):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class _TiedEmbedding(torch.autograd.Function):
    """The rows that tokens look up, and the whole table for the output projection, in bf16 where that is wanted.

    The lookup's gradient is added to the projection's in place: a second gradient of the table's size, zero but for
    those rows, is neither made nor added.
    """

    @staticmethod
    def forward(ctx, weight, tokens, low):
        ctx.save_for_backward(weight, tokens)
        ctx.set_materialize_grads(False)
        return F.embedding(tokens, weight), (rounded(weight) if low else weight).detach()

    @staticmethod
    def backward(ctx, d_rows, d_table):
        weight, tokens = ctx.saved_tensors
        if d_rows is None:
            return d_table, None, None
        flat, d_rows = tokens.flatten(), _rows(d_rows)
        if d_table is None:
            return torch.ops.aten.embedding_dense_backward(d_rows, flat, weight.shape[0], -1, False), None, None
        wanted = getattr(weight, "grad_dtype", weight.dtype) if weight.is_leaf else weight.dtype
        if wanted not in (None, d_table.dtype):
            d_table = d_table.to(wanted)
        # Each row is added once, however often its token occurs: rounded once, and in a fixed order on a GPU too.
        found, inverse = flat.unique(return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(d_rows, inverse, found.numel(), -1, False)
        sums = (sums + d_table[found]).to(d_table.dtype)
        if by_reference(d_rows, d_table):
            return d_table.index_copy(0, found, sums), None, None
        return d_table.index_copy_(0, found, sums), None, None


def tied_embedding(weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(rows that the tokens look up, the table as a projection's weight), with one gradient for both uses."""
    if not needs_grad(weight) or must_trace(weight, tokens):
        return F.embedding(tokens, weight), weight
    return _TiedEmbedding.apply(weight, tokens, serves(weight))


def prepare_weights(weights: list[Tensor], accumulate: bool) -> None:
    """Give fp32 CPU weights bf16 copies, for training under autocast to bfloat16 with `fastlm.training.AdamW`.

    Args:
        accumulate: whether a step adds up several gradients; they are then kept in fp32. A single one stays in the
            bf16 in which the product made it.
    """
    for weight in weights:
        attach_copy(weight)
        if not accumulate:
            weight.grad_dtype = torch.bfloat16
