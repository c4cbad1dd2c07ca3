"""linear_cross_entropy: parity with the fp64 reference in windows of every kind, memory, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import DTYPES
from fastlm.backends.cpu import cross_entropy as _kernels
from tolerances import assert_as_close_as_torch

# (rows, width, classes, memory): one class, less than a window, several windows with a short first one, all of the
# logits in one, one row, no rows.
SHAPES = [
    (5, 9, 1, 0.1),
    (13, 32, 133, 0.1),
    (9, 24, 7001, 0.4),
    (9, 24, 4100, 1.0),
    (1, 7, 5000, 0.1),
    (0, 8, 17, 0.1),
]
OPTIONS = [
    {},
    {"reduction": "sum", "weighted": True},
    {"reduction": "none", "label_smoothing": 0.1},
    {"label_smoothing": 0.2, "weighted": True},
]
CASES = [(*shape, OPTIONS[i % 4]) for i, shape in enumerate(SHAPES)] + [(8, 16, 35, 0.1, o) for o in OPTIONS]


def _stock(hidden, weight, target, bias=None, class_weight=None, **options):
    options.pop("memory", None)
    return F.cross_entropy(F.linear(hidden, weight, bias), target, class_weight, **options)


def _inputs(M, H, C, dtype, with_bias):
    hidden, weight = torch.randn(M, H).to(dtype), (torch.randn(C, H) / H**0.5).to(dtype)
    return hidden, weight, torch.randint(C, (M,)), torch.randn(C).to(dtype) if with_bias else None


def _run(f, hidden, weight, target, bias, class_weight, options, dtype):
    given = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    class_weight = None if class_weight is None else class_weight.to(dtype)
    loss = f(given[0], given[1], target, given[2], class_weight=class_weight, **options)
    grad = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return loss, *torch.autograd.grad(loss, [t for t in given if t is not None], grad)


def _compare(hidden, weight, target, bias=None, class_weight=None, **options):
    dtype = hidden.dtype
    args = (hidden, weight, target, bias, class_weight, options)
    actual = _run(fastlm.linear_cross_entropy, *args, dtype)
    truth, theirs = _run(_stock, *args, torch.float64), _run(_stock, *args, dtype)
    size = max(weight.shape[0], hidden.shape[0]) + hidden.shape[1]
    for a, t, s, name in zip(actual, truth, theirs, ("loss", "dhidden", "dweight", "dbias"), strict=False):
        assert a.dtype == dtype
        assert_as_close_as_torch(a, t, s, size, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("M", "H", "C", "memory", "options"), CASES, ids=str)
def test_parity(kernels, poisoned, M, H, C, memory, options, with_bias, dtype):
    options = dict(options)
    class_weight = (torch.rand(C) + 0.1).to(dtype) if options.pop("weighted", False) else None
    _compare(*_inputs(M, H, C, dtype, with_bias), class_weight, memory=memory, **options)


@pytest.mark.parametrize("ignored", [1, 15, 20])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignored_rows(poisoned, ignored, reduction):
    """Few are carried along, many are left out of the products, all leave a mean of nothing."""
    hidden, weight, target, bias = _inputs(20, 12, 2500, torch.float32, True)
    target[torch.randperm(20)[:ignored]] = -100
    hidden[target == -100] = torch.inf  # what they hold is nobody's business
    clean = torch.where((target == -100)[:, None], 0, hidden)
    for memory in (0.1, 1.0):
        options = {"reduction": reduction, "memory": memory}
        actual = _run(fastlm.linear_cross_entropy, clean, weight, target, bias, None, options, torch.float32)
        expected = _run(_stock, clean, weight, target, bias, None, options, torch.float32)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)
    if ignored > 2:
        loss = fastlm.linear_cross_entropy(hidden, weight, target, bias, reduction=reduction)
        torch.testing.assert_close(loss, expected[0], equal_nan=True)


def test_leading_dimensions_and_views():
    hidden = torch.randn(6, 3, 5).transpose(0, 1).requires_grad_()
    weight = torch.randn(5, 40).t().requires_grad_()
    target = torch.randint(40, (6, 3)).t()
    for reduction in ("none", "mean"):
        loss = fastlm.linear_cross_entropy(hidden, weight, target, reduction=reduction)
        expected = F.cross_entropy((hidden @ weight.t()).movedim(-1, 1), target, reduction=reduction)
        torch.testing.assert_close(loss, expected)
        for a, e in zip(
            torch.autograd.grad(loss.sum(), (hidden, weight)),
            torch.autograd.grad(expected.sum(), (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(a, e)
    assert fastlm.linear_cross_entropy(hidden[0, 0], weight, target[0, 0]).shape == ()


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Size of the largest tensor that any operator returns, views of the inputs left out by the caller's sizes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_never_holds_the_logits(reduction):
    M, H, C = 300, 4, 30000
    hidden, weight = torch.randn(M, H, requires_grad=True), torch.randn(C, H, requires_grad=True)
    with _Largest() as seen:
        fastlm.linear_cross_entropy(hidden, weight, torch.randint(C, (M,)), reduction=reduction).sum().backward()
    assert C * H <= seen.largest <= M * C / 10  # at least the weight's gradient


def _projection(M, H, C, memory, hold, dtype=torch.float32):
    from fastlm.ops._projection import Projection
    from fastlm.ops.cross_entropy import Options

    options = Options(-100, "mean", 0.0, torch.float32)
    target = torch.zeros(M, dtype=torch.long)
    tensors = (torch.zeros(M, H, dtype=dtype), torch.zeros(C, H, dtype=dtype), None, target, None)
    return Projection(_kernels, tensors, options, memory, hold)


@pytest.mark.parametrize(("M", "H", "memory"), [(64, 48, 0.1), (64, 4, 0.3), (8, 20, 0.1), (8, 6, 1.0), (40, 4, 0.9)])
def test_waiting_logits_lie_behind_the_gradients_written_before_them(M, H, memory):
    """In the weight's gradient, windows neither overlap nor start before earlier classes end; beside it, little."""
    C = 30000
    projection = _projection(M, H, C, memory, hold=True)
    start = projection.dweight.data_ptr()
    inside = {first: (place.data_ptr() - start) // 4 for first, place in projection.places.items()}
    inside = {first: at for first, at in inside.items() if 0 <= at < C * H}
    ends = {first: inside[first] + place.numel() for first, place in projection.places.items() if first in inside}
    longest = max(n for _, n in projection.windows)
    assert sum(n for first, n in projection.windows if first in inside) >= min(1, H / M) * C - 2 * longest
    assert all(at >= first * H for first, at in inside.items())
    assert all(ends[a] <= inside[b] for a, b in zip(sorted(inside), sorted(inside)[1:], strict=False))
    assert max(ends.values(), default=0) <= C * H
    beside = sum(place.numel() for first, place in projection.places.items() if first not in inside)
    assert beside + projection.scratch.numel() <= max(memory * M * (C + 2048), M * 2048)


@pytest.mark.parametrize(("M", "H"), [(64, 48), (1024, 768)])
def test_nothing_is_made_twice_where_all_logits_may_be_held(M, H):
    """Some in the weight's gradient, the others beside it: room for every window between the sweeps."""
    projection = _projection(M, H, 30000, 1.0, hold=True)
    assert list(projection.places) == [first for first, _ in projection.windows]


@pytest.mark.parametrize("ours", [False, True])
def test_the_wide_sum_of_a_narrow_gradient_counts(ours, monkeypatch):
    """In bf16, hidden's gradient is summed in fp32, of products in bf16 unless ours add to it: within a tenth."""
    monkeypatch.setattr("fastlm.ops._projection.leads", lambda dtype: ours)
    M, H, C = 1024, 768, 100000
    projection = _projection(M, H, C, 0.1, True, torch.bfloat16)
    start, end = projection.dweight.data_ptr(), projection.dweight.data_ptr() + 2 * C * H
    beside = sum(place.numel() for place in projection.places.values() if not start <= place.data_ptr() < end)
    assert beside > 0
    assert 2 * (beside + projection.scratch.numel()) + (4 if ours else 4 + 2) * M * H <= 2 * M * C / 10


@pytest.mark.parametrize(("M", "C", "memory"), [(64, 50257, 0.1), (64, 50257, 0.3), (8, 100, 0.1), (8, 6145, 1.0)])
def test_windows(M, C, memory):
    """Whole blocks, no gap, no more than allowed; the first one is the short one."""
    windows = _projection(M, 2, C, memory, hold=False).windows
    block = _kernels.CROSS_ENTROPY_BLOCK
    assert [a for a, _ in windows] == [0, *(a + n for a, n in windows[:-1])]
    assert sum(n for _, n in windows) == C
    assert all(a % block == 0 and n <= max(block, memory * C) for a, n in windows)
    assert all(windows[0][1] <= n + block for _, n in windows)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_same_bits(isa, threads, reduction):
    """Twice, and with the kernels on any number of threads; so few rows that the products keep to one."""
    hidden, weight, target, bias = _inputs(3, 5, 7000, torch.float32, True)
    options = {"reduction": reduction, "memory": 0.3}
    results = []
    for count in (1, 1, 2, 3):
        threads(count)
        results.append(_run(fastlm.linear_cross_entropy, hidden, weight, target, bias, None, options, torch.float32))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))


