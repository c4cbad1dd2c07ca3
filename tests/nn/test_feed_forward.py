"""fastlm.nn's feed-forward layers against their definitions in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm.nn
from tolerances import assert_as_close_as_torch

E, M = 22, 37
ACTIVATIONS = {"gelu": F.gelu, "tanh": fastlm.nn.GELU("tanh"), "nn": nn.GELU(), "relu": F.relu, "silu": nn.SiLU()}


def plain(layer, x):
    if isinstance(layer, fastlm.nn.SwiGLU):
        return layer.down_proj(F.silu(layer.gate_proj(x)) * layer.up_proj(x))
    activation = layer.activation
    if isinstance(activation, nn.GELU):
        activation = lambda x: F.gelu(x, approximate=layer.activation.approximate)  # noqa: E731
    return layer.linear2(activation(layer.linear1(x)))


def layers():
    built = {name: fastlm.nn.FeedForward(E, M, 0.0, activation) for name, activation in ACTIVATIONS.items()}
    built["without bias"] = fastlm.nn.FeedForward(E, M, 0.0, bias=False)
    return built | {"swiglu": fastlm.nn.SwiGLU(E, M), "swiglu bias": fastlm.nn.SwiGLU(E, M, bias=True)}


def run(call, layer, x, dy):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = call(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("name", layers())
def test_outputs_and_gradients(name):
    layer = layers()[name]
    exact = copy.deepcopy(layer).double()
    x, dy = torch.randn(2, 3, 5, E)
    actual = run(layer, layer, x, dy)
    by_torch = run(lambda x: plain(layer, x), layer, x, dy)
    truth = run(lambda x: plain(exact, x), exact, x.double(), dy.double())
    for key, result in actual.items():
        assert_as_close_as_torch(result, truth[key], by_torch[key], E + 2 * M, key)


def test_dropout_of_everything_leaves_the_last_bias():
    layer = fastlm.nn.FeedForward(E, M, dropout=1.0)
    x = torch.randn(5, E)
    torch.testing.assert_close(layer(x), layer.linear2.bias.expand(5, E))
    assert not torch.equal(layer.eval()(x), layer.linear2.bias.expand(5, E))


def test_llamas_parameter_names():
    assert list(fastlm.nn.SwiGLU(E, M).state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
