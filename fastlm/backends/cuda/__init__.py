"""The CUDA kernels behind torch tensors: the counterpart of backends.cpu for fastlm._cuda.

Callers pass contiguous tensors of one device; this module allocates outputs and workspaces and queues the kernels on
that device's current stream. Imported when the cuda backend is first asked about.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..._core.dropout import DeviceSeed
from ..._core.torch_private import current_device, current_raw_stream
from .. import cpu as _native
from ..cpu import _BOOL, TYPE_CODE, _weight_type, heads_like

_cuda: Any = None
missing_reason: str | None = None
try:
    _cuda = importlib.import_module("fastlm._cuda")
except ImportError as error:  # not built, or built for another Python
    missing_reason = _native.why_missing(error, "_cuda")

emulated = False
_ptr: Callable[[Tensor | None], int] = _native._ptr


@contextlib.contextmanager
def emulate(module: Any) -> Iterator[None]:
    """Serve CPU tensors by `module`, a build of the kernels for the CPU whose `pointer` takes the place of data_ptr."""
    global _cuda, _ptr, emulated, missing_reason
    before = _cuda, _ptr, emulated, missing_reason
    _cuda, _ptr, emulated, missing_reason = module, module.pointer, True, None
    try:
        yield
    finally:
        _cuda, _ptr, emulated, missing_reason = before


def architectures() -> tuple[str, ...]:
    """What the kernels were compiled for, such as ("80", "90a"); empty where the extension is missing."""
    return tuple(filter(None, _cuda.architectures.split(";"))) if _cuda is not None else ()


def unserved(arch: int) -> str | None:
    """Why this build has no code for a GPU of architecture `arch` (90 for sm_90), or None where it has."""
    built = architectures()
    for name in built:
        number = int(name.rstrip("af"))
        if number == arch or (name.isdigit() and number // 10 == arch // 10 and number <= arch):
            return None
    return f"its kernels were built for {', '.join(f'sm_{name}' for name in built)}, this GPU is sm_{arch}"


def unusable() -> str | None:
    """Why the extension can't launch anything here, or None where it can: what `fastlm doctor` shows."""
    if missing_reason or emulated:
        return missing_reason
    driver, toolkit = _cuda.driver_version(), _cuda.toolkit_version()
    if driver == 0:
        return "no NVIDIA driver is loaded"
    if driver // 10 < toolkit // 10:  # within a major version, older drivers serve newer toolkits
        return f"the driver serves CUDA {driver / 10:.1f}, the kernels were built with {toolkit / 10:.1f}: update it"
    return None


def _call(function: Callable, x: Tensor, *arguments: Any) -> Any:
    """function(device, stream, *arguments) for the current stream of x's device, while that is the current device."""
    if not x.is_cuda:
        return function(0, 0, *arguments)
    index = x.get_device()
    stream = current_raw_stream(index)
    if index == current_device():
        return function(index, stream, *arguments)
    with torch.cuda.device(index):
        return function(index, stream, *arguments)


def _seed(seed: int) -> tuple[int, bool]:
    """(a seed or its address, whether it is an address)."""
    return (_ptr(seed.tensor), True) if isinstance(seed, DeviceSeed) else (seed, False)


def _norm_workspace(z: Tensor, M: int, N: int, sums: int, wanted: bool) -> tuple[Tensor, int, int, Tensor | None]:
    """(a workspace, where (M, 2) row sums and partial sums lie in it or 0, `sums` sums of N each or None): all fp32.

    Addresses, since a view would take longer than the rest.
    """
    shares = _call(_cuda.norm_shares, z, M, N) if wanted else 0
    work = z.new_empty(shares * sums * N + 2 * M, dtype=torch.float32)
    partial = _ptr(work)
    rows = partial + 4 * shares * sums * N
    if not wanted:
        return work, rows, 0, None
    return work, rows, partial, (z.new_zeros if M == 0 else z.new_empty)(sums, N, dtype=torch.float32)


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
    """As fastlm.backends.cpu.layer_norm_fwd."""
    M = x.numel() // N if N else 0
    stream = x if residual is None else residual
    y = torch.empty_like(x, dtype=out_dtype or stream.dtype)
    z = None if residual is None else torch.empty_like(residual)
    mean = x.new_empty(M, dtype=torch.float32) if statistics else None
    rstd = x.new_empty(M, dtype=torch.float32) if statistics else None
    _call(
        _cuda.layer_norm_fwd, x,
        _ptr(x), _ptr(residual), _ptr(weight), _ptr(bias), _ptr(z), _ptr(y), _ptr(mean), _ptr(rstd),
        M, N, eps, dropout_p, *_seed(seed),
        TYPE_CODE[x.dtype], TYPE_CODE[stream.dtype], TYPE_CODE[y.dtype], _weight_type(weight, bias),
    )  # fmt: skip
    return y, z, mean, rstd


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
    """As fastlm.backends.cpu.layer_norm_bwd."""
    M = z.numel() // N if N else 0
    x_dtype = x_dtype or z.dtype
    dz = torch.empty_like(z)
    dx = torch.empty_like(z, dtype=x_dtype) if dropout_p > 0 or x_dtype != z.dtype else None
    _work, rows, partial, sums = _norm_workspace(z, M, N, 2, weight_grads)
    _call(
        _cuda.layer_norm_bwd, z,
        _ptr(dy), _ptr(z), _ptr(weight), _ptr(mean), _ptr(rstd), _ptr(dz_in), _ptr(dz), _ptr(dx),
        partial, _ptr(sums), rows, M, N, dropout_p, *_seed(seed),
        TYPE_CODE[x_dtype], TYPE_CODE[z.dtype], TYPE_CODE[dy.dtype], _weight_type(weight, None),
    )  # fmt: skip
    dw, db = (None, None) if sums is None else (sums[0], sums[1])
    return dz, dz if dx is None else dx, dw, db