def test_nan_stays_in_its_row(kernels):
    hidden, weight, target, _ = _inputs(6, 8, 2200, torch.float32, False)
    clean = fastlm.linear_cross_entropy(hidden, weight, target, reduction="none")
    hidden[3, 2] = torch.nan
    hidden.requires_grad_()
    loss = fastlm.linear_cross_entropy(hidden, weight, target, reduction="none")
    (dhidden,) = torch.autograd.grad(loss.sum(), hidden)
    keep = [0, 1, 2, 4, 5]
    assert loss[3].isnan()
    assert dhidden[3].isnan().all()
    assert torch.equal(loss[keep], clean[keep])
    assert dhidden[keep].isfinite().all()


@pytest.mark.parametrize("offset", [1e4, -torch.inf])
def test_extreme_bias(kernels, offset):
    """Huge logits, and classes of probability 0."""
    hidden, weight, target, bias = _inputs(5, 8, 2100, torch.float32, True)
    bias[:2060] = offset
    target = target % 40 + 2060
    _compare(hidden, weight, target, bias)


def test_autocast():
    hidden, weight = torch.randn(7, 12, requires_grad=True), torch.randn(2300, 12, requires_grad=True)
    target = torch.randint(2300, (7,))
    with torch.autocast("cpu", torch.bfloat16):
        loss, stock = (f(hidden, weight, target) for f in (fastlm.linear_cross_entropy, _stock))
    assert loss.dtype == stock.dtype == torch.float32
    truth = _stock(hidden.bfloat16().double(), weight.bfloat16().double(), target)
    assert_as_close_as_torch(loss, truth, stock, 12, "loss")
    actual, theirs, expected = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, stock, truth))
    for a, s, e in zip(actual, theirs, expected, strict=True):
        assert a.dtype == torch.float32
        assert_as_close_as_torch(a.bfloat16(), e, s, 2300)


