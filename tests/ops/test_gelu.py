"""gelu and bias_gelu: parity with the fp64 reference, gradients of both orders, edges, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import DTYPES
from fastlm._core import dropout as _dropout
from tolerances import assert_as_close_as_torch

# Scalars, tails of every vector width, empty, a multiple of the flat row, more rows than chunks.
SHAPES = [(), (7,), (3, 37), (0, 16), (5, 0), (2, 3, 65), (2, 4096), (301, 19)]
FORMS = ["none", "tanh"]
ROUNDINGS = 16  # operations in a row behind one element, each of which rounds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(kernels, poisoned, shape, approximate, dtype):
    x = (torch.randn(shape) * 3).to(dtype).requires_grad_()
    g = torch.randn(shape).to(dtype)
    y = fastlm.gelu(x, approximate)
    (dx,) = torch.autograd.grad(y, x, g)
    X = x.detach().double().requires_grad_()
    Y = F.gelu(X, approximate=approximate)
    (DX,) = torch.autograd.grad(Y, X, g.double())
    stock = F.gelu(x, approximate=approximate)
    assert_as_close_as_torch(y, Y, stock, ROUNDINGS)
    assert_as_close_as_torch(dx, DX, torch.autograd.grad(stock, x, g)[0], ROUNDINGS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s], ids=str)
def test_bias_gelu_parity(kernels, poisoned, shape, approximate, dropout_p, dtype):
    N = shape[-1]
    x, bias = (torch.randn(s).to(dtype).requires_grad_() for s in (shape, (N,)))
    g = torch.randn(shape).to(dtype)
    torch.manual_seed(7)
    y = fastlm.bias_gelu(x, bias, approximate, dropout_p)
    dx, db = torch.autograd.grad(y, (x, bias), g)
    torch.manual_seed(7)
    seed = _dropout.draw_seed()

    def plain(x, bias):
        keep = _dropout.factors(x.numel() // max(N, 1), N, dropout_p, seed, x.dtype, x.device).reshape(x.shape)
        return F.gelu(x + bias, approximate=approximate) * keep

    X, B = (t.detach().double().requires_grad_() for t in (x, bias))
    Y = plain(X, B)
    DX, DB = torch.autograd.grad(Y, (X, B), g.double())
    stock = plain(x, bias)
    sx, sb = torch.autograd.grad(stock, (x, bias), g)
    assert_as_close_as_torch(y, Y, stock, ROUNDINGS)
    assert_as_close_as_torch(dx, DX, sx, ROUNDINGS)
    assert_as_close_as_torch(db, DB, sb, ROUNDINGS + x.numel() // max(N, 1))


@pytest.mark.parametrize("approximate", FORMS)
def test_tails_keep_their_relative_accuracy(kernels, approximate):
    """The left tail is tiny but not zero, and the derivative stays finite for any magnitude."""
    x = torch.linspace(-5, -1, 4001)
    truth = fastlm.ops.gelu.gelu_ref(x.double(), None, approximate)
    relative = ((fastlm.gelu(x, approximate).double() - truth) / truth).abs()
    assert relative.max() < 32 * torch.finfo(torch.float32).eps
    far = torch.tensor([-3e38, -1e20, -1e4, -60, 60, 1e4, 1e20, 3e38], requires_grad=True)
    y = fastlm.gelu(far, approximate)
    (dx,) = torch.autograd.grad(y.sum(), far)
    torch.testing.assert_close(y, far.clamp(min=0), rtol=torch.finfo(torch.float32).eps, atol=1e-30)
    torch.testing.assert_close(dx, (far > 0).float(), rtol=0, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("approximate", FORMS)
def test_every_value_of_16_bits(isa, approximate, dtype):
    """Some instruction sets look them up."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).requires_grad_()
    y, stock = fastlm.gelu(x, approximate), F.gelu(x, approximate=approximate)
    dx, stock_dx = (torch.autograd.grad(out.sum(), x)[0] for out in (y, stock))
    X = x.detach().double().requires_grad_()
    Y = F.gelu(X, approximate=approximate)
    (DX,) = torch.autograd.grad(Y.sum(), X)
    near, positive = X.abs() <= 16, X > 16
    assert_as_close_as_torch(y[near], Y[near], stock[near], ROUNDINGS)
    assert_as_close_as_torch(dx[near], DX[near], stock_dx[near], ROUNDINGS)
    assert y[x.isnan()].isnan().all()
    assert dx[x.isnan()].isnan().all()
    assert torch.equal(y[positive], x[positive])
    assert (dx[positive] == 1).all()
    assert (y[X < -16].double().abs() < 1e-30).all()
    assert (dx[X < -16].double().abs() < 1e-30).all()


def test_nan_stays_where_it_is(kernels):
    x = torch.randn(100)
    x[13] = math.nan
    for approximate in FORMS:
        assert fastlm.gelu(x, approximate).isnan().nonzero().tolist() == [[13]]


def test_views(kernels, poisoned):
    base = torch.randn(12, 10, requires_grad=True)
    x = base.T[::2]
    g = torch.randn(1, 1).expand(5, 12)  # strides of zero
    torch.testing.assert_close(fastlm.gelu(x), F.gelu(x))
    actual = torch.autograd.grad(fastlm.gelu(x), base, g)[0]
    torch.testing.assert_close(actual, torch.autograd.grad(F.gelu(x), base, g)[0])


def test_same_bits_for_any_thread_count(isa, threads):
    x, bias, g = torch.randn(333, 129), torch.randn(129), torch.randn(333, 129)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        torch.manual_seed(1)
        args = x.clone().requires_grad_(), bias.clone().requires_grad_()
        y = fastlm.bias_gelu(*args, "tanh", 0.1)
        results.append((y, *torch.autograd.grad(y, args, g)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend, approximate):
    x, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,)))

    def fused(x, bias):
        torch.manual_seed(2)
        return fastlm.bias_gelu(x, bias, approximate, 0.3)

    with fastlm.backend(backend):
        assert torch.autograd.gradcheck(lambda x: fastlm.gelu(x, approximate), (x,))
        assert torch.autograd.gradgradcheck(lambda x: fastlm.gelu(x, approximate), (x,))
        assert torch.autograd.gradcheck(fused, (x, bias))
        assert torch.autograd.gradgradcheck(fused, (x, bias))


def test_compile():
    x, bias = torch.randn(6, 10, requires_grad=True), torch.randn(10, requires_grad=True)
    f = torch.compile(lambda x, b: fastlm.gelu(fastlm.bias_gelu(x, b, "tanh")), fullgraph=True)
    eager = fastlm.gelu(fastlm.bias_gelu(x, bias, "tanh"))
    compiled = f(x, bias)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.sum(), (x, bias)), torch.autograd.grad(eager.sum(), (x, bias))
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fastlm.gelu(x, "sigmoid"), ValueError, "approximate is 'sigmoid', expected 'none' or 'tanh'"),
        (lambda x: fastlm.gelu(x.long()), TypeError, "x has dtype torch.int64"),
        (lambda x: fastlm.bias_gelu(x, torch.ones(3)), ValueError, r"bias has shape \(3,\), expected \(8,\)"),
        (lambda x: fastlm.bias_gelu(x, torch.ones(8).int()), TypeError, "bias has dtype torch.int32"),
        (lambda x: fastlm.bias_gelu(x, torch.ones(8, device="meta")), ValueError, "bias is on meta"),
        (lambda x: fastlm.bias_gelu(x, torch.ones(8), dropout_p=-0.1), ValueError, "dropout_p is -0.1"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 8))
