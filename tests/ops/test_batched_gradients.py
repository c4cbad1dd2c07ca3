"""Batches of gradients (is_grads_batched, vmap, jacrev) through ops and layers, against single ones and torch.nn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastlm
import fastlm.nn as ours
from fastlm.ops._tied_embedding import tied_embedding
from fastlm.ops.linear import layer_linear
from samples import CASES

torch.manual_seed(0)
B, T, C = 3, 5, 16
X = torch.randn(B, T, C)
ROWS, TARGET = torch.randn(7, C), torch.randint(0, 11, (7,))
TABLE = torch.randn(11, C)
OPS = [name for name, case in CASES.items() if case.keeps_inputs]


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def draw(outputs, size=4):
    """Gradients for the outputs, of the shapes alone."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, *out.shape, generator=generator).to(out.dtype) for out in outputs]


@pytest.mark.parametrize("name", OPS)
def test_a_batch_equals_one_at_a_time(name):
    named, others = CASES[name].leaves()
    inputs, outputs = list(named.values()), CASES[name].run(named, others)
    gradients = draw(outputs)
    # Kernels make each of these, one after the other.
    each = [torch.autograd.grad(outputs, inputs, [g[i] for g in gradients], retain_graph=True) for i in range(4)]
    batch = torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, is_grads_batched=True)
    mapped = torch.func.vmap(lambda *g: torch.autograd.grad(outputs, inputs, g, retain_graph=True))(*gradients)
    for i, single in enumerate(zip(*each, strict=True)):
        for several in (batch, mapped):
            assert not several[i].requires_grad
            torch.testing.assert_close(several[i], torch.stack(single), rtol=1e-4, atol=1e-5)


def test_a_batch_of_gradients_can_be_differentiated_again():
    x, w = leaves(X, X[0, 0])
    y = fastlm.rms_norm(x, C, w)
    (g,) = draw([y])
    batch = torch.autograd.grad(y, x, g, is_grads_batched=True, create_graph=True)[0]
    each = torch.stack([torch.autograd.grad(y, x, g[i], create_graph=True)[0] for i in range(4)])
    actual, expected = (torch.autograd.grad(t.square().sum(), (x, w), retain_graph=True) for t in (batch, each))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["linear", "embedding"])
def test_products_of_training_in_bfloat16(monkeypatch, which):
    monkeypatch.setattr("fastlm.ops._thresholds.SMALL_IN_TRAINING", 0)
    weight, x = leaves(TABLE, ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        if which == "linear":
            outputs = [layer_linear(x.bfloat16(), weight)]
        else:
            rows, table = tied_embedding(weight, TARGET)
            outputs = [rows, table]
    inputs = [weight, x] if which == "linear" else [weight]
    gradients = [g.to(out.dtype) for g, out in zip(draw(outputs), outputs, strict=True)]
    each = [torch.autograd.grad(outputs, inputs, [g[i] for g in gradients], retain_graph=True) for i in range(4)]
    batch = torch.autograd.grad(outputs, inputs, gradients, is_grads_batched=True)
    for i, single in enumerate(zip(*each, strict=True)):
        torch.testing.assert_close(batch[i].bfloat16(), torch.stack(single).bfloat16())


SIZES = {"d_model": C, "nhead": 4, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
LAYERS = {
    "Linear": ("Linear", (C, 8), {}, (X,)),
    "LayerNorm": ("LayerNorm", (C,), {}, (X,)),
    "RMSNorm": ("RMSNorm", (C,), {}, (X,)),
    "GELU": ("GELU", (), {}, (X,)),
    "MultiheadAttention": ("MultiheadAttention", (C, 4), {"batch_first": True}, (X, X, X)),
    "TransformerEncoderLayer": ("TransformerEncoderLayer", (), SIZES, (X,)),
    "TransformerEncoderLayer norm_first": ("TransformerEncoderLayer", (), SIZES | {"norm_first": True}, (X,)),
    "TransformerDecoderLayer": ("TransformerDecoderLayer", (), SIZES, (X, X[:, :4])),
    "CrossEntropyLoss": ("CrossEntropyLoss", (), {"label_smoothing": 0.1}, (ROWS, TARGET)),
    "LinearCrossEntropyLoss": ("LinearCrossEntropyLoss", (C, 11), {}, (ROWS, TARGET)),
}  # fmt: skip
LAYERS = {name: layer for name, layer in LAYERS.items() if hasattr(nn, layer[0])}  # LinearCrossEntropyLoss came in 2.13


def pair(name):
    """(torch.nn's, ours with the same parameters, arguments)."""
    cls, args, kwargs, inputs = LAYERS[name]
    theirs = getattr(nn, cls)(*args, **kwargs)
    mine = getattr(ours, cls)(*args, **kwargs)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine, inputs


def first(output):
    return output[0] if isinstance(output, tuple) else output


def assert_same(results, name):
    actual, expected = results
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")


# PyTorch itself has no batching rule for its attention, and says so.
quietly = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@quietly
@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_batched_gradients_as_torch_does(name):
    *modules, inputs = pair(name)

    def batch(module):
        args = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
        output = first(module(*args))
        wanted = [x for x in args if x.requires_grad] + list(module.parameters())
        return torch.autograd.grad(output, wanted, draw([output])[0], is_grads_batched=True)

    assert_same([batch(m) for m in reversed(modules)], name)


@quietly
@pytest.mark.parametrize("name", LAYERS)
def test_jacobians_of_layers_are_torchs(name):
    *modules, (x, *others) = pair(name)

    def jacobians(module):
        def function(x):
            return first(module(x, *others))

        return torch.func.jacrev(function)(x), torch.autograd.functional.jacobian(function, x, vectorize=True)

    assert_same([jacobians(m) for m in reversed(modules)], name)


@quietly
@pytest.mark.parametrize("name", [name for name in LAYERS if list(pair(name)[0].parameters())])
def test_gradients_of_each_sample_are_torchs(name):
    *modules, inputs = pair(name)

    def each(module):
        def loss(parameters, *sample):
            output = torch.func.functional_call(module, parameters, tuple(x.unsqueeze(0) for x in sample))
            return first(output).square().sum()

        parameters = {key: p.detach() for key, p in module.named_parameters()}
        gradients = torch.func.vmap(torch.func.grad(loss), (None,) + (0,) * len(inputs))(parameters, *inputs)
        return list(gradients.values())

    assert_same([each(m) for m in reversed(modules)], name)


@quietly
def test_an_accelerated_model_takes_batched_gradients():
    model = nn.Sequential(nn.Linear(C, C), nn.TransformerEncoderLayer(**SIZES), nn.LayerNorm(C), nn.Linear(C, 1))
    fast = copy.deepcopy(model)
    fastlm.accelerate(fast)

    def jacobian(module):
        return torch.autograd.functional.jacobian(lambda x: module(x).sum(1), X, vectorize=True)

    torch.testing.assert_close(jacobian(fast), jacobian(model), rtol=1e-4, atol=1e-5)
