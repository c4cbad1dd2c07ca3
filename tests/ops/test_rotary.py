"""rotary: parity with the fp64 definition and with Hugging Face's, gradients, layouts, errors."""

import pytest
import torch

import fastlm
from conftest import DTYPES
from fastlm.ops.rotary import rotary_ref
from tolerances import assert_as_close_as_torch

# (B, H, L, D, R): whole and partial heads, odd lengths, tails of every vector width, empty.
SHAPES = [(2, 3, 5, 64, 32), (1, 2, 7, 20, 10), (2, 1, 3, 80, 16), (1, 1, 1, 2, 1), (0, 2, 3, 8, 4), (2, 4, 33, 18, 5)]


def _tables(L, R, B=None):
    angle = torch.arange(L)[:, None] / 100 ** (torch.arange(R) / R)
    angle = angle if B is None else angle + torch.arange(B)[:, None, None]
    return angle.cos(), angle.sin()


def _complex_rotation(x, cos, sin, interleaved):
    """The definition in complex numbers, in fp64."""
    R = cos.shape[-1]
    x, cos, sin = x.double(), cos.double(), sin.double()
    a, b = (x[..., 0 : 2 * R : 2], x[..., 1 : 2 * R : 2]) if interleaved else (x[..., :R], x[..., R : 2 * R])
    turned = torch.complex(a, b) * torch.complex(cos, sin).reshape(-1, 1, *cos.shape[-2:])
    pair = torch.stack((turned.real, turned.imag), -1) if interleaved else torch.cat((turned.real, turned.imag), -1)
    return torch.cat((pair.flatten(-2) if interleaved else pair, x[..., 2 * R :]), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(kernels, poisoned, shape, interleaved, dtype):
    B, H, L, D, R = shape
    for cos, sin in (_tables(L, R), _tables(L, R, B)):
        x = torch.randn(B, H, L, D).to(dtype).requires_grad_()
        g = torch.randn(B, H, L, D).to(dtype)
        y = fastlm.rotary(x, cos, sin, interleaved=interleaved)
        (dx,) = torch.autograd.grad(y, x, g)
        assert_as_close_as_torch(y, _complex_rotation(x, cos, sin, interleaved), None, 4)
        assert_as_close_as_torch(dx, _complex_rotation(g, cos, -sin, interleaved), None, 4)
        assert torch.equal(y[..., 2 * R :], x[..., 2 * R :])


def test_as_hugging_face(kernels):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    q, k = torch.randn(2, 4, 9, 32), torch.randn(2, 2, 9, 32)
    cos, sin = _tables(9, 16, 2)
    expected = llama.apply_rotary_pos_emb(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    torch.testing.assert_close((fastlm.rotary(q, cos, sin), fastlm.rotary(k, cos, sin)), expected)


def test_scores_depend_on_the_distance_alone(kernels):
    cos, sin = _tables(40, 8)
    q, k = (torch.randn(1, 1, 1, 16).expand(1, 1, 40, 16) for _ in range(2))
    scores = fastlm.rotary(q, cos, sin)[0, 0] @ fastlm.rotary(k, cos, sin)[0, 0].T
    for distance in (0, 3, 17):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-5, rtol=1e-5)


def test_strides(kernels, poisoned):
    """Queries as a slice of one projection, and elements that lie apart."""
    packed = torch.randn(2, 5, 3, 4, 16, requires_grad=True)
    cos, sin = _tables(5, 8)
    for x in (packed[:, :, 1].transpose(1, 2), packed.permute(0, 2, 1, 4, 3)[:, :, :, :, 0], packed[:, :, 1].mT):
        x = x if x.shape[2] == 5 else x.transpose(1, 2)
        half = x.shape[-1] // 2
        y = fastlm.rotary(x, cos[:, :half], sin[:, :half])
        expected = rotary_ref(x, cos[:, :half], sin[:, :half])
        torch.testing.assert_close(y, expected)
        g = torch.randn(1, 1, 1, 1).expand(y.shape)
        torch.testing.assert_close(torch.autograd.grad(y, packed, g)[0], torch.autograd.grad(expected, packed, g)[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend, interleaved):
    x = torch.randn(2, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.double() for t in _tables(3, 2))
    with fastlm.backend(backend):
        assert torch.autograd.gradcheck(lambda x: fastlm.rotary(x, cos, sin, interleaved=interleaved), (x,))
        assert torch.autograd.gradgradcheck(lambda x: fastlm.rotary(x, cos, sin, interleaved=interleaved), (x,))


def test_compile():
    x = torch.randn(2, 2, 5, 8, requires_grad=True)
    cos, sin = _tables(5, 4)
    compiled = torch.compile(fastlm.rotary, fullgraph=True)(x, cos, sin)
    torch.testing.assert_close(compiled, fastlm.rotary(x, cos, sin))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, c: fastlm.rotary(x[0], c, c), ValueError, r"x has shape \(2, 5, 8\), expected \(B, H, L, D\)"),
        (
            lambda x, c: fastlm.rotary(x, c[:3], c),
            ValueError,
            r"cos has shape \(3, 4\), expected \(5, R\) or",
        ),
        (lambda x, c: fastlm.rotary(x[..., :6], c, c), ValueError, r"with 2 R <= 6"),
        (lambda x, c: fastlm.rotary(x, c, c[:, :1]), ValueError, r"sin has shape \(5, 1\), expected \(5, 4\)"),
        (lambda x, c: fastlm.rotary(x.long(), c, c), TypeError, "x has dtype torch.int64"),
        (lambda x, c: fastlm.rotary(x, c.to("meta"), c), ValueError, "cos is on meta, x is on cpu"),
        (lambda x, c: fastlm.rotary(x, c.requires_grad_(), c), ValueError, "requires a gradient"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(1, 2, 5, 8), torch.ones(5, 4))
