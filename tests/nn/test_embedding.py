"""fastlm.nn's embeddings against torch.nn.Embedding and the papers' formulas."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn

import fastlm.nn

V, E, B, T = 17, 10, 3, 7


def formula(position, element, base=10000.0):
    angle = position / base ** ((element - element % 2) / E)
    return math.cos(angle) if element % 2 else math.sin(angle)


def test_sinusoidal_positions_follow_the_formula():
    layer = fastlm.nn.SinusoidalPositions(E, max_length=50)
    x = torch.randn(B, T, E)
    expected = torch.tensor([[formula(p, e) for e in range(E)] for p in range(40, 40 + T)])
    torch.testing.assert_close(layer(x, start=40), x + expected)
    assert not layer.state_dict()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="positions 44 to 50, expected them below 50"):
        layer(x, start=44)


def test_odd_width_keeps_the_last_sine():
    table = fastlm.nn.SinusoidalPositions(5, max_length=4).table
    assert table.shape == (4, 5)
    torch.testing.assert_close(table[3, 4], torch.tensor(math.sin(3 / 10000 ** (4 / 5))))


def test_plain_embedding_is_torchs():
    torch.manual_seed(1)
    ours = fastlm.nn.Embedding(V, E, padding_idx=2, max_norm=1.0)
    torch.manual_seed(1)
    theirs = nn.Embedding(V, E, padding_idx=2, max_norm=1.0)
    ids = torch.randint(V, (B, T))
    assert torch.equal(ours(ids), theirs(ids))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    names = [list(inspect.signature(cls.__init__).parameters) for cls in (type(ours), nn.Embedding)]
    assert names[0][: len(names[1])] == names[1]


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_scale_and_positions_are_added(positions):
    layer = fastlm.nn.Embedding(V, E, scale=math.sqrt(E), positions=positions, max_length=20)
    ids = torch.randint(V, (B, T))
    table = layer.positions.weight if positions == "learned" else layer.positions.table
    torch.testing.assert_close(layer(ids, start=5), math.sqrt(E) * layer.weight[ids] + table[5 : 5 + T])
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(ids), layer(ids))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), layer(ids))


def test_wrong_positions_are_refused():
    with pytest.raises(ValueError, match="positions is 'rotary', expected None, 'sinusoidal' or 'learned'"):
        fastlm.nn.Embedding(V, E, positions="rotary")
    with pytest.raises(ValueError, match="max_length is None"):
        fastlm.nn.Embedding(V, E, positions="learned")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 6])
def test_rotary_turns_pairs_as_complex_numbers(interleaved, rotary_dim):
    D, H = 8, 2
    layer = fastlm.nn.RotaryEmbedding(D, 500.0, rotary_dim, interleaved)
    q, k = torch.randn(B, H, T, D, requires_grad=True), torch.randn(B, 1, T, D)
    positions = torch.randint(0, 1000, (B, T))
    turned, _ = layer(q, k, positions)
    R = rotary_dim // 2
    pairs = q[..., :rotary_dim].unflatten(-1, (R, 2) if interleaved else (2, R))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    angles = positions[:, None, :, None] * 500.0 ** (-torch.arange(R) * 2 / rotary_dim)
    expected = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()), angles))
    expected = (expected if interleaved else expected.transpose(-1, -2)).flatten(-2)
    torch.testing.assert_close(turned[..., :rotary_dim], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(turned[..., rotary_dim:], q[..., rotary_dim:])
    grads = torch.autograd.grad(turned.square().sum(), q)[0]  # a rotation keeps lengths
    torch.testing.assert_close(grads, 2 * q.detach())


def test_rotary_scores_depend_on_the_distance_alone():
    layer = fastlm.nn.RotaryEmbedding(8).bfloat16()  # no buffer is rounded by the cast
    q, k = torch.randn(1, 1, T, 8), torch.randn(1, 1, T, 8)
    scores = [torch.matmul(*(x if i == 0 else x.mT for i, x in enumerate(layer(q, k, start=s)))) for s in (0, 1000)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)
    assert not layer.state_dict()
    with pytest.raises(ValueError, match="rotary_dim is 7, expected an even number up to 8"):
        fastlm.nn.RotaryEmbedding(8, rotary_dim=7)
