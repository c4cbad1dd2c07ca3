"""Products of bfloat16 training on a CPU: weights' copies, split products, and the tied embedding's one gradient."""

import pytest
import torch
import torch.nn.functional as F

from fastlm.models import GPT, GPTConfig
from fastlm.ops import _products
from fastlm.training import AdamW

CONFIG = GPTConfig(vocab_size=61, context_length=16, n_layer=2, n_head=2, n_embd=32)
BF16 = torch.bfloat16


def autocast():
    return torch.autocast("cpu", BF16)


def data(seed=0):
    return torch.randint(
        CONFIG.vocab_size, (2, 3, CONFIG.context_length), generator=torch.Generator().manual_seed(seed)
    )


def model(tie=True):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**CONFIG.to_dict(), "tie_embeddings": tie}))


def gradients(net, accumulate=1):
    net.zero_grad(set_to_none=True)
    for seed in range(accumulate):
        tokens, targets = data(seed)
        with autocast():
            loss = net(tokens, targets)
        loss.backward()
    return {name: p.grad.double() for name, p in net.named_parameters()}


@pytest.mark.parametrize("rows", [640, 641, 1024, 1535])
@pytest.mark.parametrize("bias", [False, True])
def test_split_products(monkeypatch, threads, rows, bias):
    threads(2)
    monkeypatch.setattr(_products, "_has_tiles", lambda: True)
    a, b, c = torch.randn(rows, 40).to(BF16), torch.randn(40, 24).to(BF16), torch.randn(24).to(BF16)
    truth = a.double() @ b.double() + (c.double() if bias else 0)
    found = _products.multiply(a, b, c if bias else None).double()
    assert ((found - truth).abs() <= 2**-7 * truth.abs() + 2**-7).all()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("carried", [True, False])
def test_linear_has_the_bits_of_autocast(with_bias, carried):
    x = torch.randn(3, 5, 16).to(BF16)
    weight, bias, grad = torch.randn(24, 16), torch.randn(24), torch.randn(3, 5, 24).to(BF16)
    results = []
    for function in (F.linear, _products.linear):
        leaves = [t.clone().requires_grad_() for t in ((x, weight, bias) if with_bias else (x, weight))]
        if carried and function is _products.linear:
            _products.attach_copy(leaves[1])
        with autocast():
            y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_linear_differentiates_twice():
    x, weight = torch.randn(4, 6).to(BF16).requires_grad_(), torch.randn(3, 6, requires_grad=True)
    found = []
    for function in (F.linear, _products.linear):
        with autocast():
            y = function(x, weight)
        (first,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.float().square().sum(), weight)[0])
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_prepared_weights_give_the_gradients_of_plain_autocast(tie, accumulate):
    plain, prepared = model(tie), model(tie)
    _products.prepare_weights(prepared.product_weights(), accumulate=accumulate > 1)
    truth = gradients(plain, accumulate)
    for name, grad in gradients(prepared, accumulate).items():
        top = truth[name].abs().max()
        assert (grad - truth[name]).abs().max() <= 2**-7 * top, name  # one rounding to bf16 more
    dtype = torch.float32 if accumulate > 1 else BF16
    assert {p.grad.dtype for p in prepared.product_weights()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tied_embedding_adds_both_gradients(dtype):
    weight = torch.randn(9, 4, dtype=dtype, requires_grad=True)
    tokens = torch.tensor([[3, 3, 8], [0, 3, 8]])
    x, y = torch.randn(2, 3, 4, dtype=dtype), torch.randn(9, 4, dtype=dtype)
    for use in ((1, 1), (1, 0), (0, 1)):
        found = []
        for function in (lambda w, t: (F.embedding(t, w), w), _products.tied_embedding):
            rows, table = function(weight, tokens)
            found += torch.autograd.grad(use[0] * (rows * x).sum() + use[1] * (table * y).sum(), weight)
        torch.testing.assert_close(found[0], found[1])
    assert torch.autograd.gradcheck(
        lambda w: sum(part.sum() for part in map(torch.sin, _products.tied_embedding(w, tokens))),
        (weight.detach().double().requires_grad_(),),
    )


def test_copies_are_used_only_while_they_are_right():
    weight = torch.nn.Parameter(torch.randn(5, 4))
    _products.attach_copy(weight)
    assert _products.rounded(weight) is _products.copy_of(weight)
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(_products.rounded(weight), weight.detach().bfloat16())
    weight.data = torch.randn(2, 2)
    assert _products.copy_of(weight) is None


def test_copies_leave_the_state_dict_alone():
    net = model()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    _products.prepare_weights(net.product_weights(), accumulate=False)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) and t.dtype is torch.float32 for name, t in net.state_dict().items())


def test_steps_with_copies_follow_steps_with_casts():
    losses = []
    for prepared in (False, True):
        net = model()
        if prepared:
            _products.prepare_weights(net.product_weights(), accumulate=False)
        optimizer = AdamW(net.parameters(), lr=1e-2)
        found = []
        for step in range(6):
            tokens, targets = data(step % 2)
            with autocast():
                loss = net(tokens, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(max_norm=1.0)
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert losses[1][-1] < losses[1][0] - 0.1


def test_a_graph_over_a_refreshed_copy_is_refused():
    net = model()
    _products.prepare_weights(net.product_weights(), accumulate=False)
    optimizer = AdamW(net.parameters())
    gradients(net)
    with autocast():
        loss = net(*data())
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