def rms_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    N: int,
    eps: float,
    out_dtype: torch.dtype | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As fastlm.backends.cpu.rms_norm_fwd."""
    M = x.numel() // N if N else 0
    stream = x if residual is None else residual
    y = torch.empty_like(x, dtype=out_dtype or stream.dtype)
    z = None if residual is None else torch.empty_like(residual)
    rstd = x.new_empty(M, dtype=torch.float32) if statistics else None
    _call(
        _cuda.rms_norm_fwd, x,
        _ptr(x), _ptr(residual), _ptr(weight), _ptr(z), _ptr(y), _ptr(rstd), M, N, eps,
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
    """As fastlm.backends.cpu.rms_norm_bwd."""
    M = z.numel() // N if N else 0
    x_dtype = x_dtype or z.dtype
    dz = torch.empty_like(z)
    dx = torch.empty_like(z, dtype=x_dtype) if x_dtype != z.dtype else None
    _work, rows, partial, sums = _norm_workspace(z, M, N, 1, weight_grad)
    _call(
        _cuda.rms_norm_bwd, z,
        _ptr(dy), _ptr(z), _ptr(weight), _ptr(rstd), _ptr(dz_in), _ptr(dz), _ptr(dx),
        partial, _ptr(sums), rows, M, N,
        TYPE_CODE[x_dtype], TYPE_CODE[z.dtype], TYPE_CODE[dy.dtype], _weight_type(weight, None),
    )  # fmt: skip
    return dz, dz if dx is None else dx, None if sums is None else sums[0]


def _gelu_rows(x: Tensor) -> tuple[int, int]:
    """(M, N); without bias and dropout the kernels cut the array themselves."""
    N = x.shape[-1] if x.dim() else 1
    return (x.numel() // N if N else 0), N


def gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """As fastlm.backends.cpu.gelu_fwd."""
    y = torch.empty_like(x)
    _call(
        _cuda.gelu_fwd, x,
        _ptr(x), _ptr(bias), _ptr(y), *_gelu_rows(x), tanh, dropout_p, *_seed(seed),
        TYPE_CODE[x.dtype], _weight_type(bias, None),
    )  # fmt: skip
    return y


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, dropout_p: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """As fastlm.backends.cpu.gelu_bwd."""
    dx = torch.empty_like(x)
    M, N = _gelu_rows(x)
    partial = db = None
    if bias is not None:
        partial = x.new_empty(_call(_cuda.gelu_shares, x, M, N), N, dtype=torch.float32)
        db = x.new_zeros(N, dtype=torch.float32) if M == 0 else x.new_empty(N, dtype=torch.float32)
    _call(
        _cuda.gelu_bwd, x,
        _ptr(dy), _ptr(x), _ptr(bias), _ptr(dx), _ptr(partial), _ptr(db), M, N, tanh, dropout_p, *_seed(seed),
        TYPE_CODE[x.dtype], _weight_type(bias, None),
    )  # fmt: skip
    return dx, db


def _attention_arguments(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, options: tuple
) -> tuple[Any, ...]:
    """What both directions take, q, k and v as (B, H, T, D); B is 1 for packed sequences."""
    _, scale, dropout_p, seed, left, right, softcap = options
    B, H, T, D = q.shape
    S = k.shape[2]
    at, kind = 0, 0
    strides: tuple[int, ...] = ()
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.float32, q.dtype):
            mask = mask.float()
        strides = tuple(0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))
        at, kind = _ptr(mask), TYPE_CODE.get(mask.dtype, _BOOL)
    batch = B if cu_q is None else cu_q.shape[0] - 1
    return (
        *_attention_heads(q), *_attention_heads(k), *_attention_heads(v), at, strides, kind, mask,
        _ptr(cu_q), _ptr(cu_k), (batch, H, k.shape[1], T, S, D, v.shape[3], left, right),
        scale, softcap, dropout_p, *_seed(seed), TYPE_CODE[q.dtype],
    )  # fmt: skip


def _mask_gradient(q: Tensor, S: int, D: int, mask: Tensor, wholly_written: bool) -> tuple[Tensor, Tensor | None]:
    """(the gradient's tensor, a workspace of partial sums or None); D: the larger head size."""
    B, H, T, _ = q.shape
    partials = _call(_cuda.attention_mask_partials, q, tuple(mask.shape), (B, H, T, S, D), TYPE_CODE[q.dtype])
    if partials == 0:  # as large as the scores, in its own dtype
        dtype = mask.dtype if mask.dtype == q.dtype else torch.float32
        return (q.new_empty if wholly_written else q.new_zeros)(mask.shape, dtype=dtype), None
    partial = q.new_empty(partials, *mask.shape, dtype=torch.float32) if partials > 1 else None
    return q.new_empty(mask.shape, dtype=torch.float32), partial


def _attention_heads(x: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, ()) if x is None else (_ptr(x), x.stride())


_FEW_QUERIES = 16  # with more, keys are never split over blocks


def _decode_workspace(q: Tensor, k: Tensor, v: Tensor, window_right: int) -> Tensor | None:
    """The partial results of every split of the keys, or None where they are not split."""
    B, H, T, D = q.shape
    width = v.shape[3]
    if 0 in (B, H, T, width):
        return None
    sizes = H, k.shape[1], T, k.shape[2], max(D, width)
    splits = _call(_cuda.attention_splits, q, *sizes, window_right, TYPE_CODE[q.dtype])
    return q.new_empty(B * H * T * splits * (width + 2), dtype=torch.float32) if splits else None


def _attention_fwd(q, k, v, mask, cu_q, cu_k, options, lse, rest=None) -> tuple[Tensor, Tensor | None]:
    B, H, T, _ = q.shape
    width = v.shape[3]
    out = q.new_empty_strided((B, H, T, width), (T * H * width, width, H * width, 1))
    sums = q.new_empty(B, H, T, dtype=torch.float32) if lse else None
    partial = _decode_workspace(q, k, v, options[5]) if cu_q is None and T <= _FEW_QUERIES else None
    arguments = _attention_arguments(q, k, v, mask, cu_q, cu_k, options)
    _call(_cuda.attention_fwd, q, *arguments, *_attention_heads(out), _ptr(sums), _ptr(rest), _ptr(partial))
    return out, sums


def _attention_bwd(
    dout, dlse, q, k, v, mask, cu_q, cu_k, out, lse, options, grads, mask_grad, rest=None
) -> Tensor | None:
    """Writes dq, dk and dv into `grads`, those that are not None, and returns the mask's."""
    B, H, T, D = q.shape
    if 0 in (B, H, T, k.shape[2]):
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return None if mask is None or not mask_grad else torch.zeros_like(mask, dtype=torch.float32)
    plain = mask is None and cu_q is None and options[2] == 0
    sizes = B, H, T, D, v.shape[3], TYPE_CODE[q.dtype], plain
    stats = lse.new_empty(_call(_cuda.attention_bwd_workspace, q, *sizes))
    dmask = partial = None
    if mask is not None and mask_grad:
        everywhere = options[4] < 0 and options[5] < 0  # tiles outside of a window are left out
        dmask, partial = _mask_gradient(q, k.shape[2], max(D, v.shape[3]), mask, everywhere)
    arguments = _attention_arguments(q, k, v, mask, cu_q, cu_k, options)
    _call(
        _cuda.attention_bwd, q, *arguments, *_attention_heads(out), _ptr(lse), _ptr(rest),
        *_attention_heads(dout), _ptr(dlse), *(part for grad in grads for part in _attention_heads(grad)),
        _ptr(stats), _ptr(dmask),
        *((0, 0, ()) if dmask is None else (TYPE_CODE[dmask.dtype], _ptr(partial), tuple(dmask.shape))),
    )  # fmt: skip
    return dmask


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *options, lse: bool = True, rest: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As fastlm.backends.cpu.attention_fwd."""
    return _attention_fwd(q, k, v, mask, None, None, options, lse, rest)


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
    """As fastlm.backends.cpu.attention_bwd."""
    grads = (heads_like(q), heads_like(k), heads_like(v)) if inputs else (None, None, None)
    dmask = _attention_bwd(dout, dlse, q, k, v, mask, None, None, out, lse, options, grads, mask_grad, rest)
    return *grads, dmask


def attention_varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *options, lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As fastlm.backends.cpu.attention_varlen_fwd."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, sums = _attention_fwd(q, k, v, None, cu_q, cu_k, options, lse)
    return out[0].transpose(0, 1), None if sums is None else sums[0]


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
    """As fastlm.backends.cpu.attention_varlen_bwd."""
    grads = heads_like(q), heads_like(k), heads_like(v)
    dout, q, k, v, out, *packed = (x.transpose(0, 1)[None] for x in (dout, q, k, v, out, *grads))
    _attention_bwd(dout, dlse, q, k, v, None, cu_q, cu_k, out, lse, options, packed, False)
    return grads
