"""Attention's shared cases on the CUDA backend, and what is its own: head sizes by tile, the order of blocks."""

# ruff: noqa: F401  (the imported tests are collected here as well, with this file's fixture)

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlm
from conftest import CUDA
from emulation import build
from fastlm._core import dropout as _dropout
from fastlm.backends import cuda as _native_cuda
from fastlm.backends.cpu import TYPE_CODE
from fastlm.ops._attention_reference import Options, attention_ref
from ops.test_attention import (
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
from ops.test_attention_varlen import test_a_sequence_does_not_depend_on_its_neighbours
from ops.test_attention_varlen import test_any_strides as test_any_strides_of_packed_sequences
from ops.test_attention_varlen import test_dropout as test_dropout_of_packed_sequences
from ops.test_attention_varlen import test_parity as test_parity_of_packed_sequences
from ops.test_attention_window import test_all_together, test_boolean_mask_and_dropout, test_softcap, test_window
from tolerances import assert_as_close_as_torch

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


def test_gradients_of_rows_that_are_masked_by_large_numbers(attention_kernels):
    """Scores of -1e9 keep no digit of q.k: the weights are any, but none is above 1."""
    q, k, v = (torch.randn(1, 2, 70, 16, requires_grad=True) for _ in range(3))
    mask = torch.full((70, 1), -1e9, requires_grad=True)
    row_mask = torch.zeros(70, 70).index_fill(0, torch.tensor([3, 65]), -1e9).requires_grad_()
    for given in (mask, row_mask):
        out = fastlm.scaled_dot_product_attention(q, k, v, given)
        dq, dk, dv, dmask = torch.autograd.grad(out, (q, k, v, given), torch.ones_like(out))
        assert all(g.isfinite().all() for g in (dq, dk, dmask))
        assert dv.abs().max() <= 70


class _Sizes(TorchDispatchMode):
    """The number of elements of every tensor that operators return inside."""

    def __init__(self):
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.seen += [x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        return made


def _closed_keys(kind, T, S):
    """(mask, further arguments, (T, S): what each query attends to)."""
    i, j = torch.arange(T)[:, None], torch.arange(S)
    if kind == "causal":
        return None, {"is_causal": True}, j <= i
    if kind == "window":
        return None, {"window": (20, 9)}, (j >= i - 20) & (j <= i + 9)
    open_ = torch.rand(T, S) > 0.4
    open_[5] = False  # a row that attends to nothing
    if kind == "bool":
        return open_, {}, open_
    return torch.zeros(T, S).masked_fill(~open_, -math.inf), {"softcap": 5.0}, open_


@pytest.mark.parametrize("kind", ["causal", "window", "bool", "additive"])
@pytest.mark.parametrize(
    ("dtype", "head_size"),
    [(torch.float32, 40), (torch.bfloat16, 24), (torch.float16, 56), (torch.bfloat16, 120), (torch.float32, 256)],
    ids=str,
)
def test_what_a_row_does_not_attend_to_may_be_anything(attention_kernels, poisoned, dtype, head_size, kind):
    """Keys and values that are not finite: the rows that do not attend to them keep their bits."""
    T, S = 100, 140
    mask, options, attended = _closed_keys(kind, T, S)
    q, k, v = (torch.randn(1, 2, n, head_size).to(dtype) for n in (T, S, S))
    clean = fastlm.scaled_dot_product_attention(q, k, v, mask, return_lse=True, **options)
    for bad in (math.nan, math.inf, -math.inf):
        for names, key in (("k", 3), ("v", 64), ("kv", 97)):
            spoiled = {"k": k.clone(), "v": v.clone()}
            for name in names:
                spoiled[name][0, 1, key, 7:9] = bad
            out = fastlm.scaled_dot_product_attention(q, spoiled["k"], spoiled["v"], mask, return_lse=True, **options)
            safe = torch.ones(2, T, dtype=torch.bool)
            safe[1] = ~attended[:, key]
            for mine, before in zip(out, clean, strict=True):
                assert torch.equal(mine[0][safe], before[0][safe])
            if names == "v":
                assert not out[0][0, 1, attended[:, key], 7:9].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lies_behind_a_sequence_may_be_anything(attention_kernels, poisoned, dtype):
    """The rest of a cache, and the neighbours of a packed sequence."""
    q, k, v = (torch.randn(1, 2, 100, 40).to(dtype) for _ in range(3))
    clean = fastlm.scaled_dot_product_attention(q, k[:, :, :70], v[:, :, :70])
    for x in (k, v):
        x[:, :, 70:] = math.nan
    assert torch.equal(fastlm.scaled_dot_product_attention(q, k[:, :, :70], v[:, :, :70]), clean)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    cu_q, cu_k = (torch.tensor([0, end, 100], dtype=torch.int32) for end in (100, 70))
    assert torch.equal(fastlm.attention_varlen(q, k, v, cu_q, cu_k), clean[0].transpose(0, 1))


# (H, Hkv, T, S, D, Dv, mask): one query and sixteen, rows of a group that fill a tile, part of one, or two; a head size
# of every class of tiles; keys that end within a tile, a step and a split.
DECODING = [
    (8, 1, 1, 601, 24, 24, "none"),
    (2, 2, 16, 515, 64, 40, "additive"),
    (6, 2, 7, 1100, 96, 96, "bool"),
    (4, 4, 1, 800, 128, 128, "none"),
    (8, 2, 3, 700, 136, 192, "additive"),
    (2, 1, 5, 513, 256, 256, "bool"),
]


def _decoding(H, Hkv, T, S, D, Dv, dtype, batch=2):
    q, k, v = (torch.randn(batch, heads, n, d) for heads, n, d in ((H, T, D), (Hkv, S, D), (Hkv, S, Dv)))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _is_split(q, k):
    sizes = q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]
    return _native_cuda.call(_native_cuda._cuda.attention_splits, q, *sizes, -1, TYPE_CODE[q.dtype]) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", DECODING, ids=str)
def test_decoding(attention_kernels, poisoned, case, dtype):
    *sizes, kind = case
    q, k, v = _decoding(*sizes, dtype)
    T, S = sizes[2:4]
    mask = {"none": None, "bool": torch.rand(2, 1, T, S) > 0.3, "additive": torch.randn(T, S).to(dtype)}[kind]
    assert _is_split(q, k)
    out, lse = fastlm.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, return_lse=True)
    doubles = [x.double() if x is not None and x.is_floating_point() else x for x in (q, k, v, mask)]
    truth, truth_lse = attention_ref(*doubles, False, q.shape[3] ** -0.5)
    stock = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert_as_close_as_torch(out, truth, stock, S, "out")
    assert_as_close_as_torch(lse.to(dtype), truth_lse, truth_lse.to(dtype), S, "lse")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        Options(False, -0.3),
        Options(False, 0.2, softcap=6.0),
        Options(False, 0.2, window_left=2, window_right=530),
        Options(False, 0.2, dropout_p=0.3),
        Options(True, 0.2),
    ],
    ids=str,
)
def test_decoding_with_everything_else(attention_kernels, poisoned, options, dtype):
    q, k, v = _decoding(6, 2, 7, 700, 40, 40, dtype)
    k, v = k[:, :, 3:], v[:, :, 3:]
    torch.manual_seed(5)
    options = options._replace(seed=_dropout.draw_seed())
    torch.manual_seed(5)
    left, right = (None if n < 0 else n for n in options[4:6])
    out = fastlm.scaled_dot_product_attention(
        q, k, v, None, options.dropout_p, options.is_causal, options.scale, True,
        window=None if left is None else (left, right), softcap=options.softcap or None,
    )  # fmt: skip
    truth = attention_ref(*(x.double() for x in (q, k, v)), None, *options)[0]
    assert_as_close_as_torch(out, truth, attention_ref(q, k, v, None, *options)[0], 700, "out")


