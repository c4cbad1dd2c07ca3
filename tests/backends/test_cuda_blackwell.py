"""Attention's forward pass on Blackwell's own instructions: parity on the emulated GPU, what it serves, mistakes.

The emulation takes its instructions' encodings from the PTX ISA; csrc/cuda/blackwell.cuh lists what that does not show.
Backward passes there are of the portable kernels, which its log-sum-exp has to suit. `make test` has two cases of
parity and of growing scores, and the mistakes.
"""

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import CUDA
from emulation import build
from fastlm._core import dispatch as _dispatch
from fastlm._core.architecture import SM100
from fastlm.backends import cuda as _native_cuda
from fastlm.ops._attention_reference import attention_ref
from tolerances import assert_as_close_as_torch

on_cuda = pytest.mark.parametrize("kernels", [CUDA], indirect=True)
emulated = pytest.mark.skipif(torch.cuda.is_available(), reason="of the emulation alone")

# (B, H, Hkv, T, S): two rows, a half less a row, whole tiles, a second half with rows and without, tails of both kinds,
# more keys than the ring holds, grouped heads, more queries than keys and the reverse.
SIZES = [
    (1, 1, 1, 2, 2),
    (1, 2, 1, 127, 200),
    (2, 2, 2, 128, 128),
    (1, 3, 1, 200, 63),
    (1, 1, 1, 256, 384),
    (1, 4, 2, 129, 257),
    (1, 1, 1, 17, 700),
    (1, 1, 1, 520, 520),
    (1, 2, 2, 300, 3),
]


def _library():
    library = ctypes.CDLL(str(build.build()))
    library.fastlm_emulation_blackwell_blocks.restype = ctypes.c_int64
    library.fastlm_emulation_blackwell_fault.restype = ctypes.c_char_p
    return library


@pytest.fixture(autouse=True)
def _on_blackwell(request):
    """The emulated GPU is of sm_100; a real one is what it is."""
    if not torch.cuda.is_available() and {"kernels", "emulation"} & set(request.fixturenames):
        request.getfixturevalue("emulation").set_device(architecture=100)


def _inputs(B, H, Hkv, T, S, D, dtype):
    return [torch.randn(B, heads, rows, D).to(dtype) for heads, rows in ((H, T), (Hkv, S), (Hkv, S))]


def _blocks(run):
    """(what run() gives, how many blocks of it used tensor memory and freed it)."""
    library = _library()
    before = library.fastlm_emulation_blackwell_blocks()
    return run(), library.fastlm_emulation_blackwell_blocks() - before


def _attend(q, k, v, causal=False, scale=None):
    return fastlm.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True, return_lse=True)


