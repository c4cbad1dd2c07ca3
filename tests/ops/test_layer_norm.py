"""layer_norm and add_layer_norm: parity with the fp64 reference, gradients of both orders, edges, errors."""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import DTYPES
from fastlm._core import dropout as _dropout
from fastlm.ops.layer_norm import row_means
from tolerances import assert_as_close_as_torch

# (leading shape, N): odd and prime tails, N below and above every vector width and unroll, an empty batch, more
# rows than row chunks, and a width of a real model.
SHAPES = [((3,), 7), ((2, 5), 64), ((13,), 133), ((0,), 48), ((301,), 37), ((4, 9), 768), ((2,), 4099)]
PARAMETERS = ["weight+bias", "weight", "bias", "none"]
CASES = [(*shape, PARAMETERS[i % 4]) for i, shape in enumerate(SHAPES)] + [((7,), 35, kind) for kind in PARAMETERS]


def _parameters(kind, N, dtype):
    weight = (torch.randn(N) + 1).to(dtype).requires_grad_() if "weight" in kind else None
    bias = torch.randn(N).to(dtype).requires_grad_() if "bias" in kind else None
    return weight, bias


def _double(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def _compare(outputs, inputs, reference, stock, grads, size):
    """Outputs and gradients of every input against fp64 and PyTorch's own."""
    doubled = _double(*inputs)
    truth = reference(*doubled)
    stock_inputs = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    theirs = stock(*stock_inputs)
    for i, (a, t, s) in enumerate(zip(outputs, truth, theirs, strict=True)):
        assert_as_close_as_torch(a, t, s, size, f"output {i}")
    given = [t for t in inputs if t is not None]
    actual = torch.autograd.grad(outputs, given, grads)
    expected = torch.autograd.grad(truth, [t for t in doubled if t is not None], [g.double() for g in grads])
    by_torch = torch.autograd.grad(theirs, [t for t in stock_inputs if t is not None], grads)
    for g, e, s, x in zip(actual, expected, by_torch, given, strict=True):
        assert g.dtype == x.dtype
        assert_as_close_as_torch(g, e, s, max(size, given[0].numel() // size), f"gradient of shape {tuple(x.shape)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lead", "N", "kind"), CASES, ids=str)
def test_parity(kernels, poisoned, lead, N, kind, dtype):
    x = (torch.randn(*lead, N) * 2 + 3).to(dtype).requires_grad_()
    weight, bias = _parameters(kind, N, dtype)
    y = fastlm.layer_norm(x, N, weight, bias)

    def stock(x, w, b):
        return (F.layer_norm(x, (N,), w, b),)

    _compare((y,), (x, weight, bias), stock, stock, (torch.randn(*lead, N).to(dtype),), N)


def test_width_of_one(kernels, poisoned):
    """Every value is its own mean: the result is the bias, and what reaches x is rounding times rstd."""
    x, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((5, 1), (1,), (1,)))
    y = fastlm.layer_norm(x, 1, weight, bias)
    assert torch.equal(y, bias.expand(5, 1))
    (dx,) = torch.autograd.grad(y.sum(), x)
    rounding = torch.finfo(torch.float32).eps * float(weight.detach().abs()) / 1e-5**0.5
    assert dx.abs().max() <= rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(("lead", "N"), SHAPES, ids=str)
def test_add_layer_norm_parity(kernels, poisoned, lead, N, dropout_p, dtype):
    x, residual = (torch.randn(*lead, N).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = _parameters("weight+bias", N, dtype)
    torch.manual_seed(11)
    outputs = fastlm.add_layer_norm(x, residual, weight, bias, dropout_p=dropout_p)
    torch.manual_seed(11)
    seed = _dropout.draw_seed()

    def plain(x, r, w, b):
        keep = _dropout.factors(x.numel() // N, N, dropout_p, seed, x.dtype, x.device).reshape(x.shape)
        z = r + x * keep if dropout_p else r + x
        return F.layer_norm(z, (N,), w, b), z

    def rounded(x, r, w, b):  # the stream is stored in its own dtype before it is normalized
        _, z = plain(x, r, w, b)
        z_stored = z + (z.detach().to(dtype).double() - z.detach())
        return F.layer_norm(z_stored, (N,), w, b), z_stored

    grads = tuple(torch.randn(*lead, N).to(dtype) for _ in range(2))
    _compare(outputs, (x, residual, weight, bias), rounded, plain, grads, N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_residual_stream(kernels, poisoned, dtype):
    """A 16-bit sublayer output over an fp32 stream: nothing is rounded to 16 bits but x itself and its gradient."""
    x = torch.randn(6, 53).to(dtype).requires_grad_()
    residual, weight, bias = (torch.randn(*s).requires_grad_() for s in ((6, 53), (53,), (53,)))
    y, z = fastlm.add_layer_norm(x, residual, weight, bias)
    assert y.dtype == z.dtype == torch.float32
    X, R, W, B = _double(x, residual, weight, bias)
    Z = R + X
    Y = F.layer_norm(Z, (53,), W, B)
    assert_as_close_as_torch(y, Y, None, 53)
    g = torch.randn(6, 53)
    actual = torch.autograd.grad((y, z), (x, residual, weight, bias), (g, g))
    expected = torch.autograd.grad((Y, Z), (X, R, W, B), (g.double(), g.double()))
    for a, e in zip(actual, expected, strict=True):
        assert_as_close_as_torch(a, e, None, 53)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_dtype(x_dtype, out_dtype, backend):
    """The norm's result in another dtype than the stream: one rounding, at the store."""
    x = torch.randn(6, 53).to(x_dtype).requires_grad_()
    residual, weight, bias = (torch.randn(*s).requires_grad_() for s in ((6, 53), (53,), (53,)))
    g = torch.randn(6, 53).to(out_dtype)
    with fastlm.backend(backend):
        y, z = fastlm.add_layer_norm(x, residual, weight, bias, out_dtype=out_dtype)
        alone = fastlm.layer_norm(z.detach(), 53, weight, bias, out_dtype=out_dtype)
        actual = torch.autograd.grad((y, z), (x, residual, weight, bias), (g, g.float()))
    assert (y.dtype, z.dtype, alone.dtype) == (out_dtype, torch.float32, out_dtype)
    X, R, W, B = _double(x, residual, weight, bias)
    Z = R + X
    Y = F.layer_norm(Z, (53,), W, B)
    for result in (y, alone):  # computed in fp32, whatever it is stored in
        assert_as_close_as_torch(result.float() if out_dtype == torch.float64 else result, Y, None, 53)
    expected = torch.autograd.grad((Y, Z), (X, R, W, B), (g.double(), g.double()))
    for a, e in zip(actual, expected, strict=True):
        assert_as_close_as_torch(a, e, None, 53)


def test_parameters_of_another_dtype(kernels):
    x = torch.randn(5, 31).bfloat16().requires_grad_()
    weight, bias = torch.randn(31, requires_grad=True), torch.randn(31).half().requires_grad_()
    y = fastlm.layer_norm(x, 31, weight, bias)
    truth = F.layer_norm(x.double(), (31,), weight.double(), bias.double())
    assert_as_close_as_torch(y, truth, None, 31)
    dx, dw, db = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert (dx.dtype, dw.dtype, db.dtype) == (torch.bfloat16, torch.float32, torch.float16)


def test_several_normalized_dimensions_and_views(kernels, poisoned):
    base = torch.randn(7, 5, 6, requires_grad=True)
    x = base.transpose(0, 1)
    weight = torch.randn(6, 7).T.requires_grad_()
    y = fastlm.layer_norm(x, (7, 6), weight)
    expected = F.layer_norm(x, (7, 6), weight)
    torch.testing.assert_close(y, expected)
    g = torch.randn(5, 6, 7).transpose(1, 2)
    for a, e in zip(
        torch.autograd.grad(y, (base, weight), g), torch.autograd.grad(expected, (base, weight), g), strict=True
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_large_mean(kernels, offset):
    """A one-pass variance would lose everything here."""
    x = torch.randn(4, 257) * 0.5 + offset
    truth = F.layer_norm(x.double(), (257,))
    assert_as_close_as_torch(fastlm.layer_norm(x, 257), truth, F.layer_norm(x, (257,)), 257)


def test_extreme_values(kernels):
    x = torch.randn(3, 100)
    for scale in (1e-20, 1e17):
        truth = F.layer_norm((x * scale).double(), (100,))
        assert_as_close_as_torch(fastlm.layer_norm(x * scale, 100), truth, None, 100)


CONSTANTS = (1000.3, -3.3, 1e-3, 1e-30)


def _of_equal_numbers(M, N, dtype):
    return torch.tensor(CONSTANTS).repeat(-(-M // len(CONSTANTS)))[:M, None].expand(M, N).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (4, 3), (9, 37), (5, 768), (4, 4096), (4, 4099), (1, 70000)])
def test_a_row_of_equal_numbers_gives_the_bias(kernels, M, N, dtype):
    """The mean of equal numbers is that number: nothing of them reaches the output or the weight's gradient."""
    x = _of_equal_numbers(M, N, dtype).requires_grad_()
    weight, bias = (torch.randn(N).to(dtype).requires_grad_() for _ in range(2))
    for y in (
        fastlm.layer_norm(x, N, weight, bias),
        fastlm.add_layer_norm(x, torch.zeros_like(x), weight, bias)[0],
        fastlm.add_layer_norm(torch.zeros_like(x), x, weight, bias, dropout_p=0.5)[0],
    ):
        assert torch.equal(y, bias.expand(M, N))
        dw, db = torch.autograd.grad(y, (weight, bias), torch.ones_like(y))
        assert not dw.any()
        assert torch.equal(db, torch.full_like(db, M))
    with torch.no_grad():
        assert not fastlm.layer_norm(x, N).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_of_equal_numbers_gives_the_bias(dtype):
    x = _of_equal_numbers(4, 4099, dtype).requires_grad_()
    weight, bias = (torch.randn(4099).to(dtype).requires_grad_() for _ in range(2))
    with fastlm.backend("reference"):
        y = fastlm.layer_norm(x, 4099, weight, bias)
    assert torch.equal(y, bias.expand(4, -1))
    wide = x.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(row_means(wide), wide[:, :1])
    assert not torch.autograd.grad(y, weight, torch.ones_like(y))[0].any()


@pytest.mark.parametrize("deviation", [2.0**-8, 2.0**-12, 2.0**-16])
def test_small_deviations_from_a_large_mean(kernels, deviation):
    """Where a mean of many deviations has rounding of their size: the error stays PyTorch's."""
    x = 1000 + torch.randn(5, 1023) * 1000 * deviation
    truth = F.layer_norm(x.double(), (1023,), eps=1e-12)
    y = fastlm.layer_norm(x, 1023, eps=1e-12)
    assert_as_close_as_torch(y, truth, F.layer_norm(x, (1023,), eps=1e-12), 1023)


def test_nan_stays_in_its_row(kernels):
    x = torch.randn(9, 40)
    clean = fastlm.layer_norm(x, 40)
    x[4, 17] = torch.nan
    y = fastlm.layer_norm(x, 40)
    assert y[4].isnan().all()
    keep = [i for i in range(9) if i != 4]
    assert torch.equal(y[keep], clean[keep])


def test_same_bits_for_any_thread_count_and_batch(isa, threads):
    x, weight, bias = torch.randn(517, 193), torch.randn(193), torch.randn(193)
    g = torch.randn(517, 193)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        args = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = fastlm.layer_norm(args[0], 193, *args[1:])
        results.append((y, *torch.autograd.grad(y, args, g)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(fastlm.layer_norm(x[100:101], 193, weight, bias), results[0][0][100:101])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (7,), (7,)))
    with fastlm.backend(backend):
        assert torch.autograd.gradcheck(lambda *a: fastlm.layer_norm(a[0], 7, *a[1:]), (x, weight, bias))
        assert torch.autograd.gradgradcheck(lambda *a: fastlm.layer_norm(a[0], 7, *a[1:]), (x, weight, bias))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_add_layer_norm_gradcheck(dropout_p):
    args = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (3, 7), (7,), (7,))]

    def run(*args):
        torch.manual_seed(3)
        return fastlm.add_layer_norm(*args, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(run, args)
    assert torch.autograd.gradgradcheck(run, args)


def test_only_the_wanted_gradients():
    x, weight = torch.randn(4, 6), torch.randn(6, requires_grad=True)
    fastlm.layer_norm(x, 6, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    y, z = fastlm.add_layer_norm(a, b)
    y.sum().backward(retain_graph=True)
    z.sum().backward()
    torch.testing.assert_close(a.grad, torch.ones(4, 6), atol=1e-5, rtol=0)


def test_compile():
    x, residual = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
    weight = torch.randn(10, requires_grad=True)

    @torch.compile(fullgraph=True)
    def f(x, residual, weight):
        y, z = fastlm.add_layer_norm(x, residual, weight)
        return fastlm.layer_norm(y + z, 10)

    eager = fastlm.layer_norm(sum(fastlm.add_layer_norm(x, residual, weight)), 10)
    compiled = f(x, residual, weight)
    torch.testing.assert_close(compiled, eager)
    for a, e in zip(
        torch.autograd.grad(compiled.square().sum(), (x, weight)),
        torch.autograd.grad(eager.square().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-4)


def test_func_transforms():
    x, weight = torch.randn(4, 6), torch.randn(6)
    got = torch.func.vmap(torch.func.grad(lambda x: fastlm.layer_norm(x, 6, weight).square().sum()))(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(fastlm.layer_norm(x, 6, weight).square().sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fastlm.layer_norm(x, 768, torch.ones(5)), ValueError, r"weight has shape \(5,\), expected \(768,\)"),
        (lambda x: fastlm.layer_norm(x, 768, None, torch.ones(3)), ValueError, r"bias has shape \(3,\)"),
        (lambda x: fastlm.layer_norm(x, 5), ValueError, r"x has shape \(2, 768\).*normalized_shape \(5,\)"),
        (lambda x: fastlm.layer_norm(x, ()), ValueError, "normalized_shape"),
        (lambda x: fastlm.layer_norm(x.int(), 768), TypeError, "x has dtype torch.int32"),
        (lambda x: fastlm.layer_norm(x, 768, torch.ones(768).int()), TypeError, "weight has dtype torch.int32"),
        (lambda x: fastlm.layer_norm(x, 768, torch.ones(768, device="meta")), ValueError, "weight is on meta"),
        (lambda x: fastlm.add_layer_norm(x, x[:1]), ValueError, r"residual has shape \(1, 768\)"),
        (lambda x: fastlm.add_layer_norm(x, x.int()), TypeError, "residual has dtype torch.int32"),
        (lambda x: fastlm.add_layer_norm(x, x * 1j), TypeError, "residual has dtype torch.complex64"),
        (lambda x: fastlm.add_layer_norm(x, x, dropout_p=1.5), ValueError, "dropout_p is 1.5"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 768))


def test_the_short_way_of_the_sum_gives_the_bits_of_the_general_one():
    x, residual, weight, bias = (torch.randn(shape) for shape in ((3, 40), (3, 40), (40,), (40,)))
    general = fastlm.add_layer_norm(x, residual, weight, bias)
    with torch.no_grad():
        short = fastlm.add_layer_norm(x, residual, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(general, short, strict=True))
    with torch.no_grad(), pytest.raises(ValueError, match="residual has shape"):
        fastlm.add_layer_norm(x, residual[:2], weight, bias)
