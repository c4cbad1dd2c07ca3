"""fastlm.nn's losses against torch.nn's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastlm.nn
from tolerances import assert_as_close_as_torch

N, C, F = 13, 37, 11
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
KINDS = pytest.mark.parametrize("kind", ["indices", "probabilities"])


def targets(kind, shape, classes=C, dim=1):
    if kind == "indices":
        target = torch.randint(0, classes, shape)
        target.view(-1)[::5] = -100
        return target
    return torch.randn(*shape[:dim], classes, *shape[dim:]).softmax(dim)


def run(loss, inputs, target):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves, target)
    value.sum().backward()
    results = {"loss": value.detach()} | {f"d input {i}": x.grad for i, x in enumerate(leaves)}
    return results | {f"d {name}": p.grad for name, p in loss.named_parameters()}


def assert_parity(ours, theirs, input, target, size):
    exact = copy.deepcopy(theirs).double()
    wide = target.double() if target.is_floating_point() else target
    results = [run(loss, (x,), t) for loss, x, t in (
        (ours, input, target), (theirs, input, target), (exact, input.double(), wide))]  # fmt: skip
    assert results[0].keys() == results[1].keys()
    for name, result in results[0].items():
        assert result.dtype == results[1][name].dtype
        assert_as_close_as_torch(result, results[2][name], results[1][name], size, name)


@REDUCTIONS
@KINDS
@pytest.mark.parametrize("shape", [(N,), (N, 3), (N, 2, 5)], ids=str)
def test_cross_entropy_is_torchs(reduction, kind, shape):
    options = {"reduction": reduction, "label_smoothing": 0.1, "weight": torch.rand(C)}
    ours, theirs = fastlm.nn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    input = torch.randn(shape[0], C, *shape[1:])
    assert_parity(ours, theirs, input, targets(kind, shape), C + N)


@REDUCTIONS
@KINDS
@pytest.mark.parametrize("out_features", [(), (3,), (2, 5)], ids=str)
def test_linear_cross_entropy_is_torchs(reduction, kind, out_features):
    if not hasattr(nn, "LinearCrossEntropyLoss"):
        pytest.skip("this torch has no LinearCrossEntropyLoss")
    options = {"reduction": reduction, "label_smoothing": 0.1, "bias": True, "out_features": out_features}
    theirs = nn.LinearCrossEntropyLoss(F, C, weight=torch.rand(C), **options)
    ours = fastlm.nn.LinearCrossEntropyLoss(F, C, weight=theirs.weight, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert isinstance(ours, nn.LinearCrossEntropyLoss)
    assert repr(ours) == repr(theirs)
    assert_parity(ours, theirs, torch.randn(N, F), targets(kind, (N, *out_features)), C + N + F)


def test_linear_cross_entropy_is_the_two_steps():
    """Linear then CrossEntropyLoss on the same weights, on any torch."""
    loss = fastlm.nn.LinearCrossEntropyLoss(F, C, bias=True)
    input, target = torch.randn(N, F), targets("indices", (N,))
    expected = nn.CrossEntropyLoss()(nn.functional.linear(input, loss.linear.weight, loss.linear.bias), target)
    torch.testing.assert_close(loss(input, target), expected)
    torch.testing.assert_close(loss(input[1], target[1]), nn.CrossEntropyLoss()(loss.linear(input[1]), target[1]))


def test_errors_name_the_argument():
    with pytest.raises(RuntimeError, match="expected weight shape to be"):
        fastlm.nn.LinearCrossEntropyLoss(F, C, weight=torch.rand(C - 1))
    with pytest.raises(ValueError, match=r"target has shape \(12,\)"):
        fastlm.nn.CrossEntropyLoss()(torch.randn(N, C), torch.zeros(12, dtype=torch.long))


EDITS = {
    "in place": lambda x: x.mul_(-3),
    "a slice": lambda x: x[:, 3:].fill_(-1e4),
    "a view": lambda x: x.view(-1).sub_(7),
    "data": lambda x: x.data.mul_(-3),
    "without its graph": lambda x: x.detach().zero_(),
}


@pytest.mark.parametrize("edit", EDITS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_logits_may_be_edited_once_the_loss_is_there(edit, dtype, factor):
    x, weight, target = torch.randn(N, F), torch.randn(F, C), torch.randint(C, (N,))
    grads = []
    for loss in (fastlm.nn.CrossEntropyLoss(), nn.CrossEntropyLoss()):
        leaf = x.to(dtype).requires_grad_()
        logits = leaf @ weight.to(dtype)
        value = loss(logits, target) * factor
        EDITS[edit](logits)
        value.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=0.03 if dtype is torch.bfloat16 else 1e-5, atol=1e-3)
