"""fastlm.nn.LayerNorm against torch.nn.LayerNorm on the same state."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import fastlm.nn
from tolerances import assert_as_close_as_torch

OPTIONS = [
    {"normalized_shape": 13},
    {"normalized_shape": (7,), "eps": 1e-3},
    {"normalized_shape": (3, 11)},
    {"normalized_shape": [5, 1, 7], "bias": False},
    {"normalized_shape": 17, "elementwise_affine": False},
]


def shape_of(options):
    given = options["normalized_shape"]
    return (given,) if isinstance(given, int) else tuple(given)


def twins(options, dtype):
    """(ours, torch's, torch's in fp64) with one random state."""
    theirs = torch.nn.LayerNorm(**options, dtype=dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = fastlm.nn.LayerNorm(**options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs, copy.deepcopy(theirs).double()


def run(layer, x, dy):
    x = x.detach().to(dy.dtype, copy=True).requires_grad_()
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad} | {f"d{name}": p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_torchs(options, dtype, poisoned):
    ours, theirs, truth = twins(options, dtype)
    x = torch.randn(2, 19, *shape_of(options), dtype=dtype) * 3 + 1
    dy = torch.randn_like(x)
    results = [run(layer, x, grad) for layer, grad in ((ours, dy), (theirs, dy), (truth, dy.double()))]
    for name, result in results[0].items():
        assert result.dtype == dtype
        size = math.prod(shape_of(options)) + (38 if name in ("dweight", "dbias") else 0)
        assert_as_close_as_torch(result, results[2][name], results[1][name], size, name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_torchs_class_with_its_state_and_repr(options):
    ours, theirs = fastlm.nn.LayerNorm(**options), torch.nn.LayerNorm(**options)
    assert isinstance(ours, torch.nn.LayerNorm)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_empty_batch_and_strided_input():
    ours, theirs, _ = twins({"normalized_shape": 13}, torch.float32)
    assert ours(torch.zeros(0, 5, 13)).shape == (0, 5, 13)
    x = torch.randn(13, 5).t()
    torch.testing.assert_close(ours(x), theirs(x))


def test_gradcheck():
    ours, _, _ = twins({"normalized_shape": 5}, torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    parameters = dict(ours.named_parameters())

    def call(x, weight, bias):
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (x, parameters["weight"], parameters["bias"]))


def test_errors_name_the_argument():
    layer = fastlm.nn.LayerNorm(13)
    with pytest.raises(ValueError, match=r"x has shape \(5, 12\).*normalized_shape \(13,\)"):
        layer(torch.randn(5, 12))
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        layer(torch.zeros(5, 13, dtype=torch.int64))