def test_decoding_does_not_depend_on_the_batch(attention_kernels):
    q, k, v = _decoding(4, 2, 3, 900, 64, 64, torch.bfloat16, batch=3)
    whole = fastlm.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    alone = fastlm.scaled_dot_product_attention(q[1:2, 2:], k[1:2, 1:], v[1:2, 1:], enable_gqa=True)
    assert torch.equal(whole[1:2, 2:], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_rows_that_attend_to_nothing(attention_kernels, poisoned, dtype):
    """For all keys, and for those of a split; what a closed key and its value hold does not matter."""
    q, k, v = _decoding(4, 2, 2, 900, 64, 64, dtype)
    mask = torch.ones(2, 1, 2, 900, dtype=torch.bool)
    mask[0, :, 1], mask[1, :, :, :300], mask[1, :, 0, 700:] = False, False, False
    clean = fastlm.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, return_lse=True)
    assert clean[0][0, :, 1].eq(0).all()
    assert clean[1][0, :, 1].eq(-math.inf).all()
    for x in (k, v):
        x[1, :, :300] = math.nan
    v[1, 0, 800, 5] = math.inf
    out, lse = fastlm.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, return_lse=True)
    assert torch.equal(lse, clean[1])
    lost = torch.zeros_like(out, dtype=torch.bool)
    lost[1, :2, 1, 5] = True
    assert out[lost].eq(math.inf).all()
    assert torch.equal(out[~lost], clean[0][~lost])


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the emulation alone")
@pytest.mark.parametrize("multiprocessors", [1, 2, 200])
def test_decoding_in_any_order_on_any_gpu(attention_kernels, emulation, multiprocessors):
    """Few splits of many keys and many of few, blocks, warps and lanes in any order."""
    emulation.set_device(multiprocessors=multiprocessors)
    q, k, v = _decoding(2, 1, 3, 1900, 32, 32, torch.float16, batch=1)
    results = []
    for order in (0, 1, 2):
        emulation.set_order(order)
        results.append(fastlm.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    truth = attention_ref(*(x.double() for x in (q, k, v)), None, False, 32**-0.5)[0]
    assert_as_close_as_torch(results[0], truth, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 1900)


# Head sizes of every class of tiles and dtype; one batch, one head, one row, one column, all, and none.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("head_size", "shape"),
    [
        (24, (1, 2, 140, 150)),
        (64, (2, 1, 1, 150)),
        (80, (140, 1)),
        (128, (2, 2, 1, 150)),
        (192, (2, 1, 140, 150)),
        (256, (150,)),
        (40, (2, 2, 140, 150)),
    ],
)
def test_gradient_of_a_mask_with_everything_else(attention_kernels, poisoned, head_size, shape, dtype):
    """Beside window, soft cap, dropout and grouped heads, in tiles cut on both sides.

    The part of the log-sum-exp alone does not vanish in the sum over a row.
    """
    q, k, v = (torch.randn(2, heads, n, head_size).to(dtype) for heads, n in ((2, 140), (1, 150), (1, 150)))
    mask = torch.randn(shape).to(dtype).requires_grad_()
    grads_in = torch.randn(2, 2, 140, head_size).to(dtype), torch.randn(2, 2, 140)
    torch.manual_seed(5)
    seed = _dropout.draw_seed()
    torch.manual_seed(5)
    outs = fastlm.scaled_dot_product_attention(
        q, k, v, mask, 0.2, window=(30, 90), softcap=8.0, enable_gqa=True, return_lse=True
    )
    (dmask,) = torch.autograd.grad(outs, mask, grads_in)
    options = False, head_size**-0.5, 0.2, seed, 30, 90, 8.0
    grads = []
    for wide in (torch.float64, dtype):
        inputs = [x.detach().to(wide).requires_grad_() for x in (q, k, v, mask)]
        outs = attention_ref(*inputs, *options)
        grads += torch.autograd.grad(outs, inputs[3], [g.to(o.dtype) for g, o in zip(grads_in, outs, strict=True)])
    assert dmask.shape == mask.shape
    assert_as_close_as_torch(dmask, *grads, max(head_size, 4 * 140 * 150 // mask.numel()), "dmask")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the emulation alone")
def test_gradient_of_a_mask_of_many_small_matrices(attention_kernels, emulation):
    """Where its own tiles are too few for the GPU, blocks share the batches; a larger GPU has other partial sums."""
    q, k, v = (torch.randn(30, 2, 9, 16) for _ in range(3))
    mask, dout = torch.randn(2, 9, 9).requires_grad_(), torch.randn(30, 2, 9, 16)
    expected = torch.autograd.grad(attention_ref(q, k, v, mask[None], False, 0.25)[0], mask, dout)[0]
    grads = []
    for multiprocessors in (1, 3, 50):
        emulation.set_device(multiprocessors=multiprocessors)
        out = fastlm.scaled_dot_product_attention(q, k, v, mask)
        grads += torch.autograd.grad(out, mask, dout)
        torch.testing.assert_close(grads[-1], expected)
    assert not torch.equal(grads[0], grads[2])


def test_no_matrix_of_scores_for_a_mask_that_broadcasts(attention_kernels):
    q, k, v = (torch.randn(3, 2, 70, 16, requires_grad=True) for _ in range(3))
    for shape in ((2, 70, 70), (3, 1, 1, 70), (70, 1), (70,)):
        mask = torch.randn(shape, requires_grad=True)
        out = fastlm.scaled_dot_product_attention(q, k, v, mask)
        with _Sizes() as sizes:
            torch.autograd.grad(out, (q, mask), torch.ones_like(out))
        assert max(sizes.seen) <= max(q.numel(), mask.numel())


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
