"""Products on a CPU: our own, and in halves, weights' bf16 copies, and the tied embedding's one gradient."""

import contextlib
import importlib

import pytest
import torch
import torch.nn.functional as F

from fastlm import linear_cross_entropy
from fastlm.backends import cpu as _native
from fastlm.backends.cpu import gemm as _kernels
from fastlm.models import GPT, GPTConfig
from fastlm.ops import _gemm, _shadow, _thresholds
from fastlm.ops._tied_embedding import tied_embedding
from fastlm.ops.linear import layer_linear
from fastlm.training import AdamW

linear_op = importlib.import_module("fastlm.ops.linear")  # fastlm.ops has the function by this name
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
    monkeypatch.setattr(_gemm, "has_tiles", lambda: True)
    a, b, c = torch.randn(rows, 40).to(BF16), torch.randn(40, 24).to(BF16), torch.randn(24).to(BF16)
    truth = a.double() @ b.double() + (c.double() if bias else 0)
    found = _gemm.multiply(a, b, c if bias else None).double()
    assert ((found - truth).abs() <= 2**-7 * truth.abs() + 2**-7).all()


@pytest.fixture(params=[torch.float32, BF16], ids=["fp32", "bf16"])
def ours(request, monkeypatch):
    """Products of our own in one dtype, as if they led on this CPU; returns the dtype and the number of their calls."""
    if not _kernels.gemm_serves(request.param):
        pytest.skip("this CPU, or the instruction set chosen, has no such products")
    calls = []
    plain = _kernels.gemm
    for module in (_gemm, linear_op):
        monkeypatch.setattr(module, "leads", lambda dtype: dtype is request.param)
    monkeypatch.setattr(_thresholds, "SMALL_PRODUCT", 0)
    monkeypatch.setattr(_thresholds, "SMALL_IN_TRAINING", 0)
    monkeypatch.setattr(_thresholds, "FASTER_ROWS", {})
    monkeypatch.setattr(_kernels, "gemm", lambda *args: calls.append(args) or plain(*args))
    return request.param, lambda: len(calls)


def close(found, truth, dtype=torch.float32, scale=1.0):
    """To the rounding of results in a dtype whose terms add up to `scale` or so."""
    unit = 1e-5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), truth, rtol=unit, atol=unit * scale)


@pytest.mark.parametrize("threads_used", [1, 2])
@pytest.mark.parametrize("form", ["plain", "bias", "added"])
@pytest.mark.parametrize("stored", ["rows", "columns", "cut", "strided"])
@pytest.mark.parametrize("shape", [(21, 13, 17), (1, 1, 1), (64, 32, 48), (300, 100, 97), (9, 3000, 50), (130, 1, 200)])
def test_our_products(ours, threads, shape, stored, form, threads_used):
    threads(threads_used)
    dtype, calls = ours
    rows, depth, columns = shape
    a, b = torch.randn(rows, depth, dtype=dtype), torch.randn(depth, columns, dtype=dtype)
    c = torch.randn(columns, dtype=dtype) if form == "bias" else None
    if stored == "columns":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    elif stored == "cut":
        a = torch.randn(rows + 1, depth + 3, dtype=dtype)[1:, 3:]
        b = torch.randn(columns + 2, depth + 3, dtype=dtype)[2:, 3:].t()
    elif stored == "strided":
        a, b = torch.randn(rows, 2 * depth, dtype=dtype)[:, ::2], torch.randn(1, columns, dtype=dtype).expand(depth, -1)
    truth = a.double() @ b.double() + (0 if c is None else c.double())
    scale = 4 * depth**0.5
    if form == "added":
        total = torch.randn(rows, columns + 5)[:, 2:-3]
        found = total.clone()
        _gemm.add_product(found, a, b)
        close(found, total.double() + truth, scale=scale)
    else:
        close(_gemm.multiply(a, b, c), truth, dtype, scale)
        out = torch.full((rows, columns + 5), torch.nan, dtype=dtype)[:, 2:-3]
        assert _gemm.multiply(a, b, c, out) is out
        close(out, truth, dtype, scale)
        turned = torch.full((columns, rows), torch.nan, dtype=dtype).t()
        close(_gemm.multiply(a, b, c, turned), truth, dtype, scale)
    assert calls() >= 1


