"""scaled_dot_product_attention: parity with the fp64 reference, gradients of both orders, masks, layouts, edges."""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import DTYPES
from fastlm._core import dropout as _dropout
from fastlm.backends import cpu as cpu_backend
from fastlm.ops import attention as attention_op
from fastlm.ops._attention_reference import attention_ref
from tolerances import assert_as_close_as_torch

# (B, H, Hkv, T, S, D, Dv): one tile and several, primes below and above the row groups and key tiles, more keys than
# queries and the reverse, one query, grouped heads, value heads of another size, the largest head size, and more keys
# than the widest step of any kernel.
SHAPES = [
    (2, 3, 3, 64, 64, 64, 64),
    (1, 2, 2, 131, 131, 80, 80),
    (2, 4, 2, 37, 101, 17, 29),
    (1, 4, 1, 70, 13, 64, 32),
    (1, 6, 3, 1, 200, 64, 64),
    (1, 1, 1, 7, 1, 1, 1),
    (1, 1, 1, 67, 65, 256, 256),
    (1, 2, 1, 290, 300, 32, 32),
]
MASKS = ["none", "causal", "bool", "padding", "additive", "bias"]
CASES = [(*shape, MASKS[(i + j) % len(MASKS)]) for i, shape in enumerate(SHAPES) for j in range(2 if i < 4 else 1)]


def _inputs(B, H, Hkv, T, S, D, Dv, dtype=torch.float32):
    q = torch.randn(B, H, T, D).to(dtype).requires_grad_()
    k = torch.randn(B, Hkv, S, D).to(dtype).requires_grad_()
    v = torch.randn(B, Hkv, S, Dv).to(dtype).requires_grad_()
    return q, k, v


def _mask(kind, B, H, T, S, dtype):
    if kind == "bool":
        return torch.rand(T, S) > 0.3
    if kind == "padding":
        return (torch.arange(S) < torch.randint(1, S + 1, (B, 1))).view(B, 1, 1, S)
    if kind == "additive":
        return torch.randn(B, H, T, S).to(dtype).requires_grad_()
    if kind == "bias":
        return torch.randn(1, H, 1, S).to(dtype).requires_grad_()
    return None


def _leaves(*tensors):
    return [t for t in tensors if t is not None and t.requires_grad]


def _doubled(t):
    return t if t is None or t.dtype == torch.bool else t.detach().double().requires_grad_(t.requires_grad)


