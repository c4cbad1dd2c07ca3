"""Products on a CPU: by oneDNN and in halves, weights' bf16 copies, and the tied embedding's one gradient."""

import pytest
import torch
import torch.nn.functional as F

from fastlm import _native, linear_cross_entropy
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


@pytest.fixture
def by_onednn(monkeypatch):
    """oneDNN for every fp32 product, as if it led on this CPU; returns the number of its calls so far."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no products by oneDNN")
    calls = []
    plain = _products.by_onednn
    monkeypatch.setattr(_products, "onednn_leads", lambda: True)
    monkeypatch.setattr(_products, "SMALL_PRODUCT", 0)
    monkeypatch.setattr(_products, "SMALL_IN_TRAINING", 0)
    monkeypatch.setattr(_products, "PART", 8)
    monkeypatch.setattr(_products, "by_onednn", lambda *args: calls.append(args) or plain(*args))
    return lambda: len(calls)


def close(found, truth):
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", ["rows", "columns", "cut"])
@pytest.mark.parametrize("shape", [(21, 13, 17), (1, 1, 1), (64, 32, 48)])
def test_fp32_products(by_onednn, shape, stored, bias):
    rows, depth, columns = shape
    a, b, c = torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(columns)
    if stored == "columns":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    elif stored == "cut":
        a, b = torch.randn(rows + 1, depth + 2)[1:, 2:], torch.randn(columns + 2, depth + 3)[2:, 3:].t()
    c = c if bias else None
    truth = a.double() @ b.double() + (c.double() if bias else 0)
    close(_products.multiply(a, b, c), truth)
    out = torch.full((rows, columns + 5), torch.nan)[:, 2:-3]
    assert _products.multiply(a, b, c, out) is out
    close(out, truth)
    assert by_onednn() >= (2 if stored == "rows" else 1)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_fp32_linear_and_its_gradients(by_onednn, transposed, with_bias, expanded):
    x, weight, bias = torch.randn(3, 7, 16), torch.randn(24, 16), torch.randn(24)
    grad = torch.randn(24).expand(3, 7, 24) if expanded else torch.randn(3, 7, 24)
    results = []
    for function, dtype in ((_products.linear, torch.float32), (F.linear, torch.float64)):
        stored = weight.to(dtype, copy=True)
        stored = (stored.t().contiguous() if transposed else stored).requires_grad_()
        own = [t.to(dtype, copy=True).requires_grad_() for t in ((x, bias) if with_bias else (x,))]
        leaves = [own[0], stored, *own[1:]]
        y = function(leaves[0], stored.t() if transposed else stored, *leaves[2:])
        with torch.no_grad():
            close(function(leaves[0], stored.t() if transposed else stored, *leaves[2:]), y.detach().double())
        y.backward(grad.to(dtype))
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for found, truth in zip(*results, strict=True):
        assert found.is_contiguous()
        close(found, truth)
    assert by_onednn() == 4


def test_fp32_linear_differentiates_twice(by_onednn):
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    found = []
    for function in (F.linear, _products.linear):
        (first,) = torch.autograd.grad(function(x, weight).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), weight)[0])
    torch.testing.assert_close(found[0], found[1])
    assert by_onednn() >= 1


def test_onednn_leads_only_where_it_was_measured(monkeypatch):
    monkeypatch.setattr(_native, "is_intel", lambda: True)
    assert not _products.onednn_leads.__wrapped__()
    monkeypatch.setattr(_native, "is_intel", lambda: False)
    monkeypatch.setattr(_native, "cpu_isas", lambda: ("baseline", "avx2"))
    assert not _products.onednn_leads.__wrapped__()


def test_what_does_not_fit_is_pytorchs(by_onednn):
    x, weight = torch.randn(4, 6), torch.randn(3, 6)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        _products.linear(x, torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="same dtype"):
        _products.linear(x, weight.double())
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        _products.linear(x, weight)
    with autocast():
        assert _products.linear(x, weight).dtype is BF16
    compiled = torch.compile(_products.linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    assert by_onednn() == 0


@pytest.mark.parametrize("memory", [0.1, 1.0])
def test_linear_cross_entropy_by_onednn(by_onednn, memory):
    hidden, weight, target = torch.randn(30, 16), torch.randn(5000, 16), torch.randint(0, 5000, (30,))
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
        if dtype is torch.float32:
            loss = linear_cross_entropy(*leaves, target, memory=memory)
        else:
            loss = F.cross_entropy(F.linear(*leaves), target)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for found, truth in zip(*results, strict=True):
        close(found, truth)
    assert by_onednn() > 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (16, 16), (33, 65), (130, 257)])
def test_transpose(isa, shape):
    x = torch.randn(shape[0], shape[1] + 3)[:, 1:-2]
    assert torch.equal(_native.transpose(x), x.t().contiguous())


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
