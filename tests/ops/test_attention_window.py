"""window and softcap of scaled_dot_product_attention, against masks and formulas written out in fp64."""

import math

import pytest
import torch

import fastlm
from conftest import DTYPES
from fastlm._core import dropout as _dropout
from fastlm.ops._attention_reference import attention_ref
from tolerances import assert_as_close_as_torch

# (T, S, window, is_causal): both sides, one side, two diagonals, wider than the keys, rows that see no key, windows
# that begin and end inside tiles and beside them, more queries than keys and the reverse.
WINDOWS = [
    (70, 70, (3, 5), False),
    (70, 70, (20, 7), True),
    (70, 33, (0, 1), False),
    (33, 150, (None, 90), False),
    (150, 40, (64, None), False),
    (40, 40, (1000, 1000), True),
    (300, 300, (64, 0), False),
    (290, 270, (130, 127), False),
    (3, 200, (1, 100), False),
    (1, 70, (0, 63), False),
]


def _inputs(T, S, dtype=torch.float32, H=4, Hkv=2, D=32, Dv=24):
    shapes = (2, H, T, D), (2, Hkv, S, D), (2, Hkv, S, Dv)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def _attended(T, S, window, is_causal):
    """The window's definition, key by key."""
    left, right = window or (None, None)
    return torch.tensor(
        [
            [
                (left is None or j >= i - left) and (right is None or j <= i + right) and (not is_causal or j <= i)
                for j in range(S)
            ]
            for i in range(T)
        ]
    ).view(T, S)