def _truth(q, k, v, mask, causal=False, dropout_p=0.0, seed=0, scale=None):
    """fp64 outputs of the reference and the fp64 leaves they came from."""
    inputs = [_doubled(t) for t in (q, k, v, mask)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attention_ref(*inputs, causal, scale, dropout_p, seed), _leaves(*inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(attention_kernels, poisoned, case, dtype):
    *sizes, kind = case
    B, H, _, T, S, D, Dv = sizes
    q, k, v = _inputs(*sizes, dtype)
    mask, causal = _mask(kind, B, H, T, S, dtype), kind == "causal"
    (truth, _), doubles = _truth(q, k, v, mask, causal)
    out = fastlm.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    stock = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    assert_as_close_as_torch(out, truth, stock, S, "out")
    dout = torch.randn(B, H, T, Dv).to(dtype)
    leaves = _leaves(q, k, v, mask)
    grads = torch.autograd.grad(out, leaves, dout)
    theirs = torch.autograd.grad(stock, leaves, dout)
    expected = torch.autograd.grad(truth, doubles, dout.double())
    size = max(T, S, D) * H * (B if kind == "bias" else 1)
    for name, g, e, s in zip(("dq", "dk", "dv", "dmask"), grads, expected, theirs, strict=False):
        assert g.dtype == dtype
        assert_as_close_as_torch(g, e, s, size, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_and_its_gradient(attention_kernels, poisoned, dtype):
    q, k, v = _inputs(2, 4, 2, 35, 70, 40, 24, dtype)
    mask = _mask("additive", 2, 4, 35, 70, dtype)
    (truth, truth_lse), doubles = _truth(q, k, v, mask)
    out, lse = fastlm.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, return_lse=True)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # PyTorch has no log-sum-exp to compare with: a score's rounding in the input dtype is what is allowed.
    assert_as_close_as_torch(lse.to(dtype), truth_lse, truth_lse.to(dtype), 70, "lse")
    weights = torch.randn(2, 4, 35), torch.randn(2, 4, 35, 24)
    loss = (lse * weights[0]).sum() + (out * weights[1].to(dtype)).sum()
    expected = (truth_lse * weights[0].double()).sum() + (truth * weights[1].to(dtype).double()).sum()
    grads = torch.autograd.grad(loss, (q, k, v, mask))
    for name, g, e in zip("qkvm", grads, torch.autograd.grad(expected, doubles), strict=True):
        assert_as_close_as_torch(g, e, e.to(dtype), 35 * 4, name)


def test_gradient_of_lse_alone(attention_kernels):
    q, k, v = _inputs(1, 2, 2, 9, 11, 8, 8)
    (_, truth), doubles = _truth(q, k, v, None)
    _, lse = fastlm.scaled_dot_product_attention(q, k, v, return_lse=True)
    grads = torch.autograd.grad(lse.sum(), (q, k, v))
    expected = torch.autograd.grad(truth.sum(), doubles[:2])
    assert_as_close_as_torch(grads[0], expected[0], None, 100, "dq")
    assert_as_close_as_torch(grads[1], expected[1], None, 100, "dk")
    assert grads[2].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout(attention_kernels, poisoned, dtype, p):
    """The mask is a function of seed, row and column: the reference with the same seed gives the same result."""
    q, k, v = _inputs(2, 4, 2, 33, 70, 24, 24, dtype)
    mask = _mask("bias", 2, 4, 33, 70, dtype)
    torch.manual_seed(5)
    seed = _dropout.draw_seed()
    torch.manual_seed(5)
    out = fastlm.scaled_dot_product_attention(q, k, v, mask, p, enable_gqa=True)
    (truth, _), doubles = _truth(q, k, v, mask, dropout_p=p, seed=seed)
    own = attention_ref(q, k, v, mask, False, 24**-0.5, p, seed)[0]
    assert_as_close_as_torch(out, truth, own, 70, "out")
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v, mask), dout)
    theirs = torch.autograd.grad(own, (q, k, v, mask), dout)
    expected = torch.autograd.grad(truth, doubles, dout.double())
    for name, g, e, s in zip("qkvm", grads, expected, theirs, strict=True):
        assert_as_close_as_torch(g, e, s, 70 * 8, name)


def test_dropout_keeps_the_expected_share():
    """With V the identity, the output is the dropped weights: zeros with frequency p, the mean unchanged."""
    S = 64
    q, k = torch.randn(4, 8, 128, 32), torch.randn(4, 8, S, 32)
    v = torch.eye(S).expand(4, 8, S, S)
    weights = fastlm.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    n = weights.numel()
    assert abs(weights.eq(0).double().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n)
    assert abs(weights.sum(-1).mean() - 1) < 0.01