def test_scaled_and_retained_gradients():
    hidden, weight, target, bias = _inputs(6, 5, 50, torch.float32, True)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = fastlm.linear_cross_entropy(hidden, weight, target, bias)
    first = torch.autograd.grad(loss * 4, leaves, retain_graph=True)
    again = torch.autograd.grad(loss * 4, leaves, retain_graph=True)
    plain = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, again, plain, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c * 4)


def test_loss_scale_saves_small_fp16_gradients():
    """They are made again with the scale, where scaling what has already been rounded to nothing would lose them."""
    hidden, weight, bias = (
        torch.randn(2, 4).half(),
        torch.zeros(300, 4).half().requires_grad_(),
        torch.zeros(300).half(),
    )
    bias[2:] = -12  # p_c of 3e-6, where fp16's steps are 6e-8
    target = torch.tensor([0, 1])
    loss = fastlm.linear_cross_entropy(hidden, weight, target, bias)
    (got,) = torch.autograd.grad(loss * 1024, weight)
    doubled = [t.detach().double() for t in (hidden, weight, bias)]
    doubled[1].requires_grad_()
    truth = _stock(doubled[0], doubled[1], target, doubled[2])
    (expected,) = torch.autograd.grad(truth * 1024, doubled[1])
    torch.testing.assert_close(got.double()[2:], expected[2:], rtol=2e-3, atol=0)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_only_the_wanted_gradients(wanted, reduction):
    hidden, weight, target, bias = _inputs(4, 6, 30, torch.float32, True)
    leaves = [t.requires_grad_(w) for t, w in zip((hidden, weight, bias), wanted, strict=True)]
    fastlm.linear_cross_entropy(hidden, weight, target, bias, reduction=reduction).sum().backward()
    assert tuple(t.grad is not None for t in leaves) == wanted


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_gradcheck(backend, reduction, label_smoothing):
    args = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3), (5,))]
    target, class_weight = torch.tensor([3, -100, 0, 4]), torch.rand(5, dtype=torch.float64)

    def f(hidden, weight, bias):
        return fastlm.linear_cross_entropy(hidden, weight, target, bias, -100, reduction, label_smoothing, class_weight)

    with fastlm.backend(backend):
        assert torch.autograd.gradcheck(f, args)
        assert torch.autograd.gradgradcheck(f, args)


