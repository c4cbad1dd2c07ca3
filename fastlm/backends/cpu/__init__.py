"""The only place where a tensor becomes a pointer.

Callers pass contiguous CPU tensors of checked shapes and dtypes; this module allocates outputs and
workspaces, hands over addresses and sizes, and returns tensors. Nothing is checked in C++.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import BackendError

HOW_TO_BUILD = "FASTLM_CPU=1 pip install --force-reinstall --no-deps .  in the folder of fastlm's source"


def why_missing(error: ImportError, module: str) -> str:
    """What the build left to say of `module`, if it is not there at all; else why it does not load."""
    try:
        built = (Path(__file__).parents[2] / f"{module}_missing.txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        built = ""
    why = built if built and isinstance(error, ModuleNotFoundError) else str(error)
    return f"the {module[1:].upper()} extension is not there: {why}"


_cpu: Any = None
missing_reason: str | None = None
try:
    _cpu = importlib.import_module("fastlm._cpu")
except ImportError as error:  # not built, or built for another Python
    missing_reason = why_missing(error, "_cpu")

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
TYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use, or None where the extension is missing."""
    return None if _cpu is None else ISAS[_cpu.isa()]


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets that this CPU can run, least first; empty where the extension is missing."""
    return () if _cpu is None else ISAS[: _cpu.best_isa() + 1]


def is_intel() -> bool:
    """Whether Intel made this CPU; where the extension is missing, that is assumed."""
    return _cpu is None or _cpu.is_intel()


def set_cpu_isa(name: str) -> None:
    """Choose the instruction set of the CPU kernels; FASTLM_CPU_ISA does it at import.

    Raises:
        BackendError: if the name is unknown or the CPU lacks it.
    """
    if name not in cpu_isas() or _cpu is None:
        have = ", ".join(cpu_isas()) or missing_reason
        raise BackendError(f"cpu_isa: got {name!r}, this machine has: {have}")
    _cpu.set_isa(ISAS.index(name))


if _cpu is not None and os.environ.get("FASTLM_CPU_ISA"):
    set_cpu_isa(os.environ["FASTLM_CPU_ISA"])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and sums are kept in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _weight_type(weight: Tensor | None, bias: Tensor | None) -> int:
    if weight is not None:
        return TYPE_CODE[weight.dtype]
    return 0 if bias is None else TYPE_CODE[bias.dtype]


def _chunks(M: int) -> int:
    return -(-M // _cpu.chunk_rows(M))


def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    N: int,
    eps: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """x of M rows of N -> (y, z or None, mean (M,) or None, rstd or None); weight and bias share a dtype.

    out_dtype: of y; None means x's.
    """
    M = x.numel() // N if N else 0
    stream = x if residual is None else residual
    y = torch.empty_like(x) if out_dtype in (None, x.dtype) else torch.empty_like(x, dtype=out_dtype)
    z = None if residual is None else torch.empty_like(residual)
    mean = x.new_empty(M, dtype=compute_dtype(stream.dtype)) if statistics else None
    rstd = torch.empty_like(mean) if mean is not None else None
    _cpu.layer_norm_fwd(
        x.data_ptr(), _ptr(residual), _ptr(weight), _ptr(bias), _ptr(z), y.data_ptr(), _ptr(mean), _ptr(rstd),
        M, N, eps, dropout_p, seed,
        TYPE_CODE[x.dtype], TYPE_CODE[stream.dtype], TYPE_CODE[y.dtype], _weight_type(weight, bias),
    )  # fmt: skip
    return y, z, mean, rstd


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, N: int, eps: float, dtype: torch.dtype) -> Tensor:
    """`layer_norm_fwd` where every tensor has x's dtype and y alone is wanted."""
    y = torch.empty_like(x)
    _cpu.layer_norm(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), x.numel() // N, N, eps, TYPE_CODE[dtype]
    )
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, N: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`layer_norm_fwd` of a sum where every tensor has x's dtype and (y, z) alone are wanted."""
    y, z, code = torch.empty_like(x), torch.empty_like(x), TYPE_CODE[dtype]
    _cpu.layer_norm_fwd(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), bias.data_ptr(), z.data_ptr(), y.data_ptr(), 0, 0,
        x.numel() // N, N, eps, 0.0, 0, code, code, code, code,
    )  # fmt: skip
    return y, z