# Every way a mask may broadcast against (B, H, T, S) = (2, 4, 50, 70).
MASK_SHAPES = [
    (50, 70),
    (4, 1, 70),
    (2, 1, 1, 70),
    (2, 4, 50, 1),
    (1,),
    (2, 1, 50, 70),
    (4, 50, 70),
    (1, 1, 1, 1),
    (70,),
]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_gradient_of_a_broadcast_mask(attention_kernels, poisoned, shape):
    q, k, v = _inputs(2, 4, 2, 50, 70, 16, 16)
    mask = torch.randn(shape).requires_grad_()
    (truth, _), doubles = _truth(q, k, v, mask)
    out = fastlm.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    dout = torch.randn_like(out)
    (dmask,) = torch.autograd.grad(out, mask, dout)
    expected = torch.autograd.grad(truth, doubles, dout.double())[3]
    assert dmask.shape == mask.shape
    # Where the mask shifts whole rows its gradient is 0 and only the summed terms' rounding is left to bound.
    summed = 2 * 4 * 50 * 70 // mask.numel()
    atol = torch.finfo(torch.float32).eps * math.sqrt(summed) * 8
    torch.testing.assert_close(dmask.double(), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fully_masked_rows_give_zero(attention_kernels, poisoned, kind, dtype):
    q, k, v = _inputs(2, 2, 2, 70, 75, 16, 16, dtype)
    mask = torch.rand(70, 75) > 0.2
    mask[3], mask[64:] = False, False
    if kind == "additive":
        mask = torch.zeros(70, 75, dtype=dtype).masked_fill(~mask, -math.inf).requires_grad_()
    (truth, truth_lse), doubles = _truth(q, k, v, mask)
    out, lse = fastlm.scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    assert out[:, :, 3].eq(0).all()
    assert out[:, :, 64:].eq(0).all()
    assert lse[:, :, 3].eq(-math.inf).all()
    assert torch.equal(lse.isinf(), truth_lse.isinf())
    leaves = _leaves(q, k, v, mask)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert grads[0][:, :, 3].eq(0).all()
    for g, e in zip(grads, torch.autograd.grad(truth, doubles, torch.ones_like(truth)), strict=True):
        assert_as_close_as_torch(g, e, e.to(dtype), 70 * 4, "gradient")


def test_nan_stays_in_its_row(attention_kernels):
    q, k, v = _inputs(1, 2, 2, 70, 70, 16, 16)
    clean = fastlm.scaled_dot_product_attention(q, k, v, is_causal=True)
    with torch.no_grad():
        q[0, 1, 20] = math.nan
    out = fastlm.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out[0, 1, 20].isnan().all()
    kept = torch.ones(2, 70, dtype=torch.bool)
    kept[1, 20] = False
    assert torch.equal(out[0][kept], clean[0][kept])


def test_nan_of_a_later_token_does_not_reach_back(attention_kernels):
    q, k, v = _inputs(1, 1, 1, 70, 70, 16, 16)
    clean = fastlm.scaled_dot_product_attention(q, k, v, is_causal=True)
    with torch.no_grad():
        for x in (q, k, v):
            x[0, 0, 20] = math.nan
    out = fastlm.scaled_dot_product_attention(q, k, v, is_causal=True)
    exact = {} if attention_kernels == "triton" else {"rtol": 0, "atol": 0}  # it makes such rows in another order
    torch.testing.assert_close(out[0, 0, :20], clean[0, 0, :20], **exact)
    assert out[0, 0, 20:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scores(attention_kernels, dtype):
    """Scores of a thousand, where exponentials overflow unless the maximum is taken out first."""
    q, k, v = (x.detach() for x in _inputs(1, 2, 2, 40, 130, 32, 32, dtype))
    q, k = q * 16, k * 16
    (truth, _), _ = _truth(q, k, v, None)
    out = fastlm.scaled_dot_product_attention(q, k, v)
    assert_as_close_as_torch(out, truth, F.scaled_dot_product_attention(q, k, v), 130)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale(attention_kernels, dtype):
    q, k, v = _inputs(1, 2, 2, 20, 30, 16, 16, dtype)
    (truth, _), doubles = _truth(q, k, v, None, scale=-0.7)
    out = fastlm.scaled_dot_product_attention(q, k, v, scale=-0.7)
    stock = F.scaled_dot_product_attention(q, k, v, scale=-0.7)
    assert_as_close_as_torch(out, truth, stock, 30)
    grads, theirs = (torch.autograd.grad(o.sum(), (q, k, v)) for o in (out, stock))
    for g, e, t in zip(grads, torch.autograd.grad(truth.sum(), doubles), theirs, strict=True):
        assert_as_close_as_torch(g, e, t, 60)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5])
def test_few_rows(attention_kernels, poisoned, T, dtype):
    """Decoding: a handful of queries reads the keys where they are, here from inside a longer cache."""
    q, k, v = (x.detach() for x in _inputs(2, 3, 3, T, 150, 70, 37, dtype))
    k, v = k[:, :, 5:142], v[:, :, 5:142]
    mask = torch.rand(2, 1, T, 137) > 0.2
    (truth, truth_lse), _ = _truth(q, k, v, mask)
    out, lse = fastlm.scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    assert_as_close_as_torch(out, truth, F.scaled_dot_product_attention(q, k, v, mask), 137)
    assert_as_close_as_torch(lse.to(dtype), truth_lse, truth_lse.to(dtype), 137)


