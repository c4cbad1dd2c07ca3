"""Attention's shared cases on the CUDA backend, and what is its own: head sizes by tile, the order of blocks."""

# ruff: noqa: F401  (the imported tests are collected here as well, with this file's fixture)

import ctypes

import pytest
import torch

import fastlm
from conftest import CUDA
from emulation import build
from fastlm._native import TYPE_CODE
from test_attention import (
    test_any_strides,
    test_dropout,
    test_empty,
    test_extreme_scores,
    test_few_rows,
    test_fully_masked_rows_give_zero,
    test_fused_projection_is_read_in_place,
    test_gradient_of_a_broadcast_mask,
    test_gradient_of_lse_alone,
    test_lse_and_its_gradient,
    test_nan_stays_in_its_row,
    test_parity,
    test_rows_do_not_depend_on_the_batch_around_them,
    test_scale,
)
from test_attention_varlen import test_a_sequence_does_not_depend_on_its_neighbours
from test_attention_varlen import test_any_strides as test_any_strides_of_packed_sequences
from test_attention_varlen import test_dropout as test_dropout_of_packed_sequences
from test_attention_varlen import test_parity as test_parity_of_packed_sequences
from test_attention_window import test_all_together, test_boolean_mask_and_dropout, test_softcap, test_window

pytestmark = pytest.mark.parametrize("kernels", [CUDA], indirect=True)


@pytest.fixture
def attention_kernels(kernels):
    """The CUDA backend in the place of all of them."""
    return kernels


# Head sizes that the shared cases leave out: one in each class of tiles.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [96, 128, 192])
def test_head_sizes(attention_kernels, poisoned, head_size, dtype):
    test_parity(attention_kernels, poisoned, (1, 2, 1, 67, 69, head_size, head_size, "causal"), dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes blocks in its own order")
def test_the_order_of_blocks_does_not_matter(attention_kernels, emulation):
    """Same bits for every order of blocks, warps and lanes: no sum depends on who comes first."""
    q = torch.randn(2, 4, 70, 40, requires_grad=True)
    k, v = (torch.randn(2, 2, 150, 40, requires_grad=True) for _ in range(2))
    mask = torch.randn(70, 150, requires_grad=True)
    dout = torch.randn(2, 4, 70, 40)
    results = []
    for order in (0, 1, 2):
        emulation.set_order(order)
        out = fastlm.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        results.append((out, *torch.autograd.grad(out, (q, k, v, mask), dout)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masks_of_other_dtypes(attention_kernels, dtype):
    """A mask wider or narrower than the queries is added as it is, without being rounded to their dtype."""
    q, k, v = (torch.randn(1, 2, 40, 32).to(dtype) for _ in range(3))
    narrow = torch.randn(40, 40).half().bfloat16()
    for mask in (narrow.half(), narrow.float(), narrow.double()):
        out = fastlm.scaled_dot_product_attention(q, k, v, mask)
        assert torch.equal(out, fastlm.scaled_dot_product_attention(q, k, v, narrow.float()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the emulation alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_emulated_products(kernels, dtype):
    """Fragments land where the PTX ISA puts them: small integers make every product exact."""
    a, b = (torch.randint(-3, 4, (16, 32)).to(dtype) for _ in range(2))
    rows, weighted = torch.empty(16, 16), torch.empty(16, 32)
    products = ctypes.CDLL(str(build.build())).fastlm_emulation_products
    products(*(ctypes.c_void_p(x.data_ptr()) for x in (a, b, rows, weighted)), TYPE_CODE[dtype])
    expected = a.float() @ b.float().T
    assert torch.equal(rows, expected)
    assert torch.equal(weighted, expected @ b.float())
