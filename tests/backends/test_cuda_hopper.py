"""Attention on Hopper's own instructions, both directions: parity on the emulated GPU, strides, what others serve.

The emulation takes its instructions' encodings from the PTX ISA; csrc/cuda/hopper.cuh lists what that does not show.
"""

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import CUDA
from emulation import build
from fastlm.ops._attention_reference import attention_ref
from tolerances import assert_as_close_as_torch, atol, max_error

on_cuda = pytest.mark.parametrize("kernels", [CUDA], indirect=True)
emulated = pytest.mark.skipif(torch.cuda.is_available(), reason="of the emulation alone")

# (B, H, Hkv, T, S): two rows, half a tile less a row, whole tiles, tails of both kinds, more keys than the ring holds,
# grouped heads, more queries than keys and the reverse.
SIZES = [
    (1, 1, 1, 2, 2),
    (1, 2, 1, 63, 200),
    (2, 2, 2, 128, 128),
    (1, 3, 1, 200, 63),
    (1, 1, 1, 200, 300),
    (1, 2, 2, 300, 3),
    (1, 1, 1, 2, 700),
]


def _inputs(B, H, Hkv, T, S, D, dtype):
    sizes = (H, T), (Hkv, S), (Hkv, S)
    return [torch.randn(B, heads, rows, D).to(dtype).requires_grad_() for heads, rows in sizes]


def _compare(results, truths, by_torch, size):
    for name, result, truth, stock in zip(("out", "dq", "dk", "dv"), results, truths, by_torch, strict=True):
        assert_as_close_as_torch(result, truth, stock, size, name)


def _set_order(request, seed):
    """Of blocks, warps and lanes; a GPU has its own."""
    if not torch.cuda.is_available():
        request.getfixturevalue("emulation").set_order(seed)


def _check_fault(emulation, seed, function, fault, said):
    """What the emulation says of a kernel with one mistake."""
    emulation.set_order(seed)
    run = ctypes.CDLL(str(build.build()))[function]
    run.restype = ctypes.c_char_p
    message = run(fault.encode()).decode()
    assert said in message
    assert bool(said) == bool(message)


def _with_gradients(out, inputs, dout):
    return out, *torch.autograd.grad(out, inputs, dout)


def _check(q, k, v, causal=False, scale=None):
    out, lse = fastlm.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=True, return_lse=True
    )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth, truth_lse = attention_ref(*doubles, None, causal, factor)
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    dout = torch.randn_like(out)
    results = _with_gradients(out, (q, k, v), dout)
    truths = _with_gradients(truth, doubles, dout.double())
    _compare(results, truths, _with_gradients(stock, (q, k, v), dout), max(q.shape[2], k.shape[2]) * q.shape[1])
    assert_as_close_as_torch(lse.to(q.dtype), truth_lse, truth_lse.to(q.dtype), k.shape[2], "lse")
    return results


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_parity(kernels, poisoned, sizes, D, causal, dtype):
    _check(*_inputs(*sizes, D, dtype), causal)


@on_cuda
@pytest.mark.parametrize("D", [64, 128])
def test_one_key(kernels, poisoned, D):
    """Every weight is 1: the output is the value, and the scores' gradient, a difference of equal sums, is rounding."""
    q, k, v = _inputs(1, 2, 2, 140, 1, D, torch.float16)
    dout = torch.randn(1, 2, 140, D).half()
    out, *grads = _with_gradients(fastlm.scaled_dot_product_attention(q, k, v), (q, k, v), dout)
    assert torch.equal(out, v.expand_as(out))
    truth = dout.double().sum(2, keepdim=True)
    assert_as_close_as_torch(grads[2], truth, truth.half(), 140, "dv")
    dscore = atol(torch.float32, float((dout * v).detach().abs().max()), D) * D**-0.5
    assert max_error(grads[0], torch.zeros_like(q)) <= dscore * float(k.detach().abs().max())
    assert max_error(grads[1], torch.zeros_like(k)) <= dscore * float(q.detach().abs().max()) * 140


@on_cuda
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
def test_gradient_of_lse(kernels, poisoned, D, causal):
    """Beside that of the output; PyTorch has no such sum, so its operators on the reference are compared with."""
    inputs = _inputs(1, 4, 2, 150, 170, D, torch.bfloat16)
    dout, dlse = torch.randn(1, 4, 150, D).bfloat16(), torch.randn(1, 4, 150)

    def gradients(out, lse, leaves):
        return torch.autograd.grad((out * dout.to(out.dtype)).sum() + (lse * dlse.to(lse.dtype)).sum(), leaves)

    doubles = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = fastlm.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=True, return_lse=True)
    truth, truth_lse = attention_ref(*doubles, None, causal, D**-0.5)
    stock, stock_lse = attention_ref(*inputs, None, causal, D**-0.5)
    results = out, *gradients(out, lse, inputs)
    truths = truth, *gradients(truth, truth_lse, doubles)
    _compare(results, truths, (stock, *gradients(stock, stock_lse, inputs)), 170 * 4)


@emulated
@on_cuda
@pytest.mark.parametrize("architecture", [80, 120])
@pytest.mark.parametrize("D", [64, 128])
def test_other_architectures_take_the_portable_kernel(kernels, emulation, D, architecture):
    """It sums in another order, so that its bits tell the two apart."""
    inputs = _inputs(1, 2, 1, 150, 200, D, torch.bfloat16)
    torch.manual_seed(1)
    hopper = _check(*inputs, True)
    emulation.set_device(architecture)
    torch.manual_seed(1)
    for portable, own in zip(_check(*inputs, True), hopper, strict=True):
        assert not torch.equal(portable, own)


