"""swiglu: parity with the fp64 reference, gradients of both orders, halves of one projection, errors."""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import DTYPES
from tolerances import assert_as_close_as_torch

# Scalars, tails of every vector width, empty, and a width of a real model.
SHAPES = [(), (7,), (3, 37), (0, 16), (5, 0), (2, 3, 65), (2, 4096), (301, 19)]
ROUNDINGS = 16  # operations in a row behind one element, each of which rounds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(kernels, poisoned, shape, dtype):
    inputs = [(torch.randn(shape) * 3).to(dtype).requires_grad_() for _ in range(2)]
    g = torch.randn(shape).to(dtype)
    doubled = [t.detach().double().requires_grad_() for t in inputs]
    y, stock = fastlm.swiglu(*inputs), F.silu(inputs[0]) * inputs[1]
    truth = F.silu(doubled[0]) * doubled[1]
    assert_as_close_as_torch(y, truth, stock, ROUNDINGS)
    gradients = (
        torch.autograd.grad(y, inputs, g),
        torch.autograd.grad(truth, doubled, g.double()),
        torch.autograd.grad(stock, inputs, g),
    )
    for a, e, s in zip(*gradients, strict=True):
        assert_as_close_as_torch(a, e, s, ROUNDINGS)


def test_halves_of_one_projection_and_other_views(kernels, poisoned):
    packed = torch.randn(3, 5, 2 * 33, requires_grad=True)
    halves, columns = packed.chunk(2, -1), (packed[..., 0::2], packed[..., 1::2])
    g = torch.randn(1, 1, 1).expand(3, 5, 33)  # strides of zero
    for gate, up in (halves, columns, (halves[0].transpose(0, 1), halves[1].transpose(0, 1))):
        y, expected = fastlm.swiglu(gate, up), F.silu(gate) * up
        torch.testing.assert_close(y, expected)
        grad = g.expand(y.shape) if y.shape == g.shape else g.transpose(0, 1)
        torch.testing.assert_close(
            torch.autograd.grad(y, packed, grad)[0], torch.autograd.grad(expected, packed, grad, retain_graph=True)[0]
        )


def test_large_magnitudes(kernels):
    gate = torch.tensor([-3e38, -1e4, -90.0, 90.0, 1e4, 3e38], requires_grad=True)
    y = fastlm.swiglu(gate, torch.ones(6))
    torch.testing.assert_close(y, F.silu(gate))
    (dgate,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(dgate, (gate > 0).float(), rtol=0, atol=1e-30)


def test_nan_stays_where_it_is(kernels):
    gate, up = torch.randn(50), torch.randn(50)
    gate[13], up[20] = torch.nan, torch.nan
    assert fastlm.swiglu(gate, up).isnan().nonzero().flatten().tolist() == [13, 20]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with fastlm.backend(backend):
        assert torch.autograd.gradcheck(fastlm.swiglu, (gate, up))
        assert torch.autograd.gradgradcheck(fastlm.swiglu, (gate, up))


def test_compile():
    gate, up = (torch.randn(6, 10, requires_grad=True) for _ in range(2))
    compiled, eager = torch.compile(fastlm.swiglu, fullgraph=True)(gate, up), fastlm.swiglu(gate, up)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.sum(), (gate, up)), torch.autograd.grad(eager.sum(), (gate, up))
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fastlm.swiglu(x, x[:1]), ValueError, r"up has shape \(1, 8\), expected \(2, 8\)"),
        (lambda x: fastlm.swiglu(x, x.double()), TypeError, "up has dtype torch.float64, expected torch.float32"),
        (lambda x: fastlm.swiglu(x.long(), x.long()), TypeError, "gate has dtype torch.int64"),
        (lambda x: fastlm.swiglu(x, x.to("meta")), ValueError, "up is on meta, gate is on cpu"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 8))