def _check(q, k, v, causal=False, scale=None, own=True):
    """Against the fp64 reference; own: by Blackwell's kernel, which the emulation counts."""
    (out, lse), blocks = _blocks(lambda: _attend(q, k, v, causal, scale))
    if not torch.cuda.is_available():
        assert blocks == (q.shape[0] * q.shape[1] * -(-q.shape[2] // 256) if own else 0)
    truth, truth_lse = attention_ref(
        q.double(), k.double(), v.double(), None, causal, q.shape[-1] ** -0.5 if scale is None else scale
    )
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    assert_as_close_as_torch(out, truth, stock, max(q.shape[2], k.shape[2]) * q.shape[1], "out")
    assert_as_close_as_torch(lse, truth_lse, None, max(k.shape[2:]), "lse")
    return out, lse


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_parity(kernels, poisoned, sizes, D, causal, dtype):
    _check(*_inputs(*sizes, D, dtype), causal)


@on_cuda
@pytest.mark.gpu_code
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
def test_gradients_follow_from_its_lse(kernels, poisoned, D, causal):
    inputs = [x.requires_grad_() for x in _inputs(1, 4, 2, 150, 270, D, torch.bfloat16)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    dout, dlse = torch.randn(1, 4, 150, D).bfloat16(), torch.randn(1, 4, 150)

    def gradients(out, lse, leaves):
        return torch.autograd.grad((out * dout.to(out.dtype)).sum() + (lse * dlse.to(lse.dtype)).sum(), leaves)

    results = gradients(*_attend(*inputs, causal), inputs)
    truths = gradients(*attention_ref(*doubles, None, causal, D**-0.5), doubles)
    stock = gradients(*attention_ref(*inputs, None, causal, D**-0.5), inputs)
    for name, result, truth, other in zip("qkv", results, truths, stock, strict=True):
        assert_as_close_as_torch(result, truth, other, 270 * 4, name)


@on_cuda
@pytest.mark.gpu_code
@pytest.mark.parametrize("D", [64, 128])
def test_one_key(kernels, poisoned, D):
    """Every weight is 1, whatever the shift: the output is the value."""
    q, k, v = _inputs(1, 2, 2, 140, 1, D, torch.float16)
    assert torch.equal(_check(q, k, v)[0], v.expand(1, 2, 140, D))


# The highest score of each tile of keys, in powers of two: growth that keeps the shift, that reaches the threshold of 8
# and passes it, in one step and in many; falling ones; both.
COURSES = {
    "below": [0, 3, 5, 7.5],
    "at": [0, 8, 16, 24],
    "just above": [0, 8.2, 16.4, 24.6],
    "many steps": [0, 3, 6, 9],
    "far": [-300, 0, 300, 600],
    "falling": [90, 60, 0, -90],
    "to and fro": [0, 20, -20, 27],
    "underflow": [0, 127, 260, 390],
}


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("course", COURSES)
def test_scores_that_grow(kernels, poisoned, course, dtype):
    """Rows of one block go different ways: each decides for itself when to shrink what it has summed."""
    T, D, tiles = 200, 64, COURSES[course]
    q, k, v = _inputs(1, 1, 1, T, 128 * len(tiles), D, dtype)
    heights = torch.tensor(tiles).repeat_interleave(128) - 2 * torch.rand(128 * len(tiles))
    k[..., 0], q[..., 0] = heights / 2, 2 * torch.linspace(-1, 1, T)  # the rows weigh them from -1 to 1
    q[..., 1:] *= 0.25
    _check(q, k, v, scale=math.log(2))


@on_cuda
@pytest.mark.gpu_code
def test_shrinking_is_told_by_row(kernels):
    """A row's bits do not depend on its neighbours', of which some shrink."""
    q, k, v = _inputs(1, 1, 1, 200, 300, 64, torch.bfloat16)
    q[0, 0, ::2] *= 40
    whole, sums = _attend(q, k, v)
    quiet = q.clone()
    quiet[0, 0, ::2] = 0
    out, lse = _attend(quiet, k, v)
    assert torch.equal(out[0, 0, 1::2], whole[0, 0, 1::2])
    assert torch.equal(lse[0, 0, 1::2], sums[0, 0, 1::2])


@on_cuda
@pytest.mark.gpu_code
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_scales(kernels, scale):
    _check(*_inputs(1, 1, 1, 70, 140, 64, torch.float16), False, scale)


@on_cuda
@pytest.mark.gpu_code
@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_turn_scores_round_are_portable(kernels, scale):
    _check(*_inputs(1, 1, 1, 70, 140, 64, torch.float16), False, scale, own=False)


@on_cuda
@pytest.mark.gpu_code
@pytest.mark.parametrize("causal", [False, True])
def test_extreme_scores(kernels, causal):
    q, k, v = _inputs(1, 1, 1, 170, 260, 64, torch.bfloat16)
    _check(q * 60, k * 10, v, causal)


@emulated
@on_cuda
@pytest.mark.gpu_code
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "every key", "value"])
def test_what_is_not_finite_goes_where_hopper_lets_it(kernels, poisoned, emulation, where, bad, causal):
    """Rows of scores that are all -inf are 0 there, those with one that is infinite or NaN are NaN."""
    q, k, v = _inputs(1, 1, 1, 150, 260, 64, torch.float16)
    q[0, 0, :, 3] = q[0, 0, :, 3].abs() + 0.5
    if where == "query":
        q[0, 0, 70, 3] = bad
    elif where == "key":
        k[0, 0, 9, 3] = bad
    elif where == "every key":
        k[0, 0, :, 3] = bad
    else:
        v[0, 0, 9, 3] = bad
    (out, lse), blocks = _blocks(lambda: _attend(q, k, v, causal))
    assert blocks == 1
    emulation.set_device(architecture=90)
    for mine, hopper in zip((out, lse), _attend(q, k, v, causal), strict=True):
        assert torch.equal(mine.isnan(), hopper.isnan())
        torch.testing.assert_close(mine, hopper, atol=2e-2, rtol=2e-2, equal_nan=True)


# Keys in a tile that every query of the last block attends to, in those that the diagonal cuts, the last one.
@on_cuda
@pytest.mark.gpu_code
@pytest.mark.parametrize("key", [3, 130, 299, 389])
@pytest.mark.parametrize(("D", "right"), [(64, 0), (64, 40), (128, 0)])
def test_what_a_row_does_not_attend_to_may_be_anything(kernels, poisoned, request, D, right, key):
    """Keys and values that are not finite: the rows that do not attend to them keep their bits."""
    q, k, v = (torch.randn(1, 2, 390, D).bfloat16() for _ in range(3))

    def attend(k, v):
        return fastlm.scaled_dot_product_attention(q, k, v, window=(None, right), return_lse=True)

    clean = attend(k, v)
    attends = torch.arange(390) + right >= key
    safe = torch.stack([torch.ones_like(attends), ~attends])
    for order, (names, bad) in enumerate([("k", math.nan), ("v", math.nan), ("v", -math.inf), ("kv", math.inf)]):
        _set_order(request, order)
        spoilt = {"k": k.clone(), "v": v.clone()}
        for name in names:
            spoilt[name][0, 1, key, 7:9] = bad
        out = attend(**spoilt)
        for mine, before in zip(out, clean, strict=True):
            assert torch.equal(mine[0][safe], before[0][safe])
        if names == "v":
            assert torch.equal(out[1], clean[1])
            assert not out[0][0, 1, attends, 7:9].isfinite().any()
            other = torch.ones(D, dtype=torch.bool).index_fill(0, torch.tensor([7, 8]), False)
            assert torch.equal(out[0][..., other], clean[0][..., other])
        elif names == "k":
            assert out[0][0, 1, attends].isnan().all()


@on_cuda
@pytest.mark.gpu_code
@pytest.mark.parametrize("causal", [False, True])
def test_what_lies_behind_the_keys_may_be_anything(kernels, poisoned, causal):
    """The rest of a cache; nothing attends to it."""
    q, k, v = (torch.randn(1, 2, 300, 64).half() for _ in range(3))
    clean = fastlm.scaled_dot_product_attention(q, k[:, :, :70], v[:, :, :70], is_causal=causal)
    for x in (k, v):
        x[:, :, 70:] = math.nan
    assert torch.equal(fastlm.scaled_dot_product_attention(q, k[:, :, :70], v[:, :, :70], is_causal=causal), clean)


@on_cuda
@pytest.mark.gpu_code
def test_strides(kernels, poisoned):
    """A fused projection's views are read in place, and views that TMA can't describe by the portable kernel."""
    q, k, v = torch.randn(2, 90, 3, 2, 64).bfloat16().permute(2, 0, 3, 1, 4)
    _check(q, k, v, True)
    _check(q[:, :1], k[:, :1].expand(2, 1, 90, 64), v[:1, :1].expand(2, 1, 90, 64), own=False)
    _check(torch.randn(2, 2, 90, 65).bfloat16()[..., 1:], k, v, True, own=False)


def _set_order(request, seed):
    """Of blocks, warps and lanes; a GPU has its own."""
    if not torch.cuda.is_available():
        request.getfixturevalue("emulation").set_order(seed)


@on_cuda
@pytest.mark.gpu_code
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
def test_any_order_gives_the_same_bits(kernels, request, D, causal):
    inputs = _inputs(1, 2, 1, 300, 400, D, torch.bfloat16)

    def run(order):
        _set_order(request, order)
        return _attend(*inputs, causal)

    first = run(0)
    for order in range(1, 6):
        assert all(torch.equal(a, b) for a, b in zip(first, run(order), strict=True))


@emulated
@on_cuda
@pytest.mark.gpu_code
@pytest.mark.parametrize("architecture", [80, 90, 103, 120])
def test_other_architectures_do_not_take_it(kernels, emulation, architecture):
    emulation.set_device(architecture)
    _check(*_inputs(1, 1, 1, 20, 20, 64, torch.bfloat16), own=False)


@pytest.mark.parametrize("archs", [("80", "100"), ("100a",)], ids="-".join)
def test_it_is_not_chosen_unproved(monkeypatch, archs):
    """A GPU of sm_100 and a module with code for it: an explicit choice serves, nothing else does."""
    monkeypatch.setattr(_dispatch, "oldest_architecture", lambda: SM100)
    monkeypatch.setattr(_native_cuda, "emulated", False)
    monkeypatch.setattr(_native_cuda, "unusable", lambda: None)
    monkeypatch.setattr(_native_cuda, "architectures", lambda: archs)
    _dispatch.clear_cache()
    features = {"head_dim": 128, "mask": "none", "dropout": False, "lse": False, "window": False, "softcap": False}
    request = _dispatch.Request("cuda", torch.bfloat16, tuple(features.items()), size=(5, 12, 12, 8))
    assert _dispatch._choose("scaled_dot_product_attention", request, None) == "torch"
    assert _dispatch._choose("scaled_dot_product_attention", request, "cuda") == "cuda"
    _dispatch.clear_cache()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", ""),
        ("no wait for a product", "a load of sums that are not there yet, column 0"),
        ("no commit", "wait at an mbarrier of products"),
        ("no wait for a load", "wrong values"),
        ("weights not published", "wrote to tensor memory and has not published"),
        ("stores not waited for", "wrote to tensor memory and has not published"),
        ("a store under a product", "a store to tensor memory that a product still uses"),
        ("operand overwritten", "an operand of tcgen05.mma changed before the product was done"),
        ("a descriptor of Hopper", "a descriptor of tcgen05 without"),
        ("wrong stride", "wrong values"),
        ("wrong major", "outside of shared memory"),
        ("lanes of another warp", "tensor_load of lane 0 by a warp that reaches lanes from"),
        ("past the last column", "tcgen05.mma outside of tensor memory, at column 448"),
        ("not allocated", "tensor memory is not allocated"),
        ("not freed", "products left tensor memory allocated"),
        ("freed too early", "tensor memory is freed while a product is under way"),
        ("two threads issue", "products of two threads, whose order is not known"),
        ("half a warp", "wait at tensor_load"),
    ],
)
def test_a_mistake_is_caught(emulation, fault, said, seed):
    """Two products, the first one's sums the left operand of the second, with one mistake."""
    emulation.set_order(seed)
    message = _library().fastlm_emulation_blackwell_fault(fault.encode()).decode()
    assert said in message
    assert bool(said) == bool(message)
