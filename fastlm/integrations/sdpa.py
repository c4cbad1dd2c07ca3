"""fastlm's attention behind PyTorch's scaled_dot_product_attention, through PyTorch's own register of implementations.

    fastlm.integrations.register_sdpa()
    torch.nn.attention.activate_flash_attention_impl("fastlm")   # every later call, until
    torch.nn.attention.restore_flash_attention_impl()

It serves CPU tensors, where PyTorch would use its flash attention: no dropout, and a mask without gradient. On a GPU
PyTorch's implementations stay. torch 2.10 has no function that restores them: what is activated there stays so.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..backends import cpu as _native
from ..backends.cpu import attention as _kernels
from ..errors import BackendError
from ..ops._attention_reference import Options
from ..ops.attention import rest_of, scaled_dot_product_attention

NAME = "fastlm"
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


class _Handle:
    """Keeps the kernels in PyTorch's dispatcher until `remove`."""

    def __init__(self, library: torch.library.Library):
        self._library: torch.library.Library | None = library

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
        self._library = None


def register_sdpa() -> None:
    """Make "fastlm" known to `torch.nn.attention.activate_flash_attention_impl`; nothing is activated.

    Raises:
        BackendError: if this PyTorch has no such register, or the CPU extension is missing.
    """
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None:
        raise BackendError(f"register_sdpa: torch {torch.__version__} has no register of attention implementations")
    if _native.missing_reason:
        raise BackendError(f"register_sdpa: {_native.missing_reason}")
    register(NAME, register_fn=_activate)


def _activate() -> _Handle:
    library = torch.library.Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        library.impl(_FORWARD, _forward, "CPU")
        library.impl(f"{_FORWARD}_backward", _backward, "CPU")
    return _Handle(library)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, True, return_lse=True
        )  # fmt: skip


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if scale is None:
        scale = 1.0 / math.sqrt(max(query.shape[-1], 1))
    mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
    options = Options(is_causal, scale, dropout_p, 0, -1, 0 if is_causal else -1, 0.0)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    backward: Any = _kernels.attention_bwd
    rest = rest_of(_kernels, query, key, value, mask, logsumexp, options)
    return backward(grad_out.contiguous(), None, query, key, value, mask, out, logsumexp, *options, rest=rest)[:3]
