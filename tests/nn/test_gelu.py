"""fastlm.nn.GELU against torch.nn.GELU."""

from __future__ import annotations

import pytest
import torch

import fastlm.nn
from tolerances import assert_as_close_as_torch

FORMS = ["none", "tanh"]
ROUNDINGS = 16  # operations in a row behind one element, each of which rounds


def run(layer, x, dy):
    x = x.detach().to(dy.dtype, copy=True).requires_grad_()
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad}


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_torchs(approximate, dtype, poisoned):
    ours, theirs = fastlm.nn.GELU(approximate), torch.nn.GELU(approximate)
    x = (torch.randn(3, 7, 31) * 3).to(dtype)
    dy = torch.randn_like(x)
    actual, by_torch, truth = run(ours, x, dy), run(theirs, x, dy), run(theirs, x, dy.double())
    for name, result in actual.items():
        assert result.dtype == dtype
        assert_as_close_as_torch(result, truth[name], by_torch[name], ROUNDINGS, name)


@pytest.mark.parametrize("approximate", FORMS)
def test_is_torchs_class_with_its_repr(approximate):
    ours = fastlm.nn.GELU(approximate=approximate)
    assert isinstance(ours, torch.nn.GELU)
    assert repr(ours) == repr(torch.nn.GELU(approximate))
    assert fastlm.nn.GELU().approximate == "none"


@pytest.mark.parametrize("approximate", FORMS)
def test_gradcheck(approximate):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fastlm.nn.GELU(approximate), x)


def test_empty_and_scalar_input():
    assert fastlm.nn.GELU()(torch.zeros(0, 7)).shape == (0, 7)
    torch.testing.assert_close(fastlm.nn.GELU()(torch.tensor(0.5)), torch.nn.GELU()(torch.tensor(0.5)))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"approximate is 'sigmoid', expected 'none' or 'tanh'"):
        fastlm.nn.GELU("sigmoid")(torch.randn(3))
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        fastlm.nn.GELU()(torch.zeros(3, dtype=torch.int64))
