"""fastlm.nn.Linear against torch.nn.Linear on the same state, for each of the products it chooses between."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune

import fastlm.nn
from fastlm.ops._thresholds import LONE_COLUMNS, LONE_ROWS, MANY_CLASSES, MANY_ROWS, SMALL_IN_TRAINING
from tolerances import assert_as_close_as_torch

K, N = 70, 45
ROWS = [1, 3, 4, 5, 8, 9, MANY_ROWS - 1, MANY_ROWS, LONE_ROWS[0], LONE_ROWS[-1]]


def twins(bias, dtype, columns=N):
    """(ours, torch's, torch's in fp64) with one random state."""
    theirs = torch.nn.Linear(K, columns, bias, dtype=dtype)
    ours = fastlm.nn.Linear(K, columns, bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs, copy.deepcopy(theirs).double()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [N, LONE_COLUMNS[-1] + 1])
def test_inference_is_torchs(rows, bias, dtype, columns, poisoned):
    ours, theirs, truth = twins(bias, dtype, columns)
    x = torch.randn(1, rows, K, dtype=dtype)
    with torch.no_grad():
        actual, by_torch, exact = ours(x), theirs(x), truth(x.double())
    assert (actual.dtype, actual.shape, actual.stride()) == (dtype, by_torch.shape, by_torch.stride())
    assert_as_close_as_torch(actual, exact, by_torch, K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_and_flat_inputs(dtype):
    ours, theirs, truth = twins(True, dtype)
    wide = torch.randn(2 * MANY_ROWS, 2 * K, dtype=dtype)
    inputs = [wide[::2, ::2], wide[:MANY_ROWS, K:], wide[: 2 * MANY_ROWS, :K].view(2, -1, K).transpose(0, 1)]
    inputs += [wide[0, :K], wide[:0, :K], wide[:3, :K].expand(5, 3, K)]
    with torch.no_grad():
        for x in inputs:
            actual, by_torch, exact = ours(x), theirs(x), truth(x.double())
            assert actual.shape == by_torch.shape
            assert_as_close_as_torch(actual, exact, by_torch, K)


@pytest.mark.parametrize("rows", [4, LONE_ROWS[0]])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("small", [True, False])
def test_training_under_autocast_is_torchs(rows, bias, small, monkeypatch):
    if not small:
        monkeypatch.setattr("fastlm.ops._thresholds.SMALL_IN_TRAINING", 0)
    ours, theirs, truth = twins(bias, torch.float32)
    x, dy = torch.randn(2, rows, K), torch.randn(2, rows, N)
    results = []
    for layer in (ours, theirs, truth):
        dtype = layer.weight.dtype
        leaf = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = layer(leaf)
        y.backward(dy.to(y.dtype))
        results.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    for actual, by_torch, exact in zip(*results, strict=True):
        assert actual.dtype == by_torch.dtype
        assert_as_close_as_torch(actual, exact, by_torch, 2 * rows + K)


def test_what_does_not_fit_gets_torchs_error():
    layer = fastlm.nn.Linear(K, N).bfloat16()
    for x in (torch.randn(5, K), torch.randn(5, K - 1).bfloat16()):
        with torch.no_grad(), pytest.raises(RuntimeError, match="mat1 and mat2"):
            layer(x)


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_a_weight_that_is_computed_counts(rows):
    """Pruning and parametrizations leave no parameter of the name `weight` behind."""
    x = torch.randn(rows, K)
    for change in (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: parametrizations.weight_norm(layer, "weight"),
        lambda layer: parametrize.register_parametrization(layer, "bias", torch.nn.Softplus()),
    ):
        ours, theirs, _ = twins(True, torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(change(ours)(x), change(theirs)(x))


CLASSES, DEPTH, EXAMPLES = MANY_CLASSES + 1, 256, (4, 17)
assert CLASSES * DEPTH * EXAMPLES[0] * EXAMPLES[1] > SMALL_IN_TRAINING


def training_step(dtype, low, dy, nan_row=None, frozen=()):
    """Results and gradients of a layer of many classes: ours, torch's, and torch's in fp64."""
    theirs = torch.nn.Linear(DEPTH, CLASSES, dtype=dtype)
    x = torch.randn(*EXAMPLES, DEPTH, dtype=dtype)
    if nan_row is not None:
        x[nan_row] = torch.nan
    ours = fastlm.nn.Linear(DEPTH, CLASSES, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (ours, theirs, copy.deepcopy(theirs).double()):
        leaf = x.to(layer.weight.dtype, copy=True).requires_grad_("x" not in frozen)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name not in frozen)
        with torch.autocast("cpu", torch.bfloat16, enabled=low and layer.weight.dtype != torch.float64):
            y = layer(leaf)
        y.backward(dy.to(y.dtype))
        found = {"y": y.detach(), "x": leaf.grad} | {name: p.grad for name, p in layer.named_parameters()}
        results.append({name: value for name, value in found.items() if value is not None})
    return results


@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.85, 1.0])
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("bias",)])
def test_rows_without_gradient_change_nothing(dtype, low, share, frozen):
    """As of the tokens that a loss ignores; a zero among the first class's alone is not such a row."""
    dy = torch.randn(*EXAMPLES, CLASSES)
    dy[torch.rand(EXAMPLES) < share] = 0
    dy[0, :6] = 0
    dy[0, 0, -1] = dy[0, 1, 7] = -3.0
    dy[1, 3:5, 0] = 0
    ours, theirs, exact = training_step(dtype, low, dy, frozen=frozen)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert_as_close_as_torch(value, exact[name], theirs[name], CLASSES)


def test_nan_in_a_row_without_gradient_reaches_the_weights_gradient():
    dy = torch.randn(*EXAMPLES, CLASSES)
    dy[1:] = 0
    ours, theirs, _ = training_step(torch.float32, False, dy, nan_row=(2, 5))
    assert theirs["weight"].isnan().all()
    assert ours["weight"].isnan().all()
    assert torch.equal(ours["x"].isnan(), theirs["x"].isnan())


@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("shape", [EXAMPLES, (68,), (2, 2, 17)], ids=str)
def test_a_large_result_may_be_edited_in_place(low, shape):
    layer = fastlm.nn.Linear(DEPTH, CLASSES)
    x = torch.randn(*shape, DEPTH)
    for edit in (
        lambda y: y.mul_(2), lambda y: y[..., 5:].zero_(), lambda y: y.view(-1).neg_(), lambda y: y[0].relu_(),
    ):  # fmt: skip
        results = []
        for call in (layer, functools.partial(torch.nn.Linear.forward, layer)):
            layer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                y = call(x)
            edit(y)
            y.float().square().sum().backward()
            results.append((y.detach().float(), layer.weight.grad, layer.bias.grad))
        for actual, expected in zip(*results, strict=True):
            assert (actual - expected).norm() <= (0.02 if low else 1e-5) * expected.norm()