def test_class_probabilities():
    hidden, weight, _, bias = _inputs(4, 6, 9, torch.float32, True)
    target = torch.rand(4, 9).softmax(1)
    explanation = fastlm.explain(fastlm.linear_cross_entropy, hidden, weight, target)
    assert explanation.selected == "torch"
    assert "class probabilities" in explanation.reasons["cpu"]
    for backend in ("torch", "reference"):
        with fastlm.backend(backend):
            _compare(hidden, weight, target, bias, label_smoothing=0.1)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_registered_op(reduction):
    hidden, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((4, 3), (5, 3), (5,)))
    target, class_weight = torch.tensor([1, -100, 0, 4]), torch.rand(5)
    options = (-100, reduction, 0.1, torch.float32, 0.1)
    op = torch.ops.fastlm.linear_cross_entropy
    torch.library.opcheck(op, (hidden, weight, bias, target, class_weight, *options, [True] * 3))
    torch.library.opcheck(op, (hidden, weight, None, target, None, *options, [True, True, False]))
    expected = _stock(hidden, weight, target, bias, class_weight, reduction=reduction, label_smoothing=0.1)
    for backend in ("cpu", "reference"):
        with fastlm.backend(backend):
            loss = op(hidden, weight, bias, target, class_weight, *options, [True] * 3)[0]
            got = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
        torch.testing.assert_close(loss, expected)
        truth = torch.autograd.grad(expected.sum(), (hidden, weight, bias), retain_graph=True)
        for a, e in zip(got, truth, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compile(reduction):
    hidden, weight = torch.randn(2, 3, 6, requires_grad=True), torch.randn(40, 6, requires_grad=True)
    target = torch.randint(40, (2, 3))

    def f(hidden, weight):
        return 3 * fastlm.linear_cross_entropy(hidden * 2, weight, target, reduction=reduction).sum()

    eager, compiled = f(hidden, weight), torch.compile(f, fullgraph=True)(hidden, weight)
    torch.testing.assert_close(compiled, eager)
    for a, e in zip(
        torch.autograd.grad(compiled, (hidden, weight)), torch.autograd.grad(eager, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, e)


def test_func_transforms():
    hidden, weight, target, _ = _inputs(4, 6, 11, torch.float32, False)
    got = torch.func.grad(fastlm.linear_cross_entropy)(hidden, weight, target)
    hidden.requires_grad_()
    (expected,) = torch.autograd.grad(fastlm.linear_cross_entropy(hidden, weight, target), hidden)
    torch.testing.assert_close(got, expected)


L = fastlm.linear_cross_entropy
T = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda h, w: L(h, w, torch.tensor([0, 9])), ValueError, r"target\[1\] is 9, expected 0 to 8"),
        (lambda h, w: L(h, w, T[:1]), ValueError, r"target has shape \(1,\), expected \(2,\)"),
        (lambda h, w: L(h, w[:, :3], T), ValueError, r"weight has shape \(9, 3\), expected \(C, 4\)"),
        (lambda h, w: L(h, w[:0], T), IndexError, "out of bounds"),
        (lambda h, w: L(h, w, T, torch.ones(8)), ValueError, r"bias has shape \(8,\), expected \(9,\)"),
        (lambda h, w: L(h, w.bfloat16(), T), TypeError, "weight has dtype torch.bfloat16, expected torch.float32"),
        (lambda h, w: L(h.long(), w, T), TypeError, "hidden has dtype torch.int64"),
        (lambda h, w: L(h, w.to("meta"), T), ValueError, "weight is on meta"),
        (lambda h, w: L(h[0, 0], w, T), ValueError, "hidden has no dimensions"),
        (lambda h, w: L(h, w, T, class_weight=torch.ones(4)), ValueError, r"class_weight has shape \(4,\)"),
        (lambda h, w: L(h, w, T, reduction="avg"), ValueError, "linear_cross_entropy: reduction is 'avg'"),
        (lambda h, w: L(h, w, T, label_smoothing=-0.1), ValueError, "label_smoothing is -0.1"),
        (lambda h, w: L(h, w, T, memory=0), ValueError, "memory is 0"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 4), torch.randn(9, 4))