def test_fused_projection_is_read_in_place(attention_kernels, poisoned):
    B, T, H, D = 2, 70, 3, 16
    qkv = torch.randn(B, T, 3, H, D, requires_grad=True)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    out = fastlm.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out.stride() == (T * H * D, D, H * D, 1)
    dense = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    plain = fastlm.scaled_dot_product_attention(*dense, is_causal=True)
    assert torch.equal(out, plain)
    dout = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    expected = torch.autograd.grad(plain, dense, dout)
    assert torch.equal(grad, torch.stack([g.transpose(1, 2) for g in expected], 2))


def test_gradients_have_their_inputs_layout():
    q, k, v = (torch.randn(2, 9, 3, 8).transpose(1, 2).requires_grad_() for _ in range(3))
    out = fastlm.scaled_dot_product_attention(q, k, v)
    for g, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert g.stride() == x.stride()


def test_any_strides(attention_kernels, poisoned):
    """Last dimensions that are not contiguous, reversed orders, broadcast keys, a strided mask and gradient."""
    base = torch.randn(16, 40, 3, 2)
    q = base.permute(3, 2, 1, 0).requires_grad_()
    k = torch.randn(2, 1, 50, 16).expand(2, 3, 50, 16).requires_grad_()
    v = torch.randn(2, 3, 16, 50).transpose(2, 3).requires_grad_()
    mask = torch.randn(50, 80)[:, ::2].t().requires_grad_()
    (truth, _), doubles = _truth(q, k, v, mask)
    out = fastlm.scaled_dot_product_attention(q, k, v, mask)
    dout = torch.randn(16, 40, 3, 2).permute(3, 2, 1, 0)
    grads = torch.autograd.grad(out, (q, k, v, mask), dout)
    assert_as_close_as_torch(out, truth, truth.float(), 50)
    for g, e in zip(grads, torch.autograd.grad(truth, doubles, dout.double()), strict=True):
        assert_as_close_as_torch(g, e, e.float(), 300)


# Shapes of query, key, value and mask beyond (B, H, T, D), all of which PyTorch takes.
BATCHES = [
    ((5, 8), (7, 8), (7, 4), (5, 7)),
    ((3, 5, 8), (3, 7, 8), (3, 7, 8), (3, 1, 7)),
    ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), (5, 7)),
    ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), (2, 1, 1, 5, 7)),
    ((2, 4, 5, 8), (1, 4, 7, 8), (2, 4, 7, 8), (2, 1, 5, 7)),
    ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8), None),
    ((2, 1, 5, 8), (2, 4, 7, 8), (2, 1, 7, 8), None),
]


@pytest.mark.parametrize("shapes", BATCHES, ids=str)
def test_batch_dimensions(shapes):
    q, k, v, mask = (None if s is None else torch.randn(s, requires_grad=True) for s in shapes)
    out, lse = fastlm.scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    truth = F.scaled_dot_product_attention(*(_doubled(t) for t in (q, k, v, mask)))
    assert lse.shape == out.shape[:-1]
    assert_as_close_as_torch(out, truth, truth.float(), 8)
    leaves, doubles = _leaves(q, k, v, mask), [_doubled(t) for t in (q, k, v, mask)]
    truth = F.scaled_dot_product_attention(*doubles)
    expected = torch.autograd.grad(truth.sum(), _leaves(*doubles))
    for g, e, x in zip(torch.autograd.grad(out.sum(), leaves), expected, leaves, strict=True):
        assert g.shape == x.shape
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)


def test_grouped_heads_of_two_sizes():
    q, k, v = torch.randn(1, 8, 5, 4), torch.randn(1, 4, 6, 4), torch.randn(1, 2, 6, 4)
    out = fastlm.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert_as_close_as_torch(out, truth, truth.float(), 8)