def _formula(q, k, v, attended, softcap=None, bias=0.0):
    """(out, lse) of softmax(cap(q k / sqrt(D)) + bias) v over the attended keys, in the dtype of its inputs."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = ((scores + bias).exp() * attended).double()
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total > 0, total, 1)).to(q.dtype) @ v, total.squeeze(-1).log().to(q.dtype)


def _compare(mine, leaves, formula, dtype, size):
    """out, lse and every gradient against the formula in fp64, and its own error in `dtype`."""
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    truth, truth_lse = formula(*doubles)
    stock, _ = formula(*leaves)
    out, lse = mine
    assert_as_close_as_torch(out, truth, stock, size, "out")
    assert_as_close_as_torch(lse.to(dtype), truth_lse, truth_lse.to(dtype), size, "lse")
    dout = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    expected = torch.autograd.grad(truth, doubles, dout.double())
    theirs = torch.autograd.grad(stock, leaves, dout)
    for name, g, e, s in zip(("dq", "dk", "dv", "dmask"), grads, expected, theirs, strict=False):
        assert_as_close_as_torch(g, e, s, 4 * size, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_window(attention_kernels, poisoned, case, dtype):
    T, S, window, is_causal = case
    leaves, attended = _inputs(T, S, dtype), _attended(T, S, window, is_causal)
    mine = fastlm.scaled_dot_product_attention(
        *leaves, is_causal=is_causal, enable_gqa=True, window=window, return_lse=True
    )
    _compare(mine, leaves, lambda q, k, v: _formula(q, k, v, attended), dtype, max(T, S))
    closed = ~attended.any(-1)
    assert mine[0][:, :, closed].eq(0).all()
    assert mine[1][:, :, closed].eq(-math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [90, 2])
def test_softcap(attention_kernels, poisoned, rows, dtype):
    """Scores several times the cap, where its slope is small, and others within it."""
    leaves = _inputs(rows, 75, dtype)
    mine = fastlm.scaled_dot_product_attention(
        *leaves, enable_gqa=True, is_causal=rows > 2, softcap=0.7, return_lse=True
    )
    attended = _attended(rows, 75, None, rows > 2)
    _compare(mine, leaves, lambda q, k, v: _formula(q, k, v, attended, 0.7), dtype, 90)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_together(attention_kernels, poisoned, dtype):
    """Window, softcap and an additive mask with its gradient."""
    leaves = [*_inputs(70, 140, dtype), torch.randn(2, 1, 70, 140).to(dtype).requires_grad_()]
    attended = _attended(70, 140, (13, 80), False)
    mine = fastlm.scaled_dot_product_attention(*leaves, enable_gqa=True, window=(13, 80), softcap=1.5, return_lse=True)
    _compare(mine, leaves, lambda q, k, v, mask: _formula(q, k, v, attended, 1.5, mask), dtype, 140)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_boolean_mask_and_dropout(attention_kernels, poisoned, dtype):
    leaves, mask = _inputs(60, 60, dtype), torch.rand(60, 60) > 0.3
    torch.manual_seed(3)
    seed = _dropout.draw_seed()
    torch.manual_seed(3)
    out = fastlm.scaled_dot_product_attention(*leaves, mask, 0.3, enable_gqa=True, window=(9, 4), softcap=2.0)
    given = False, 32**-0.5, 0.3, seed, 9, 4, 2.0
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    truth, own = attention_ref(*doubles, mask, *given)[0], attention_ref(*leaves, mask, *given)[0]
    assert_as_close_as_torch(out, truth, own, 60)
    dout = torch.randn_like(out)
    theirs = torch.autograd.grad(own, leaves, dout)
    expected = torch.autograd.grad(truth, doubles, dout.double())
    for g, e, s in zip(torch.autograd.grad(out, leaves, dout), expected, theirs, strict=True):
        assert_as_close_as_torch(g, e, s, 240)


@pytest.mark.parametrize("kind", ["window", "softcap", "both"])
def test_gradcheck(kind):
    q, k, v = (x[:1, :, :, :3].detach().double().requires_grad_() for x in _inputs(5, 6))
    mask = torch.randn(5, 6).double().requires_grad_()
    window, softcap = (1, 2) if kind != "softcap" else None, 0.8 if kind != "window" else None

    def attend(q, k, v, mask):
        return fastlm.scaled_dot_product_attention(
            q, k, v, mask, enable_gqa=True, window=window, softcap=softcap, return_lse=True
        )

    assert torch.autograd.gradcheck(attend, (q, k, v, mask))
    assert torch.autograd.gradgradcheck(attend, (q, k, v, mask))


def test_operator():
    q, k, v = (x.detach().requires_grad_() for x in _inputs(9, 11))
    args = (q, k, v, None, None, False, 0.3, 0.0, 2, 3, 1.2)
    torch.library.opcheck(torch.ops.fastlm.attention.default, args)
    mine = torch.ops.fastlm.attention(*args)
    grads = torch.autograd.grad(mine[0].sum() + mine[1].sum(), (q, k, v))
    with fastlm.backend("reference"):
        theirs = torch.ops.fastlm.attention(*args)
        expected = torch.autograd.grad(theirs[0].sum() + theirs[1].sum(), (q, k, v))
    for a, b in zip((*mine, *grads), (*theirs, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    eager = fastlm.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True, window=(2, 3), softcap=1.2)
    torch.testing.assert_close(mine[0], eager)


def test_compile():
    torch._dynamo.reset()

    def attend(q, k, v):
        return fastlm.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True, window=(4, 4), softcap=3.0)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    leaves = _inputs(9, 9)
    mine, expected = compiled(*leaves), attend(*leaves)
    assert torch.equal(mine, expected)
    for a, b in zip(*(torch.autograd.grad(o.sum(), leaves) for o in (mine, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_window_that_says_causal_is_causal():
    """(None, 0) is what is_causal says, and every backend that serves the one serves the other."""
    q, k, v = (x.detach() for x in _inputs(9, 9, Hkv=4))
    for name in ("torch", "reference"):
        with fastlm.backend(name):
            causal = fastlm.scaled_dot_product_attention(q, k, v, is_causal=True)
            assert torch.equal(causal, fastlm.scaled_dot_product_attention(q, k, v, window=(None, 0)))


@pytest.mark.parametrize(
    ("option", "reason"), [({"window": (1, 1)}, "no window"), ({"softcap": 1.0}, "no soft cap")], ids=str
)
def test_torch_backend_says_what_it_lacks(option, reason):
    q, k, v = (x.detach() for x in _inputs(5, 5, Hkv=4))
    with fastlm.backend("torch"), pytest.raises(fastlm.BackendError, match=reason):
        fastlm.scaled_dot_product_attention(q, k, v, **option)


BAD = [
    ({"window": (1, 2, 3)}, r"window is \(1, 2, 3\), expected \(left, right\), each an integer >= 0 or None"),
    ({"window": (-1, 2)}, r"window is \(-1, 2\), expected"),
    ({"window": 4}, "window is 4, expected"),
    ({"window": (1.5, None)}, r"window is \(1.5, None\), expected"),
    ({"softcap": 0.0}, "softcap is 0.0, expected a positive number or None"),
    ({"softcap": math.nan}, "softcap is nan, expected a positive number"),
]


@pytest.mark.parametrize(("option", "message"), BAD, ids=[case[1][:20] for case in BAD])
def test_bad_input(option, message):
    with pytest.raises(ValueError, match="scaled_dot_product_attention: " + message):
        fastlm.scaled_dot_product_attention(*_inputs(5, 5, Hkv=4), **option)