def layer_norm_bwd(
    dy: Tensor,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    N: int,
    dz_in: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    x_dtype: torch.dtype | None = None,
    weight_grads: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """-> (dz, dx, dw or None, db or None); dx is dz itself without dropout and cast, dw and db in compute dtype."""
    M = z.numel() // N if N else 0
    x_dtype = x_dtype or z.dtype
    dz = torch.empty_like(z)
    dx = torch.empty_like(z, dtype=x_dtype) if dropout_p > 0 or x_dtype != z.dtype else None
    compute = compute_dtype(z.dtype)
    partial = z.new_empty(_chunks(M), 2, N, dtype=compute)  # written even where nobody asks for the sums
    dw = z.new_empty(N, dtype=compute) if weight_grads else None
    db = z.new_empty(N, dtype=compute) if weight_grads else None
    _cpu.layer_norm_bwd(
        dy.data_ptr(), z.data_ptr(), _ptr(weight), mean.data_ptr(), rstd.data_ptr(), _ptr(dz_in),
        dz.data_ptr(), _ptr(dx), partial.data_ptr(), _ptr(dw), _ptr(db),
        M, N, dropout_p, seed,
        TYPE_CODE[x_dtype], TYPE_CODE[z.dtype], TYPE_CODE[dy.dtype], _weight_type(weight, None),
    )  # fmt: skip
    return dz, dz if dx is None else dx, dw, db


# A plain elementwise call is one long row to C++; rows of this many elements let threads share it.
_FLAT_ROW = 4096


def _rows(x: Tensor, bias: Tensor | None, dropout_p: float) -> tuple[int, int]:
    """(M, N) as the GELU kernels see x: its own rows if the last dimension matters, else any that divide it."""
    numel = x.numel()
    if bias is None and dropout_p == 0:
        return (numel // _FLAT_ROW, _FLAT_ROW) if numel % _FLAT_ROW == 0 else (1, numel)
    N = x.shape[-1] if x.dim() else 1
    return (numel // N if N else 0), N


def gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """x (..., N), bias (N,) -> y, like x."""
    y = torch.empty_like(x)
    M, N = _rows(x, bias, dropout_p)
    _cpu.gelu_fwd(
        x.data_ptr(), _ptr(bias), y.data_ptr(), M, N, tanh, dropout_p, seed,
        TYPE_CODE[x.dtype], _weight_type(bias, None),
    )  # fmt: skip
    return y


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, dropout_p: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """-> (dx, db or None), db in compute dtype."""
    dx = torch.empty_like(x)
    M, N = _rows(x, bias, dropout_p)
    compute = compute_dtype(x.dtype)
    partial = x.new_empty(_chunks(M), N, dtype=compute) if bias is not None else None
    db = x.new_empty(N, dtype=compute) if bias is not None else None
    _cpu.gelu_bwd(
        dy.data_ptr(), x.data_ptr(), _ptr(bias), dx.data_ptr(), _ptr(partial), _ptr(db), M, N, tanh, dropout_p, seed,
        TYPE_CODE[x.dtype], _weight_type(bias, None),
    )  # fmt: skip
    return dx, db


def cross_entropy_targets(target: Tensor, class_weight: Tensor | None, N: int, ignore_index: int) -> float:
    """Sum of the class weights of the targets that count; their number where there are no weights.

    Raises:
        ValueError: for a target outside [0, N) that is not ignore_index.
    """
    M = target.numel()
    bad, total = _cpu.cross_entropy_targets(
        target.data_ptr(), _ptr(class_weight), M, N, ignore_index, _weight_type(class_weight, None)
    )
    if bad >= 0:
        raise ValueError(
            f"cross_entropy: target[{bad}] is {int(target.reshape(-1)[bad])}, "
            f"expected 0 to {N - 1} or ignore_index {ignore_index}"
        )
    return total


def cross_entropy_total(loss: Tensor) -> float:
    """Sum of a (M,) loss in compute dtype, in fp64 and in order."""
    return _cpu.cross_entropy_total(loss.data_ptr(), loss.numel(), TYPE_CODE[loss.dtype])


def cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x (M, N), target (M,) int64 -> (loss (M,), stats (M, 3), dx of scale * sum(loss) or None)."""
    M, N = x.shape
    compute = compute_dtype(x.dtype)
    loss, stats = x.new_empty(M, dtype=compute), x.new_empty(M, 3, dtype=compute)
    dx = None if scale is None else torch.empty_like(x)
    _cpu.cross_entropy_fwd(
        x.data_ptr(), target.data_ptr(), _ptr(class_weight), loss.data_ptr(), stats.data_ptr(), _ptr(dx),
        M, N, ignore_index, smoothing, scale or 0.0, TYPE_CODE[x.dtype], _weight_type(class_weight, None),
    )  # fmt: skip
    return loss, stats, dx


# Windows of columns begin at multiples of this.
CROSS_ENTROPY_BLOCK = 2048


def cross_entropy_update(
    x: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    states: Tensor,
    first: int,
    N: int,
    ignore_index: int,
    smoothing: float,
) -> None:
    """Fold x (M, n), columns first to first + n of N, into states (M, 5); first == 0 starts them."""
    M, n = x.shape
    _cpu.cross_entropy_update(
        x.data_ptr(), target.data_ptr(), _ptr(class_weight), states.data_ptr(),
        M, n, first, N, ignore_index, smoothing, TYPE_CODE[x.dtype], _weight_type(class_weight, None),
    )  # fmt: skip


def cross_entropy_finish(
    states: Tensor, target: Tensor, class_weight: Tensor | None, N: int, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """states (M, 5) -> (loss (M,), stats (M, 3))."""
    M = states.shape[0]
    loss, stats = states.new_empty(M), states.new_empty(M, 3)
    _cpu.cross_entropy_finish(
        states.data_ptr(), target.data_ptr(), _ptr(class_weight), loss.data_ptr(), stats.data_ptr(),
        M, N, ignore_index, smoothing, TYPE_CODE[states.dtype], _weight_type(class_weight, None),
    )  # fmt: skip
    return loss, stats


def cross_entropy_bwd(
    x: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    stats: Tensor,
    scale: Tensor | float,
    ignore_index: int,
    smoothing: float,
    out: Tensor | None = None,
    first: int = 0,
    N: int | None = None,
) -> Tensor:
    """-> dx, like x, in `out` (which may be x) if given; scale is one factor, or (M,) of them in compute dtype."""
    M, n = x.shape
    dx = torch.empty_like(x) if out is None else out
    rows, factor = (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
    _cpu.cross_entropy_bwd(
        x.data_ptr(), target.data_ptr(), _ptr(class_weight), stats.data_ptr(), _ptr(rows), dx.data_ptr(),
        M, n, first, n if N is None else N, ignore_index, smoothing, factor,
        TYPE_CODE[x.dtype], _weight_type(class_weight, None),
    )  # fmt: skip
    return dx


def rms_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    N: int,
    eps: float,
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x of M rows of N -> (y, z or None, rstd (M,) or None)."""
    M = x.numel() // N if N else 0
    stream = x if residual is None else residual
    y = torch.empty_like(x, dtype=out_dtype or stream.dtype)
    z = None if residual is None else torch.empty_like(residual)
    rstd = x.new_empty(M, dtype=compute_dtype(stream.dtype)) if statistics else None
    _cpu.rms_norm_fwd(
        x.data_ptr(), _ptr(residual), _ptr(weight), _ptr(z), y.data_ptr(), _ptr(rstd), M, N, eps,
        TYPE_CODE[x.dtype], TYPE_CODE[stream.dtype], TYPE_CODE[y.dtype], _weight_type(weight, None),
    )  # fmt: skip
    return y, z, rstd


def rms_norm_bwd(
    dy: Tensor,
    z: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    N: int,
    dz_in: Tensor | None = None,
    x_dtype: torch.dtype | None = None,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> (dz, dx, dw or None); dx is dz itself without a cast, dw in compute dtype."""
    M = z.numel() // N if N else 0
    x_dtype = x_dtype or z.dtype
    dz = torch.empty_like(z)
    dx = torch.empty_like(z, dtype=x_dtype) if x_dtype != z.dtype else None
    compute = compute_dtype(z.dtype)
    partial = z.new_empty(_chunks(M), N, dtype=compute) if weight_grad else None
    dw = z.new_empty(N, dtype=compute) if weight_grad else None
    _cpu.rms_norm_bwd(
        dy.data_ptr(), z.data_ptr(), _ptr(weight), rstd.data_ptr(), _ptr(dz_in),
        dz.data_ptr(), _ptr(dx), _ptr(partial), _ptr(dw), M, N,
        TYPE_CODE[x_dtype], TYPE_CODE[z.dtype], TYPE_CODE[dy.dtype], _weight_type(weight, None),
    )  # fmt: skip
    return dz, dz if dx is None else dx, dw


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (M, N) with unit stride along N -> y (M, N)."""
    M, N = gate.shape
    y = gate.new_empty(M, N)
    _cpu.swiglu_fwd(
        gate.data_ptr(), up.data_ptr(), y.data_ptr(), M, N, gate.stride(0), up.stride(0), TYPE_CODE[gate.dtype]
    )
    return y


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """-> (dgate, dup), both (M, N) and contiguous; dy is contiguous."""
    M, N = gate.shape
    dgate, dup = gate.new_empty(M, N), gate.new_empty(M, N)
    _cpu.swiglu_bwd(
        dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr(),
        M, N, gate.stride(0), up.stride(0), TYPE_CODE[gate.dtype],
    )  # fmt: skip
    return dgate, dup


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """x (B, H, L, D) with unit stride along D, cos and sin (L, R) or (B, L, R) contiguous -> y, in x's order."""
    compute = compute_dtype(x.dtype)
    cos, sin = cos.to(compute), sin.to(compute)
    y = heads_like(x)
    L, R = cos.shape[-2:]
    _cpu.rotary(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), x.shape, x.stride(), y.stride(),
        R, L * R if cos.dim() == 3 else 0, interleaved, inverse, TYPE_CODE[x.dtype],
    )  # fmt: skip
    return y


def vec_map(name: str, x: Tensor) -> Tensor:
    """exp, tanh, erf or erfc of vec.h over a contiguous fp32 tensor, for the tests of their error bounds."""
    y = torch.full_like(x, float("nan"))
    _cpu.vec_map(name, x.data_ptr(), y.data_ptr(), x.numel())
    return y


def dropout_factors(M: int, N: int, p: float, seed: int) -> Tensor:
    """(M, N) fp32: 0 where the CPU kernels drop, 1 / (1 - p) where they keep."""
    out = torch.full((M, N), float("nan"))
    _cpu.dropout_factors(out.data_ptr(), M, N, p, seed)
    return out


def omp_threads() -> int | None:
    """Threads that the CPU kernels would use, or None where the extension is missing."""
    return None if _cpu is None else _cpu.omp_threads()


_BOOL = 4  # the mask type beside TYPE_CODE's


def _attention_mask(mask: Tensor | None, sizes: tuple[int, ...]) -> tuple[int, tuple[int, ...], int]:
    """Address, strides and type of a (B, H, T, S) mask whose broadcast dimensions have size 1."""
    if mask is None:
        return 0, (), 0
    mask = mask.expand(sizes)
    return mask.data_ptr(), mask.stride(), TYPE_CODE.get(mask.dtype, _BOOL)


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
    _cpu.attention_fwd(
        q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(),
        *_attention_mask(mask, (B, H, T, S)), out.data_ptr(), out.stride(), _ptr(sums), _ptr(rest), 0, 0,
        sizes, scale, dropout_p, seed, window_left, window_right, softcap, TYPE_CODE[q.dtype],
    )  # fmt: skip
    return out, sums


def attention_plain_fwd(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    """attention_fwd of q (B, H, T, D), k and v (B, H, S, D) without anything else, at the least cost of a call."""
    B, H, T, D = q.shape
    row = H * D
    out = torch.empty_strided((B, H, T, D), (T * row, D, row, 1), dtype=q.dtype)
    _cpu.attention_plain_fwd(
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
    _cpu.attention_fwd(
        *_packed(q), *_packed(k), *_packed(v), 0, (), 0, *_packed(out), _ptr(sums), 0,
        cu_q.data_ptr(), cu_k.data_ptr(), sizes,
        scale, dropout_p, seed, window_left, window_right, softcap, TYPE_CODE[q.dtype],
    )  # fmt: skip
    return out, sums


def heads_like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape: dense, in x's order of dimensions, its last dimension contiguous.

    What `empty_like` makes of an x in which two dimensions have stride 1, as `unfold` makes them, has another last one.
    """
    grad = torch.empty_like(x)
    return grad if grad.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


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
    _cpu.attention_bwd(
        q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(),
        *_attention_mask(mask, (B, H, T, S)), out.data_ptr(), out.stride(), lse.data_ptr(), _ptr(rest), 0, 0,
        dout.data_ptr(), dout.stride(), _ptr(dlse), *_heads(dq), *_heads(dk), *_heads(dv),
        _ptr(dmask), () if dmask is None else tuple(dmask.shape),
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
    _cpu.attention_bwd(
        *_packed(q), *_packed(k), *_packed(v), 0, (), 0, *_packed(out), lse.data_ptr(), 0,
        cu_q.data_ptr(), cu_k.data_ptr(), *_packed(dout), _ptr(dlse), *_packed(dq), *_packed(dk), *_packed(dv), 0, (),
        sizes, scale, dropout_p, seed, window_left, window_right, softcap, TYPE_CODE[q.dtype],
    )  # fmt: skip
    return dq, dk, dv


def _heads(x: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, ()) if x is None else (x.data_ptr(), x.stride())


def gemm_serves(dtype: torch.dtype) -> bool:
    """Whether the instruction set in force has products of large matrices of this dtype."""
    return _cpu is not None and dtype in TYPE_CODE and _cpu.gemm_serves(TYPE_CODE[dtype])


def gemm(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> None:
    """out (M, N) = a (M, K) @ b (K, N) + bias (N,), or that is added to it.

    a and b are fp32 or bf16, not empty, with elements side by side along either dimension; out has contiguous rows, in
    their dtype or in fp32, which `add` needs; bias is fp32.
    """
    (M, K), N = a.shape, b.shape[1]
    a_transposed, b_transposed = (x.stride(1) != 1 and x.stride(0) == 1 for x in (a, b))
    rows = (a.stride(int(a_transposed)), b.stride(int(b_transposed)), out.stride(0))
    _cpu.gemm(
        a.data_ptr(), b.data_ptr(), _ptr(bias), out.data_ptr(), (M, N, K), rows, a_transposed, b_transposed,
        out.dtype is torch.float32, add, TYPE_CODE[a.dtype],
    )  # fmt: skip


def gradient_square_sum(grads: Sequence[Tensor]) -> float:
    """Sum of the squares of fp32 and bf16 tensors, in a fixed order."""
    return _cpu.gradient_square_sum([(g.data_ptr(), g.numel(), TYPE_CODE[g.dtype]) for g in grads])


class AdamWScalars(NamedTuple):
    """What AdamW multiplies by at one step: see csrc/cpu/ops.h."""

    grad_scale: float
    decay: float
    beta1: float
    beta2: float
    step_size: float
    sqrt_factor: float
    eps: float


AdamWRow = tuple[Tensor, Tensor, Tensor, Tensor, "Tensor | None", AdamWScalars]


def adamw_update(rows: Sequence[AdamWRow]) -> None:
    """Update the parameter, exp_avg and exp_avg_sq of rows (parameter, grad, exp_avg, exp_avg_sq, copy, scalars)."""
    _cpu.adamw_update(
        [
            (
                (p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), _ptr(copy),
                 p.numel(), TYPE_CODE[p.dtype], TYPE_CODE[g.dtype]),
                scalars,
            )
            for p, g, m, v, copy, scalars in rows
        ]
    )  # fmt: skip


LINEAR_ROWS = 8  # at most, in the kernels for decoding


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) of 1 to 8 rows and weight (N, K) of one dtype, bias (N,) -> y (..., N), like x."""
    N, K = weight.shape
    type_code = TYPE_CODE[x.dtype]
    y = x.new_empty(*x.shape[:-1], N)
    _cpu.linear_fwd(
        x.data_ptr(), weight.data_ptr(), _ptr(bias), y.data_ptr(), x.numel() // K, N, K,
        type_code, type_code, _weight_type(bias, None), type_code,
    )  # fmt: skip
    return y


def quantized_linear_fwd(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, padded_K: int, group_size: int
) -> Tensor:
    """x (..., K) of 1 to 8 rows; int8 and scale (N,) fp32 where group_size is 0, else int4 -> y (..., N), like x.

    `fastlm.compression.quantization` has the layouts; bias (N,) is fp32.
    """
    N, K = weight.shape[0], x.shape[-1]
    y = x.new_empty(*x.shape[:-1], N)
    _cpu.quantized_linear_fwd(
        x.data_ptr(), weight.data_ptr(), scale.data_ptr(), _ptr(bias), y.data_ptr(),
        x.numel() // K, N, K, padded_K, group_size, TYPE_CODE[x.dtype], TYPE_CODE[y.dtype],
    )  # fmt: skip
    return y


def dequantize(weight: Tensor, scale: Tensor, K: int, padded_K: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) in fp32, bf16 or fp16 that a quantized one stands for."""
    N = weight.shape[0]
    out = torch.empty(N, K, dtype=dtype)
    _cpu.dequantize(weight.data_ptr(), scale.data_ptr(), out.data_ptr(), N, K, padded_K, group_size, TYPE_CODE[dtype])
    return out


def huge_pages(size: int) -> Tensor:
    """(size,) uint8 of memory that begins at a huge page, and is backed by such pages where the system has them."""
    page = 2**21
    memory = torch.empty(size + page, dtype=torch.uint8)
    start = -memory.data_ptr() % page
    _cpu.use_huge_pages(memory.data_ptr() + start, size // page * page)
    return memory[start : start + size]


def decode_step(model: int, position: int, eps: float) -> None:
    """Run the model that the table at this address describes; csrc/cpu/decode.h says how."""
    _cpu.decode_step(model, position, eps)
