"""Attention's shared cases on the CUDA backend, and what is its own: the order of blocks, repeatability, products."""

import pytest
import torch

import fastlm
from conftest import CUDA
from test_attention import (
    _inputs,
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

__all__ = [name for name in dir() if name.startswith("test_")]

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