@on_cuda
def test_strides(kernels, poisoned):
    """A fused projection's views are read in place, and views that TMA can't describe by the portable kernel."""
    q, k, v = torch.randn(2, 90, 3, 2, 64).bfloat16().requires_grad_().permute(2, 0, 3, 1, 4)
    _check(q, k, v, True)
    _check(q[:, :1], k[:, :1].expand(2, 1, 90, 64), v[:1, :1].expand(2, 1, 90, 64))
    odd = torch.randn(2, 2, 90, 65).bfloat16().requires_grad_()[..., 1:]
    _check(odd, k, v, True)


@on_cuda
def test_one_gradient_for_every_row(kernels, poisoned):
    """A sum's gradient is one number expanded, which TMA can't describe: the portable kernel takes it."""
    inputs = _inputs(1, 2, 1, 90, 140, 64, torch.bfloat16)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(fastlm.scaled_dot_product_attention(*inputs, enable_gqa=True).sum(), inputs)
    stock = torch.autograd.grad(F.scaled_dot_product_attention(*inputs, enable_gqa=True).sum(), inputs)
    truth = torch.autograd.grad(attention_ref(*doubles, None, False, 0.125)[0].sum(), doubles)
    for name, g, t, s in zip("qkv", grads, truth, stock, strict=True):
        assert_as_close_as_torch(g, t, s, 280, name)


@on_cuda
@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
def test_scales(kernels, scale):
    _check(*_inputs(1, 1, 1, 70, 140, 64, torch.float16), False, scale)


@on_cuda
def test_extreme_scores(kernels):
    q, k, v = _inputs(1, 1, 1, 70, 260, 64, torch.bfloat16)
    _check(*(x.detach().mul(factor).requires_grad_() for x, factor in ((q, 60), (k, 10), (v, 1))))


# Keys in a tile that every query of the last block attends to, in those that the diagonal cuts, the last one.
@on_cuda
@pytest.mark.parametrize("key", [3, 130, 299])
@pytest.mark.parametrize(("D", "right"), [(64, 0), (64, 40), (128, 0)])
def test_what_a_row_does_not_attend_to_may_be_anything(kernels, poisoned, request, D, right, key):
    """Keys and values that are not finite: the rows that do not attend to them keep their bits."""
    q, k, v = (torch.randn(1, 2, 300, D).bfloat16() for _ in range(3))
    clean = fastlm.scaled_dot_product_attention(q, k, v, window=(None, right), return_lse=True)
    attends = torch.arange(300) + right >= key
    safe = torch.stack([torch.ones_like(attends), ~attends])
    for order, (names, bad) in enumerate([("k", math.nan), ("v", math.nan), ("v", -math.inf), ("kv", math.inf)]):
        _set_order(request, order)
        spoilt = {"k": k.clone(), "v": v.clone()}
        for name in names:
            spoilt[name][0, 1, key, 7:9] = bad
        out = fastlm.scaled_dot_product_attention(q, spoilt["k"], spoilt["v"], window=(None, right), return_lse=True)
        for mine, before in zip(out, clean, strict=True):
            assert torch.equal(mine[0][safe], before[0][safe])
        if names == "v":
            assert torch.equal(out[1], clean[1])
            assert not out[0][0, 1, attends, 7:9].isfinite().any()
            other = torch.ones(D, dtype=torch.bool).index_fill(0, torch.tensor([7, 8]), False)
            assert torch.equal(out[0][..., other], clean[0][..., other])


@on_cuda
@pytest.mark.parametrize("causal", [False, True])
def test_what_lies_behind_the_keys_may_be_anything(kernels, poisoned, causal):
    """The rest of a cache; nothing attends to it."""
    q, k, v = (torch.randn(1, 2, 140, 64).half() for _ in range(3))
    clean = fastlm.scaled_dot_product_attention(q, k[:, :, :70], v[:, :, :70], is_causal=causal)
    for x in (k, v):
        x[:, :, 70:] = math.nan
    again = fastlm.scaled_dot_product_attention(q, k[:, :, :70], v[:, :, :70], is_causal=causal)
    assert torch.equal(again, clean)


@on_cuda
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
def test_any_order_gives_the_same_bits(kernels, request, D, causal):
    """Blocks add to dQ in turns whatever the order they run in: the emulation draws one, a GPU runs a hundred times."""
    on_gpu = torch.cuda.is_available()
    inputs = _inputs(*((2, 8, 2, 1100, 1300) if on_gpu else (1, 2, 1, 140, 300)), D, torch.bfloat16)
    dout = torch.randn_like(inputs[0])

    def run(order):
        _set_order(request, order)
        out = fastlm.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=True)
        return _with_gradients(out, inputs, dout)

    first = run(0)
    for order in range(1, 100 if on_gpu else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(order), strict=True))


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
    _check_fault(emulation, seed, "fastlm_emulation_hopper_fault", fault, said)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", ""),
        ("matrices not fenced", "wrote and has not fenced"),
        ("numbers not fenced", "wrote and has not fenced"),
        ("count set before the copy is waited for", "a count was set while bulk copies of its thread were under way"),
        ("source of a bulk copy overwritten", "the source of a bulk copy changed before it was read"),
        ("a turn that never comes", "wait at a count in global memory"),
    ],
)
def test_a_mistake_in_taking_turns_is_caught(emulation, fault, said, seed):
    """Blocks that add a product to one matrix, one after the other, with one mistake."""
    _check_fault(emulation, seed, "fastlm_emulation_turn_fault", fault, said)
