"""The linear layer with a weight of 8 or 4 bits behind tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu
from . import TYPE_CODE, ptr


def quantized_linear_fwd(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, padded_K: int, group_size: int
) -> Tensor:
    """x (..., K) of 1 to 8 rows; int8 and scale (N,) fp32 where group_size is 0, else int4 -> y (..., N), like x.

    `fastlm.compression.quantization` has the layouts; bias (N,) is fp32.
    """
    N, K = weight.shape[0], x.shape[-1]
    y = x.new_empty(*x.shape[:-1], N)
    cpu._cpu.quantized_linear_fwd(
        x.data_ptr(), weight.data_ptr(), scale.data_ptr(), ptr(bias), y.data_ptr(),
        x.numel() // K, N, K, padded_K, group_size, TYPE_CODE[x.dtype], TYPE_CODE[y.dtype],
    )  # fmt: skip
    return y


def dequantize(weight: Tensor, scale: Tensor, K: int, padded_K: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) in fp32, bf16 or fp16 that a quantized one stands for."""
    N = weight.shape[0]
    out = torch.empty(N, K, dtype=dtype)
    cpu._cpu.dequantize(
        weight.data_ptr(), scale.data_ptr(), out.data_ptr(), N, K, padded_K, group_size, TYPE_CODE[dtype]
    )
    return out