def test_nothing_beyond_a_matrix_is_read_or_written(ours):
    dtype, _ = ours
    for rows, depth, columns in ((3, 5, 7), (17, 33, 49)):
        a, b = (torch.full((n + 2, m + 2), torch.nan, dtype=dtype) for n, m in ((rows, depth), (depth, columns)))
        a[1:-1, 1:-1], b[1:-1, 1:-1] = torch.randn(rows, depth), torch.randn(depth, columns)
        out = torch.zeros(rows + 2, columns + 2, dtype=dtype)
        inner = [x[1:-1, 1:-1] for x in (a, b, out)]
        _gemm.multiply(inner[0], inner[1], out=inner[2])
        close(inner[2], inner[0].double() @ inner[1].double(), dtype, depth**0.5)
        inner[2].zero_()
        assert not out.any()


@pytest.mark.parametrize("turned", [False, True])
def test_a_row_of_our_products_is_the_same_in_any_company(ours, threads, turned):
    dtype, _ = ours
    a, b = torch.randn(700, 96, dtype=dtype), torch.randn(96, 500, dtype=dtype)
    a = a.t().contiguous().t() if turned else a
    threads(1)
    whole = _gemm.multiply(a, b)
    assert torch.equal(whole[301:302], _gemm.multiply(a[301:302], b))
    assert torch.equal(whole[:, 70:75], _gemm.multiply(a, b[:, 70:75]))
    threads(2)
    assert torch.equal(whole, _gemm.multiply(a, b))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_our_linear_and_its_gradients(ours, transposed, with_bias, expanded):
    own_dtype, calls = ours
    x, weight, bias = (torch.randn(*size).to(own_dtype) for size in ((3, 7, 16), (24, 16), (24,)))
    grad = torch.randn(24).expand(3, 7, 24) if expanded else torch.randn(3, 7, 24)
    grad = grad.to(own_dtype)
    results = []
    for function, dtype in ((layer_linear, own_dtype), (F.linear, torch.float64)):
        stored = weight.to(dtype, copy=True)
        stored = (stored.t().contiguous() if transposed else stored).requires_grad_()
        own = [t.to(dtype, copy=True).requires_grad_() for t in ((x, bias) if with_bias else (x,))]
        leaves = [own[0], stored, *own[1:]]
        y = function(leaves[0], stored.t() if transposed else stored, *leaves[2:])
        with torch.no_grad():
            close(function(leaves[0], stored.t() if transposed else stored, *leaves[2:]), y.detach().double(), dtype)
        y.backward(grad.to(dtype))
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for found, truth in zip(*results, strict=True):
        assert found.is_contiguous()
        close(found, truth, own_dtype, 4 * 24**0.5)
    assert calls() == 4


def test_our_linear_differentiates_twice(ours):
    dtype, calls = ours
    x, weight = torch.randn(4, 6, dtype=dtype, requires_grad=True), torch.randn(3, 6, dtype=dtype, requires_grad=True)
    found = []
    for function in (F.linear, layer_linear):
        (first,) = torch.autograd.grad(function(x, weight).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), weight)[0])
    torch.testing.assert_close(found[0], found[1])
    assert calls() >= 1


def test_our_products_lead_only_where_they_were_measured(monkeypatch):
    monkeypatch.setattr(_native, "is_intel", lambda: True)
    assert not any(_gemm.leads(dtype) for dtype in (torch.float32, BF16))
    monkeypatch.setattr(_native, "is_intel", lambda: False)
    for isa in _native.cpu_isas():
        with _isa(isa):
            assert _gemm.leads(torch.float32) == (isa in ("avx512", "avx512_bf16", "amx"))
            assert _gemm.leads(BF16) == (isa == "avx512_bf16")
            assert not _gemm.leads(torch.float16)


@contextlib.contextmanager
def _isa(name):
    before = _native.cpu_isa()
    _native.set_cpu_isa(name)
    try:
        yield
    finally:
        _native.set_cpu_isa(before)


