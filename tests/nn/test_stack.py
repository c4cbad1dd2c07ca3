"""fastlm.nn's Transformer stacks against torch.nn's on the same state."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fastlm.nn
from tolerances import assert_as_close_as_torch

E, H, FF, B, T, S, L = 22, 2, 37, 3, 5, 7, 2  # D = 11
NORMS = pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
KINDS = pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
SIZE = L * (12 * E + 2 * FF) + B * (T + S)


def build(package, kind, dropout=0.0, dtype=torch.float32, final_norm=True, nested=False, **options):
    options = {"batch_first": True, "dropout": dropout, "dtype": dtype, "activation": "gelu", **options}
    norm = package.LayerNorm(E, dtype=dtype) if final_norm else None
    if kind == "encoder":
        layer = package.TransformerEncoderLayer(E, H, FF, **options)
        return package.TransformerEncoder(layer, L, norm, enable_nested_tensor=nested)
    if kind == "decoder":
        return package.TransformerDecoder(package.TransformerDecoderLayer(E, H, FF, **options), L, norm)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
        return package.Transformer(E, H, L, L, FF, **options)


def twins(kind, **options):
    """(ours, torch's, torch's in fp64) with one random state."""
    theirs = build(nn, kind, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = build(fastlm.nn, kind, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs, copy.deepcopy(theirs).double()


def inputs_of(kind, dtype=torch.float32):
    source, target = torch.randn(B, S, E, dtype=dtype), torch.randn(B, T, E, dtype=dtype)
    return {"encoder": (source,), "decoder": (target, source), "transformer": (source, target)}[kind]


def masks_of(kind, causal, floating):
    """Keyword arguments: padded sources, and a causal mask over the targets or, in an encoder, the source."""
    length = S if kind == "encoder" else T
    blocked = torch.ones(length, length, dtype=torch.bool).triu(1)
    padding = torch.arange(S) >= torch.tensor([[S], [4], [2]])
    if floating:
        blocked, padding = (torch.zeros(m.shape).masked_fill(m, -torch.inf) for m in (blocked, padding))
    name = {"encoder": "mask", "decoder": "tgt_mask", "transformer": "tgt_mask"}[kind]
    masks = {name: blocked} if causal else {}
    if kind == "transformer":
        masks["src_key_padding_mask"] = padding
    masks["src_key_padding_mask" if kind == "encoder" else "memory_key_padding_mask"] = padding
    return masks


def run(model, inputs, masks, dy):
    leaves = [x.detach().to(dy.dtype, copy=True).requires_grad_() for x in inputs]
    masks = {n: m.to(dy.dtype) if m.is_floating_point() else m for n, m in masks.items()}
    y = model(*leaves, **masks)
    y.backward(dy)
    results = {"output": y.detach()} | {f"d input {i}": x.grad for i, x in enumerate(leaves)}
    return results | {f"d {name}": p.grad for name, p in model.named_parameters()}


def assert_parity(models, inputs, masks):
    dy = torch.randn_like(inputs[0] if len(inputs) == 1 else min(inputs, key=lambda x: x.shape[1]))
    ours, theirs, truth = models
    actual, by_torch = run(ours, inputs, masks, dy), run(theirs, inputs, masks, dy)
    exact = run(truth, inputs, masks, dy.double())
    assert actual.keys() == by_torch.keys()
    for name, result in actual.items():
        assert_as_close_as_torch(result, exact[name], by_torch[name], SIZE, name)


@KINDS
@NORMS
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("floating", [False, True], ids=["boolean", "float"])
def test_outputs_and_gradients_are_torchs(kind, norm_first, causal, floating):
    assert_parity(twins(kind, norm_first=norm_first), inputs_of(kind), masks_of(kind, causal, floating))


@KINDS
def test_without_masks_and_final_norm(kind):
    assert_parity(twins(kind, final_norm=False), inputs_of(kind), {})


@NORMS
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("left_aligned", [False, True])
def test_padded_positions_in_evaluation_are_torchs(norm_first, nested, left_aligned):
    """torch runs nested tensors here where it can, and gives 0 where the padding was."""
    models = [m.eval() for m in twins("encoder", norm_first=norm_first, nested=nested and not norm_first)]
    blocked = torch.arange(S) >= torch.tensor([[S], [4], [2]])
    blocked = blocked if left_aligned else blocked.flip(1)
    x = torch.randn(B, S, E)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage")
        results = [m(x.to(m.norm.weight.dtype), src_key_padding_mask=blocked) for m in models]
    assert_as_close_as_torch(results[0], results[2], results[1], SIZE)


@pytest.mark.parametrize("changed", [(0, 1), (3, 3), None])
def test_the_causal_mask_is_recognised_and_no_other(changed):
    """The second layer's keys beyond the diagonal are not seen unless the mask lets them through."""
    ours, theirs, _ = twins("encoder")
    mask = torch.ones(S, S, dtype=torch.bool).triu(1)
    if changed is not None:
        mask[changed] = ~mask[changed]
    x = torch.randn(B, S, E)
    torch.testing.assert_close(ours(x, mask), theirs(x, mask), rtol=1e-4, atol=1e-4)
    biased = torch.zeros(S, S).masked_fill(mask, -torch.inf)
    biased[2, 1] = 0.5
    torch.testing.assert_close(ours(x, biased), theirs(x, biased), rtol=1e-4, atol=1e-4)


def test_custom_stacks_of_a_transformer_are_left_alone():
    class Identity(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(E)

        def forward(self, src, *args, **kwargs):
            return self.norm(src)

    model = fastlm.nn.Transformer(E, H, L, L, FF, custom_encoder=Identity(), batch_first=True)
    assert type(model.encoder.norm) is nn.LayerNorm
    assert type(model.decoder) is fastlm.nn.TransformerDecoder
