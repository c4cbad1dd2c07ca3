"""Attention maps, telemetry and the implementation behind PyTorch's SDPA, against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm
import sdpa
from fastlm.interpret.maps import ROWS
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.ops.attention import OBSERVERS

B, H, T, S, D = 2, 4, 7, 9, 8


def plain_weights(q, k, mask=None, scale=None):
    """The definition; `mask` is True where a key is seen, or added."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1), scores


OPTIONS: dict[str, tuple[dict, torch.Tensor | None]] = {
    "full": ({}, None),
    "causal": ({"is_causal": True}, torch.ones(T, S, dtype=torch.bool).tril()),
    "window": ({"window": (2, 1)}, torch.ones(T, S, dtype=torch.bool).tril(1).triu(-2)),
    "scale": ({"scale": 0.7}, None),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_weights_and_statistics_follow_the_definition(name):
    options, seen = OPTIONS[name]
    q, k = torch.randn(B, H, T, D), torch.randn(B, 2, S, D)
    weights, scores = plain_weights(q, k, seen, options.get("scale"))
    torch.testing.assert_close(fastlm.attention_weights(q, k, **options), weights)
    found = fastlm.attention_statistics(q, k, **options)
    torch.testing.assert_close(found.logsumexp, scores.logsumexp(-1))
    torch.testing.assert_close(found.entropy, -torch.xlogy(weights, weights).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.max_logit, scores.amax((-1, -2)))


@pytest.mark.parametrize("floating", [False, True])
def test_masks_and_softcap(floating):
    q, k = torch.randn(B, H, T, D), torch.randn(B, H, S, D)
    mask = torch.rand(B, 1, T, S) < 0.7
    mask[:, :, 3] = False  # a query that sees no key
    added = torch.zeros(B, 1, T, S).masked_fill(~mask, -math.inf) + torch.randn(B, 1, T, S)
    given = added if floating else mask
    cap = 1.5
    scores = cap * torch.tanh(q @ k.mT * D**-0.5 / cap)
    scores = scores + added if floating else scores.masked_fill(~mask, -math.inf)
    expected = scores.softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(fastlm.attention_weights(q, k, given, softcap=cap), expected)
    found = fastlm.attention_statistics(q, k, given, softcap=cap)
    torch.testing.assert_close(found.logsumexp, scores.logsumexp(-1))
    torch.testing.assert_close(found.entropy, -torch.xlogy(expected, expected).sum(-1), rtol=1e-4, atol=1e-5)
    assert not found.entropy[:, :, 3].any()


def test_statistics_under_the_lowest_number():
    """Beside it the logarithm of a row's sum is lost, of which the entropy is made."""
    q, k = torch.randn(1, H, T, D), torch.randn(1, H, S, D)
    mask = torch.full((T, S), torch.finfo(torch.float32).min)
    mask[1, :2] = 0
    weights = (q.double() @ k.double().mT * D**-0.5 + mask).softmax(-1)
    weights[:, :, [t for t in range(T) if t != 1]] = 1 / S  # no score is left beside the mask in fp32
    found = fastlm.attention_statistics(q, k, mask)
    torch.testing.assert_close(found.entropy, -torch.xlogy(weights, weights).sum(-1).float(), rtol=1e-5, atol=1e-5)


def test_statistics_have_the_right_gradients():
    q = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 2, 3, 5) < 0.6
    mask[..., 0] = True
    mask[0, 0, 1] = False
    found = fastlm.attention_statistics(q, k, mask)
    rows = mask.any(-1)

    def call(q, k):
        found = fastlm.attention_statistics(q, k, mask)
        return found.logsumexp[rows], found.entropy, found.max_logit

    assert torch.autograd.gradcheck(call, (q, k))
    grads = torch.autograd.grad(found.entropy.sum() + found.max_logit.sum(), (q, k))
    assert all(g.isfinite().all() for g in grads)


def test_long_sequences_are_taken_in_parts():
    q, k = torch.randn(1, 1, ROWS + 5, D), torch.randn(1, 1, ROWS + 5, D)
    seen = torch.ones(ROWS + 5, ROWS + 5, dtype=torch.bool).tril()
    _, scores = plain_weights(q, k, seen)
    for options in ({"is_causal": True}, {"attn_mask": seen}):
        found = fastlm.attention_statistics(q, k, **options)
        torch.testing.assert_close(found.logsumexp, scores.logsumexp(-1))
        torch.testing.assert_close(found.max_logit, scores.amax((-1, -2)))


