"""Forward-mode differentiation (torch.autograd.forward_ad) of every op and layer, against its backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import fastlm
from samples import CASES

EXACT = {"dropout_p": 0.0, "out_dtype": None}  # plain PyTorch draws other masks; a narrow output is rounded


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.keeps_inputs])
def test_tangents_are_those_of_the_backward_pass(name, needs_grad):
    """<u, J v> = <J^T u, v>, with J^T u made by the kernels."""
    named, others = CASES[name].leaves("cpu", torch.float64)
    others |= {option: EXACT[option] for option in others.keys() & EXACT.keys()}
    outputs = CASES[name].run(named, others)
    u = [torch.randn_like(y) for y in outputs]
    v = {key: torch.randn_like(x) for key, x in named.items()}
    gradients = dict(zip(named, torch.autograd.grad(outputs, list(named.values()), u), strict=True))
    with forward_ad.dual_level():
        duals = {key: forward_ad.make_dual(x.detach().requires_grad_(needs_grad), v[key]) for key, x in named.items()}
        tangents = [forward_ad.unpack_dual(y).tangent for y in CASES[name].run(duals, others)]
    forward = sum((a * b).sum() for a, b in zip(u, tangents, strict=True))
    backward = sum((gradients[key] * v[key]).sum() for key in named)
    torch.testing.assert_close(forward, backward)


@pytest.mark.parametrize("rows", [4, 300])
def test_frozen_layers_carry_tangents(rows):
    """Without gradients the kernels' outputs would be constants."""
    layer = fastlm.nn.Linear(512, 512).requires_grad_(False)
    x, v = torch.randn(2, rows, 512)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, v @ layer.weight.T)
