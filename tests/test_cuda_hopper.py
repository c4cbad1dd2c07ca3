"""Attention forward on Hopper's own instructions: parity on the emulated GPU, strides, the calls it leaves to others.

The emulation takes its instructions' encodings from the PTX ISA; csrc/cuda/hopper.cuh lists what that does not show.
"""

import ctypes

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import CUDA
from emulation import build
from fastlm.ops._attention_reference import attention_ref
from tolerances import assert_as_close_as_torch

on_cuda = pytest.mark.parametrize("kernels", [CUDA], indirect=True)
emulated = pytest.mark.skipif(torch.cuda.is_available(), reason="of the emulation alone")

# (B, H, Hkv, T, S): one row, half a tile less a row, whole tiles, tails of both kinds, more keys than the ring holds,
# grouped heads, more queries than keys and the reverse.
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 2, 1, 63, 200),
    (2, 2, 2, 128, 128),
    (1, 3, 1, 200, 63),
    (1, 1, 1, 200, 300),
    (1, 2, 2, 300, 1),
    (1, 1, 1, 1, 700),
]


def _inputs(B, H, Hkv, T, S, D, dtype):
    return [torch.randn(B, heads, rows, D).to(dtype) for heads, rows in ((H, T), (Hkv, S), (Hkv, S))]


def _check(q, k, v, causal=False, scale=None):
    out, lse = fastlm.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=True, return_lse=True
    )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    truth, truth_lse = attention_ref(q.double(), k.double(), v.double(), None, causal, factor)
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    assert_as_close_as_torch(out, truth, stock, k.shape[2], "out")
    assert_as_close_as_torch(lse.to(q.dtype), truth_lse, truth_lse.to(q.dtype), k.shape[2], "lse")
    return out


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_parity(kernels, poisoned, sizes, D, causal, dtype):
    _check(*_inputs(*sizes, D, dtype), causal)


@emulated
@on_cuda
@pytest.mark.parametrize("architecture", [80, 100])
@pytest.mark.parametrize("D", [64, 128])
def test_other_architectures_take_the_portable_kernel(kernels, emulation, D, architecture):
    """It sums in another order, so that its bits tell the two apart."""
    q, k, v = _inputs(1, 2, 1, 90, 200, D, torch.bfloat16)
    hopper = _check(q * 3, k, v, True)
    emulation.set_device(architecture)
    assert not torch.equal(_check(q * 3, k, v, True), hopper)


@on_cuda
def test_strides(kernels, poisoned):
    """A fused projection's views are read in place, and views that TMA can't describe by the portable kernel."""
    q, k, v = torch.randn(2, 90, 3, 2, 64).bfloat16().permute(2, 0, 3, 1, 4)
    _check(q, k, v, True)
    _check(q[:, :1], k[:, :1].expand(2, 1, 90, 64), v[:1, :1].expand(2, 1, 90, 64))
    odd = torch.randn(2, 2, 90, 65).bfloat16()[..., 1:]
    _check(odd, k, v, True)


@on_cuda
@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
def test_scales(kernels, scale):
    _check(*_inputs(1, 1, 1, 70, 140, 64, torch.float16), False, scale)


@on_cuda
def test_extreme_scores(kernels):
    q, k, v = _inputs(1, 1, 1, 70, 260, 64, torch.bfloat16)
    _check(q * 60, k * 10, v)


@emulated
@on_cuda
def test_any_order_gives_the_same_bits(kernels, emulation):
    inputs = _inputs(1, 2, 1, 140, 400, 64, torch.bfloat16)
    results = []
    for order in (0, 1, 2):
        emulation.set_order(order)
        results.append(fastlm.scaled_dot_product_attention(*inputs, enable_gqa=True))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", ""),
        ("no barrier wait", "wrong values"),
        ("wrong parity", "wrong values"),
        ("too many bytes expected", "wait at an mbarrier"),
        ("unpublished barrier", "an mbarrier that was not published"),
        ("no wgmma wait", "wrong values"),
        ("no wgmma fence", "wgmma without a wgmma_fence since the last wait"),
        ("operand overwritten", "an operand of wgmma changed before the product was waited for"),
        ("wrong stride", "wrong values"),
        ("unaligned panel", "a tile at a misaligned address"),
        ("half a warpgroup", "wait at wgmma.fence"),
        ("too many registers", "wait at setmaxnreg.inc"),
    ],
)
def test_a_mistake_is_caught(emulation, fault, said, seed):
    """A product of two tiles copied by TMA, with one mistake."""
    emulation.set_order(seed)
    run = ctypes.CDLL(str(build.build())).fastlm_emulation_hopper_fault
    run.restype = ctypes.c_char_p
    message = run(fault.encode()).decode()
    assert said in message
    assert bool(said) == bool(message)
