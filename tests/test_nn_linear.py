"""fastlm.nn.Linear against torch.nn.Linear on the same state, for each of the products it chooses between."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune

import fastlm.nn
from fastlm.nn.linear import MANY_ROWS
from fastlm.ops._products import LONE_COLUMNS, LONE_ROWS
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
        monkeypatch.setattr("fastlm.ops._products.SMALL_IN_TRAINING", 0)
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
