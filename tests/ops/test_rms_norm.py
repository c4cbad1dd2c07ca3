"""rms_norm and add_rms_norm: parity with the fp64 reference, gradients of both orders, edges, errors."""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import DTYPES
from tolerances import assert_as_close_as_torch

# Odd and prime tails, N below and above every vector width and unroll, an empty batch, more rows than row chunks.
SHAPES = [((3,), 7), ((2, 5), 64), ((13,), 133), ((0,), 48), ((301,), 37), ((4, 9), 768), ((2,), 4099)]
EPS = 1e-5


def _double(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def _compare(outputs, inputs, reference, stock, grads, size):
    """Outputs and gradients of every input against fp64 and PyTorch's own."""
    doubled, copies = _double(*inputs), [t.detach().clone().requires_grad_() for t in inputs]
    truth, theirs = reference(*doubled), stock(*copies)
    for i, (a, t, s) in enumerate(zip(outputs, truth, theirs, strict=True)):
        assert_as_close_as_torch(a, t, s, size, f"output {i}")
    actual = torch.autograd.grad(outputs, inputs, grads)
    expected = torch.autograd.grad(truth, doubled, [g.double() for g in grads])
    by_torch = torch.autograd.grad(theirs, copies, grads)
    for g, e, s, x in zip(actual, expected, by_torch, inputs, strict=True):
        assert g.dtype == x.dtype
        assert_as_close_as_torch(g, e, s, max(size, inputs[0].numel() // size), f"gradient of shape {tuple(x.shape)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("lead", "N"), SHAPES, ids=str)
def test_parity(kernels, poisoned, lead, N, weighted, dtype):
    x = (torch.randn(*lead, N) * 2 + 1).to(dtype).requires_grad_()
    inputs = (x, (torch.randn(N) + 1).to(dtype).requires_grad_()) if weighted else (x,)

    def stock(*args):
        return (F.rms_norm(args[0], (N,), *args[1:], eps=EPS),)

    y = fastlm.rms_norm(x, N, *inputs[1:], eps=EPS)
    _compare((y,), inputs, stock, stock, (torch.randn(*lead, N).to(dtype),), N)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lead", "N"), SHAPES, ids=str)
def test_add_rms_norm_parity(kernels, poisoned, lead, N, dtype):
    x, residual = (torch.randn(*lead, N).to(dtype).requires_grad_() for _ in range(2))
    weight = (torch.randn(N) + 1).to(dtype).requires_grad_()
    outputs = fastlm.add_rms_norm(x, residual, weight, EPS)

    def stock(x, r, w):
        z = r + x
        return F.rms_norm(z, (N,), w, eps=EPS), z

    def rounded(x, r, w):  # the stream is stored in its own dtype before it is normalized
        z = r + x
        z = z + (z.detach().to(dtype).double() - z.detach())
        return F.rms_norm(z, (N,), w, eps=EPS), z

    _compare(outputs, (x, residual, weight), rounded, stock, tuple(torch.randn(2, *lead, N).to(dtype)), N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_residual_stream(kernels, poisoned, dtype):
    """A 16-bit sublayer output over an fp32 stream: nothing is rounded to 16 bits but x itself and its gradient."""
    x = torch.randn(6, 53).to(dtype).requires_grad_()
    residual, weight = (torch.randn(*s).requires_grad_() for s in ((6, 53), (53,)))
    y, z = fastlm.add_rms_norm(x, residual, weight, EPS)
    assert y.dtype == z.dtype == torch.float32
    X, R, W = _double(x, residual, weight)
    Z = R + X
    Y = F.rms_norm(Z, (53,), W, eps=EPS)
    assert_as_close_as_torch(y, Y, None, 53)
    g = torch.randn(6, 53)
    actual = torch.autograd.grad((y, z), (x, residual, weight), (g, g))
    expected = torch.autograd.grad((Y, Z), (X, R, W), (g.double(), g.double()))
    for a, e in zip(actual, expected, strict=True):
        assert_as_close_as_torch(a, e, None, 53)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-2, 2.0**-12])
def test_default_eps_is_torchs(kernels, scale, dtype):
    """Numbers whose square is of the size of an epsilon: float32's or the 16-bit dtype's own."""
    x = (torch.randn(4, 12) * scale).to(dtype).requires_grad_()
    weight = (torch.randn(12) + 1).to(dtype).requires_grad_()
    g = torch.randn(4, 12).to(dtype)
    expected = F.rms_norm(x, (12,), weight)
    gradients = torch.autograd.grad(expected, (x, weight), g)
    y, (added, z) = fastlm.rms_norm(x, 12, weight), fastlm.add_rms_norm(x, torch.zeros_like(x), weight)
    for ours in (y, added):
        torch.testing.assert_close(ours, expected)
        for a, e in zip(torch.autograd.grad(ours, (x, weight), g), gradients, strict=True):
            unit = torch.finfo(dtype).eps * float(e.abs().max())
            torch.testing.assert_close(a, e, rtol=0, atol=4 * unit)  # another epsilon changes half of the digits
    assert torch.equal(z, x)
    with torch.no_grad():
        torch.testing.assert_close(fastlm.rms_norm(x, 12, weight), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_eps_is_the_same_under_compile_and_on_every_backend(dtype):
    x = torch.full((3, 12), 1e-2, dtype=dtype)
    expected = F.rms_norm(x, (12,))
    compiled = torch.compile(lambda x: (fastlm.rms_norm(x, 12), *fastlm.add_rms_norm(x, torch.zeros_like(x))))(x)
    torch.testing.assert_close(compiled, (expected, expected, x))
    for backend in ("torch", "reference"):
        with fastlm.backend(backend):
            torch.testing.assert_close(fastlm.rms_norm(x, 12), expected)
    with fastlm.backend("reference"):
        torch.testing.assert_close(fastlm.add_rms_norm(x, torch.zeros_like(x)), (expected, x))


def test_several_normalized_dimensions_and_views(kernels, poisoned):
    base = torch.randn(7, 5, 6, requires_grad=True)
    x = base.transpose(0, 1)
    weight = torch.randn(6, 7).T.requires_grad_()
    y, expected = fastlm.rms_norm(x, (7, 6), weight), F.rms_norm(x, (7, 6), weight)
    torch.testing.assert_close(y, expected)
    g = torch.randn(5, 6, 7).transpose(1, 2)
    actual = torch.autograd.grad(y, (base, weight), g)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, (base, weight), g))


def test_nan_stays_in_its_row(kernels):
    x = torch.randn(9, 40)
    clean = fastlm.rms_norm(x, 40)
    x[4, 17] = torch.nan
    y = fastlm.rms_norm(x, 40)
    assert y[4].isnan().all()
    keep = [i for i in range(9) if i != 4]
    assert torch.equal(y[keep], clean[keep])


def test_same_bits_for_any_thread_count_and_batch(isa, threads):
    x, weight, g = torch.randn(517, 193), torch.randn(193), torch.randn(517, 193)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        args = [t.clone().requires_grad_() for t in (x, weight)]
        y = fastlm.rms_norm(args[0], 193, args[1])
        results.append((y, *torch.autograd.grad(y, args, g)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(fastlm.rms_norm(x[100:101], 193, weight), results[0][0][100:101])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    x, residual, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (3, 7), (7,)))
    with fastlm.backend(backend):
        assert torch.autograd.gradcheck(lambda x, w: fastlm.rms_norm(x, 7, w), (x, weight))
        assert torch.autograd.gradgradcheck(lambda x, w: fastlm.rms_norm(x, 7, w), (x, weight))
        assert torch.autograd.gradcheck(fastlm.add_rms_norm, (x, residual, weight))
        assert torch.autograd.gradgradcheck(fastlm.add_rms_norm, (x, residual, weight))


def test_compile():
    x, residual = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
    weight = torch.randn(10, requires_grad=True)

    def f(x, residual, weight):
        y, z = fastlm.add_rms_norm(x, residual, weight)
        return fastlm.rms_norm(y + z, 10)

    compiled, eager = torch.compile(f, fullgraph=True)(x, residual, weight), f(x, residual, weight)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.sum(), (x, weight)), torch.autograd.grad(eager.sum(), (x, weight))
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fastlm.rms_norm(x, 7), ValueError, r"x has shape \(2, 8\), expected it to end in .*\(7,\)"),
        (lambda x: fastlm.rms_norm(x, 8, torch.ones(5)), ValueError, r"weight has shape \(5,\), expected \(8,\)"),
        (lambda x: fastlm.rms_norm(x, 8, torch.ones(8).int()), TypeError, "weight has dtype torch.int32"),
        (lambda x: fastlm.rms_norm(x, 8, torch.ones(8, device="meta")), ValueError, "weight is on meta, x is on cpu"),
        (lambda x: fastlm.rms_norm(x.long(), 8), TypeError, "x has dtype torch.int64"),
        (lambda x: fastlm.add_rms_norm(x, x[:1]), ValueError, r"residual has shape \(1, 8\), expected \(2, 8\)"),
        (lambda x: fastlm.add_rms_norm(x, x.int()), TypeError, "residual has dtype torch.int32"),
        (lambda x: fastlm.add_rms_norm(x, x * 1j), TypeError, "residual has dtype torch.complex64"),
        (lambda x: fastlm.add_rms_norm(x, x.to("meta")), ValueError, "residual is on meta"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 8))