class Torchs(nn.Module):
    """PyTorch's function, called as most models do."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def test_maps_of_pytorchs_function():
    model = nn.Sequential(Torchs(), Torchs())
    x = torch.randn(B, T, 12)
    maps = fastlm.attention_maps(model, x)
    assert list(maps) == ["0", "1"]
    q, k, _ = model[0].qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
    expected, _ = plain_weights(q, k, torch.ones(T, T, dtype=torch.bool).tril())
    torch.testing.assert_close(maps["0"], expected)
    assert not OBSERVERS
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("package", [nn, fastlm.nn], ids=["torch", "fastlm"])
@pytest.mark.parametrize("average", [False, True])
def test_maps_of_multihead_attention_leave_its_result_alone(package, average):
    layer = package.MultiheadAttention(12, 2, batch_first=True).eval()
    model = nn.ModuleDict({"attention": layer})
    model.forward = lambda q, k: layer(q, k, k, average_attn_weights=average, key_padding_mask=blocked)
    blocked = torch.arange(S) >= torch.tensor([[S], [4]])
    q, k = torch.randn(B, T, 12), torch.randn(B, S, 12)
    with torch.no_grad():
        expected, by_torch = model.forward(q, k)
        _, full = layer(q, k, k, average_attn_weights=False, key_padding_mask=blocked)
        maps = fastlm.attention_maps(model, (q, k))
        torch.testing.assert_close(maps["attention"], full)
        with fastlm.attention_telemetry(model) as telemetry:
            y, weights = model.forward(q, k)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(weights, by_torch)
    entropy = -torch.xlogy(full, full).sum(-1)
    torch.testing.assert_close(telemetry["attention"].entropy, entropy, rtol=1e-4, atol=1e-5)


def test_maps_of_encoders_and_gpts():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 2)
    encoder.eval()
    maps = fastlm.attention_maps(encoder, torch.randn(B, T, 12))
    assert [(name, m.shape) for name, m in maps.items()] == [
        (f"layers.{i}.self_attn", (B, 2, T, T)) for i in range(2)
    ]  # fmt: skip
    gpt = GPT(GPTConfig(vocab_size=17, context_length=16, n_layer=2, n_head=2, n_embd=12)).eval()
    maps = fastlm.attention_maps(gpt, torch.randint(17, (B, T)))
    assert len(maps) == 2
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, 2, T))
        assert not weights.triu(1).any()


def test_telemetry_trains():
    """A penalty on the largest logit makes it smaller."""
    model = nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True)
    fastlm.accelerate(model)
    x = 3 * torch.randn(B, T, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    largest = []
    for _ in range(5):
        with fastlm.attention_telemetry(model) as telemetry:
            model(x)
        penalty = telemetry["self_attn"].max_logit.mean()
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        largest.append(penalty.item())
    assert largest == sorted(largest, reverse=True)


def test_repeated_calls_and_pictures(tmp_path):
    layer = Torchs()
    maps = fastlm.attention_maps(nn.Sequential(layer, layer), {"input": torch.randn(B, T, 12)})
    assert list(maps) == ["0", "0 (2)"]
    figure = maps.plot(batch=1, tokens=list("abcdefg"), path=tmp_path / "maps.png")
    assert len(figure.axes) == 4
    assert (tmp_path / "maps.png").stat().st_size > 1000
    drawn = torch.as_tensor(figure.axes[3].images[0].get_array())
    torch.testing.assert_close(drawn, maps["0 (2)"][1, 1])
    assert len(maps.plot(head=-1).axes) == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        fastlm.attention_maps(nn.Linear(3, 3), torch.randn(2, 3)).plot()


@pytest.mark.parametrize("kind", ["full", "causal", "mask"])
def test_pytorchs_sdpa_through_its_register(kind):
    q, k, v = (torch.randn(B, H, T, D, requires_grad=True) for _ in range(3))
    options = {"full": {}, "causal": {"is_causal": True}, "mask": {"attn_mask": torch.rand(B, 1, T, T) < 0.7}}[kind]
    dy = torch.randn(B, H, T, D)

    def call():
        y = F.scaled_dot_product_attention(q, k, v, **options)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]

    expected = call()
    seen = []
    OBSERVERS.append(lambda *args, **kwargs: seen.append(args))
    try:
        with sdpa.activated():
            assert "fastlm" in torch.nn.attention.list_flash_attention_impls()
            actual = call()
            assert len(seen) == 1  # it was ours
    finally:
        OBSERVERS.clear()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(call(), expected)