EMPTY = [(0, 2, 5, 7, 8, 8), (2, 0, 5, 7, 8, 8), (2, 2, 0, 7, 8, 8), (2, 2, 5, 0, 8, 8), (2, 2, 5, 7, 8, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(attention_kernels, poisoned, sizes, dtype):
    B, H, T, S, D, Dv = sizes
    q, k, v = _inputs(B, H, H, T, S, D, Dv, dtype)
    out = fastlm.scaled_dot_product_attention(q, k, v)
    assert out.shape == (B, H, T, Dv)
    assert out.eq(0).all()
    for g in torch.autograd.grad(out.sum(), (q, k, v)):
        assert g.eq(0).all()


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bias", "dropout"])
def test_gradcheck(kind):
    q, k, v = _inputs(1, 4, 2, 5, 7, 3, 4, torch.float64)
    mask = _mask(kind, 1, 4, 5, 7, torch.float64)

    def attend(q, k, v, mask):
        torch.manual_seed(3)
        return fastlm.scaled_dot_product_attention(
            q, k, v, mask, 0.4 * (kind == "dropout"), kind == "causal", enable_gqa=True, return_lse=True
        )

    assert torch.autograd.gradcheck(attend, (q, k, v, mask))
    assert torch.autograd.gradgradcheck(attend, (q, k, v, mask))


@pytest.mark.parametrize(("B", "Hkv"), [(3, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(every_isa, threads, B, Hkv, dtype):
    """One head makes the backward split rows and keys over threads; twelve give each thread whole heads."""
    q, k, v = _inputs(B, 2 * Hkv, Hkv, 200, 200, 32, 32, dtype)
    mask = torch.randn(200, 200).to(dtype).requires_grad_()
    dout = torch.randn(B, 2 * Hkv, 200, 32).to(dtype)
    results = []
    for n in (1, 2, 5, 2):
        threads(n)
        out = fastlm.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        results.append((out, *torch.autograd.grad(out, (q, k, v, mask), dout)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_do_not_depend_on_the_batch_around_them(attention_kernels):
    q, k, v = _inputs(3, 2, 2, 150, 150, 32, 32)
    whole = fastlm.scaled_dot_product_attention(q, k, v, is_causal=True)
    part = fastlm.scaled_dot_product_attention(q[1:2, 1:], k[1:2, 1:], v[1:2, 1:], is_causal=True)
    assert torch.equal(whole[1:2, 1:], part)
    tail = fastlm.scaled_dot_product_attention(q[:, :, :77], k, v, is_causal=True)
    assert torch.equal(whole[:, :, :77], tail)


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
def test_other_backends(name, kind):
    q, k, v = _inputs(2, 4, 2, 11, 13, 8, 8)
    mask = _mask(kind, 2, 4, 11, 13, torch.float32)
    mine = fastlm.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal", enable_gqa=True)
    with fastlm.backend(name):
        theirs = fastlm.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal", enable_gqa=True)
    torch.testing.assert_close(mine, theirs)
    leaves = _leaves(q, k, v, mask)
    for g, e in zip(torch.autograd.grad(mine.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


def test_torch_backend_says_what_it_lacks():
    q, k, v = _inputs(1, 1, 1, 4, 4, 8, 8)
    with fastlm.backend("torch"):
        with pytest.raises(fastlm.BackendError, match="no log-sum-exp"):
            fastlm.scaled_dot_product_attention(q, k, v, return_lse=True)
        with pytest.raises(fastlm.BackendError, match="another mask"):
            fastlm.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert fastlm.explain(fastlm.scaled_dot_product_attention, q, k, v).selected == "cpu"


def test_autocast():
    q, k, v = _inputs(1, 2, 2, 9, 9, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = fastlm.scaled_dot_product_attention(q, k, v, is_causal=True)
        double = fastlm.scaled_dot_product_attention(q.double(), k.double(), v.double())
        with fastlm.backend("reference"):
            reference = fastlm.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out.dtype == reference.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    plain = fastlm.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), is_causal=True)
    assert torch.equal(out, plain)
    assert torch.autograd.grad(out.float().sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize("kind", ["causal", "bool", "bias", "dropout"])
def test_opcheck(kind):
    q, k, v = _inputs(2, 4, 2, 9, 11, 8, 6)
    mask = _mask(kind, 2, 4, 9, 11, torch.float32)
    seed = torch.tensor(7) if kind == "dropout" else None
    args = (q, k, v, mask, seed, kind == "causal", 0.3, 0.5 * (kind == "dropout"), -1, -1, 0.0)
    torch.library.opcheck(torch.ops.fastlm.attention.default, args)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = torch.ops.fastlm.attention(*args)
    backward = (
        torch.randn(2, 4, 9, 6),
        torch.randn_like(lse),
        q,
        k,
        v,
        mask,
        seed,
        out,
        lse,
        *args[5:],
        kind == "bias",
    )
    backward = [x.detach() if isinstance(x, torch.Tensor) else x for x in backward]
    torch.library.opcheck(torch.ops.fastlm.attention_backward.default, backward)


def test_operator_on_the_reference_backend():
    q, k, v = _inputs(2, 4, 2, 9, 11, 8, 6)
    mask = _mask("bias", 2, 4, 9, 11, torch.float32)
    mine = torch.ops.fastlm.attention(q, k, v, mask, None, False, 0.3, 0.0, -1, -1, 0.0)
    grads = torch.autograd.grad(mine[0].sum() + mine[1].sum(), (q, k, v, mask))
    with fastlm.backend("reference"):
        theirs = torch.ops.fastlm.attention(q, k, v, mask, None, False, 0.3, 0.0, -1, -1, 0.0)
        expected = torch.autograd.grad(theirs[0].sum() + theirs[1].sum(), (q, k, v, mask))
    assert mine[0].stride() == theirs[0].stride()
    for a, b in zip((*mine, *grads), (*theirs, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()

    def layer(qkv, mask):
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        out, lse = fastlm.scaled_dot_product_attention(q, k, v, mask, return_lse=True)
        out = fastlm.scaled_dot_product_attention(out, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2), lse

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (6, 9):
        qkv = torch.randn(2, T, 3, 2, 8, requires_grad=True)
        mask = torch.randn(T, T, requires_grad=True)
        mine, expected = compiled(qkv, mask), layer(qkv, mask)
        for a, b in zip(mine, expected, strict=True):
            assert torch.equal(a, b)
        grads = (torch.autograd.grad(o[0].sum() + o[1].sum(), (qkv, mask)) for o in (mine, expected))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_compile_dropout_draws_anew():
    torch._dynamo.reset()
    attend = torch.compile(
        lambda q: fastlm.scaled_dot_product_attention(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    q = torch.randn(1, 2, 16, 8)
    torch.manual_seed(1)
    first, second = attend(q), attend(q)
    torch.manual_seed(1)
    assert torch.equal(first, attend(q))
    assert not torch.equal(first, second)


def test_vmap():
    q = torch.randn(3, 2, 4, 5, 8)
    out = torch.func.vmap(lambda x: fastlm.scaled_dot_product_attention(x, x, x, is_causal=True))(q)
    torch.testing.assert_close(out, fastlm.scaled_dot_product_attention(q, q, q, is_causal=True))


Q = torch.zeros(2, 4, 5, 8)
BAD = [
    ((Q, Q[..., :7], Q), {}, ValueError, "key has head size 7, expected 8 to match query"),
    ((Q, Q, Q[:, :, :4]), {}, ValueError, "value has length 4, expected 5 to match key"),
    ((Q, Q.double(), Q), {}, TypeError, "key has dtype torch.float64, expected torch.float32 to match query"),
    ((Q.int(), Q, Q), {}, TypeError, "query has dtype torch.int32, expected a floating-point dtype"),
    ((Q, Q[0], Q), {}, ValueError, "key has 3 dimensions, expected 4 to match query"),
    ((Q[0, 0, 0], Q[0, 0, 0], Q[0, 0, 0]), {}, ValueError, "query has 1 dimensions, expected at least 2"),
    ((Q, Q[:, :3], Q[:, :3]), {}, ValueError, r"heads \(4,\), \(3,\), \(3,\), which do not broadcast"),
    ((Q, Q[:, :3], Q[:, :3]), {"enable_gqa": True}, ValueError, "key has 3 heads, expected a divisor of query's 4"),
    ((Q, Q.new_zeros(3, 4, 5, 8), Q), {}, ValueError, r"batch dimensions \(2,\), \(3,\), \(2,\)"),
    ((Q, Q, Q, torch.zeros(5, 4)), {}, ValueError, r"attn_mask has shape \(5, 4\), expected it to broadcast to"),
    ((Q, Q, Q, torch.zeros(5, 5, dtype=torch.int32)), {}, TypeError, "attn_mask has dtype torch.int32, expected bool"),
    ((Q, Q, Q, torch.zeros(5, 5)), {"is_causal": True}, ValueError, "attn_mask and is_causal=True were both given"),
    ((Q, Q, Q), {"dropout_p": 1.5}, ValueError, "dropout_p is 1.5, expected a probability"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD, ids=[case[3][:30] for case in BAD])
def test_bad_input(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        fastlm.scaled_dot_product_attention(*args, **kwargs)


def test_the_short_way_is_the_long_one(every_isa, poisoned):
    """Plain calls without gradients skip what others need; asking for lse takes them through it."""
    for dtype in DTYPES:
        for T, is_causal in ((1, False), (40, True)):
            q, k, v = (x.detach() for x in _inputs(2, 3, 3, T, 70, 40, 40, dtype))
            long, _ = fastlm.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3, return_lse=True)
            with fastlm.backend("cpu"):
                short = fastlm.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3)
            assert torch.equal(long, short)
            assert short.stride() == long.stride()


def test_the_short_way_takes_any_strides():
    q, k, v = (x.detach() for x in _inputs(2, 3, 3, 5, 70, 40, 40))
    plain = fastlm.scaled_dot_product_attention(q, k, v)
    for order in ((0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)):  # each its own inverse
        swapped = [x.permute(order).contiguous().permute(order) for x in (q, k, v)]
        assert torch.equal(plain, fastlm.scaled_dot_product_attention(*swapped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_behind_padding_stays_there(attention_kernels, poisoned, dtype):
    """Keys that a row's mask closes for all queries count for nothing, whatever they hold."""
    q, k, v = (x.detach() for x in _inputs(2, 2, 2, 40, 300, 32, 32, dtype))
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    mask[0, ..., 135:], mask[1, ..., :70] = False, False
    (truth, _), _ = _truth(q, k, v, mask)
    stock = F.scaled_dot_product_attention(q, k, v, mask)
    for x in (k, v):
        x[0, :, 135:], x[1, :, :70] = math.nan, math.inf
    assert_as_close_as_torch(fastlm.scaled_dot_product_attention(q, k, v, mask), truth, stock, 300)


def _thresholds(isas, monkeypatch):
    """The module of thresholds as a CPU with these instruction sets would load it."""
    monkeypatch.setattr(cpu_backend, "cpu_isas", lambda: isas)
    spec = importlib.util.find_spec("fastlm.ops._thresholds")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not fastlm.cpu_isas(), reason="no CPU extension")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("best", ["avx2", "avx512", "avx512_bf16", "amx"])
def test_decoding_is_chosen_by_what_the_cpu_has(monkeypatch, best, dtype):
    """PyTorch is fast in 16 bits where there is AMX alone; elsewhere its kernel takes ten times as long as ours."""
    isas = cpu_backend.ISAS
    table = _thresholds(isas[: isas.index(best) + 1], monkeypatch).SHORT_DECODE
    monkeypatch.setattr(attention_op, "SHORT_DECODE", table)
    monkeypatch.setattr(attention_op, "_PLAIN_REQUESTS", {})

    def choice(heads, keys):
        q, k = torch.zeros(1, heads, 1, 64, dtype=dtype), torch.zeros(1, heads, keys, 64, dtype=dtype)
        return fastlm.explain(fastlm.scaled_dot_product_attention, q, k, k).selected

    ours = dtype in (torch.bfloat16, torch.float16) and best != "amx"
    assert choice(12, 512) == ("cpu" if ours or best.startswith("avx512") else "torch")
    assert choice(1, 64) == ("cpu" if ours else "torch")
    assert choice(12, 4096) == "cpu"