def test_what_does_not_fit_is_pytorchs(ours):
    dtype, calls = ours
    x, weight = torch.randn(4, 6, dtype=dtype), torch.randn(3, 6, dtype=dtype)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer_linear(x, torch.randn(3, 5, dtype=dtype))
    with pytest.raises(RuntimeError, match="same dtype"):
        layer_linear(x, weight.double())
    with autocast():
        assert layer_linear(x, weight).dtype is BF16
    compiled = torch.compile(layer_linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    assert calls() == 0


@pytest.mark.parametrize("memory", [0.1, 1.0])
def test_linear_cross_entropy_by_our_products(ours, memory):
    own, calls = ours
    hidden, weight, target = torch.randn(30, 16), torch.randn(5000, 16), torch.randint(0, 5000, (30,))
    results = []
    for dtype in (own, torch.float64):
        leaves = [t.to(own).to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
        if dtype is own:
            loss = linear_cross_entropy(*leaves, target, memory=memory)
        else:
            loss = F.cross_entropy(F.linear(*leaves), target)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for found, truth in zip(*results, strict=True):
        close(found, truth, own)
    assert calls() > 0


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("carried", [True, False])
def test_linear_has_the_bits_of_autocast(monkeypatch, with_bias, carried):
    monkeypatch.setattr(_thresholds, "SMALL_IN_TRAINING", 0)
    x = torch.randn(3, 5, 16).to(BF16)
    weight, bias, grad = torch.randn(24, 16), torch.randn(24), torch.randn(3, 5, 24).to(BF16)
    results = []
    for function in (F.linear, layer_linear):
        leaves = [t.clone().requires_grad_() for t in ((x, weight, bias) if with_bias else (x, weight))]
        if carried and function is layer_linear:
            _shadow.attach_copy(leaves[1])
        with autocast():
            y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_linear_differentiates_twice(monkeypatch):
    monkeypatch.setattr(_thresholds, "SMALL_IN_TRAINING", 0)
    x, weight = torch.randn(4, 6).to(BF16).requires_grad_(), torch.randn(3, 6, requires_grad=True)
    found = []
    for function in (F.linear, layer_linear):
        with autocast():
            y = function(x, weight)
        (first,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.float().square().sum(), weight)[0])
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_prepared_weights_give_the_gradients_of_plain_autocast(tie, accumulate):
    plain, prepared = model(tie), model(tie)
    _shadow.prepare_weights(prepared.product_weights(), accumulate=accumulate > 1)
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
        for function in (lambda w, t: (F.embedding(t, w), w), tied_embedding):
            rows, table = function(weight, tokens)
            found += torch.autograd.grad(use[0] * (rows * x).sum() + use[1] * (table * y).sum(), weight)
        torch.testing.assert_close(found[0], found[1])
    assert torch.autograd.gradcheck(
        lambda w: sum(part.sum() for part in map(torch.sin, tied_embedding(w, tokens))),
        (weight.detach().double().requires_grad_(),),
    )


def test_copies_are_used_only_while_they_are_right():
    weight = torch.nn.Parameter(torch.randn(5, 4))
    _shadow.attach_copy(weight)
    assert _shadow.rounded(weight) is _shadow.copy_of(weight)
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(_shadow.rounded(weight), weight.detach().bfloat16())
    weight.data = torch.randn(2, 2)
    assert _shadow.copy_of(weight) is None


def test_copies_leave_the_state_dict_alone():
    net = model()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    _shadow.prepare_weights(net.product_weights(), accumulate=False)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) and t.dtype is torch.float32 for name, t in net.state_dict().items())


def test_steps_with_copies_follow_steps_with_casts():
    losses = []
    for prepared in (False, True):
        net = model()
        if prepared:
            _shadow.prepare_weights(net.product_weights(), accumulate=False)
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
    _shadow.prepare_weights(net.product_weights(), accumulate=False)
    optimizer = AdamW(net.parameters())
    gradients(net)
    with autocast():
        loss = net(*data())
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
