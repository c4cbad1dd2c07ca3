"""cross_entropy: parity with the fp64 reference, gradients of both orders, edges, errors."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import DTYPES
from fastlm.backends.cpu import cross_entropy as _kernels
from fastlm.ops import cross_entropy as module
from tolerances import assert_as_close_as_torch

# (rows, classes): one class, odd and prime tails around every vector width, one block and several with a tail,
# few rows of many classes (shared out by blocks), more rows than that, and an empty batch.
SHAPES = [(3, 1), (5, 7), (13, 133), (9, 2048), (2, 5003), (40, 4099), (0, 17)]
OPTIONS = [
    {},
    {"reduction": "sum", "weighted": True},
    {"reduction": "none", "label_smoothing": 0.1},
    {"label_smoothing": 0.2, "weighted": True},
]
CASES = [(*shape, OPTIONS[i % 4]) for i, shape in enumerate(SHAPES)] + [(11, 35, options) for options in OPTIONS]


def _inputs(M, C, dtype, ignored=2):
    x = (torch.randn(M, C) * 3).to(dtype).requires_grad_()
    target = torch.randint(C, (M,))
    target[1 : 1 + ignored] = -100
    return x, target


def _run(f, x, target, weight, options, dtype):
    """Loss and gradient of f in `dtype`, for a fixed incoming gradient."""
    x = x.detach().to(dtype).requires_grad_()
    weight = None if weight is None else weight.to(dtype)
    loss = f(x, target, weight, **options)
    grad = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return loss, torch.autograd.grad(loss, x, grad)[0]


def _compare(x, target, weight=None, **options):
    dtype, C = x.dtype, x.shape[min(1, x.dim() - 1)]
    actual = _run(fastlm.cross_entropy, x, target, weight, options, dtype)
    truth = _run(F.cross_entropy, x, target, weight, options, torch.float64)
    theirs = _run(F.cross_entropy, x, target, weight, options, dtype)
    assert actual[0].dtype == dtype
    for a, t, s, name in zip(actual, truth, theirs, ("loss", "gradient"), strict=True):
        assert_as_close_as_torch(a, t, s, C, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "C", "options"), CASES, ids=str)
def test_parity(kernels, poisoned, M, C, options, dtype):
    options = dict(options)
    weight = (torch.rand(C) + 0.1).to(dtype) if options.pop("weighted", False) else None
    _compare(*_inputs(M, C, dtype), weight, **options)


@pytest.mark.parametrize("shape", [(19,), (4, 19), (3, 19, 5), (2, 7, 3, 4), (2, 3000, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_layouts(poisoned, shape, reduction):
    x = torch.randn(shape)
    C = shape[min(1, len(shape) - 1)]
    target = torch.randint(C, shape[:1] + shape[2:] if len(shape) > 1 else ())
    _compare(x, target, torch.rand(C), reduction=reduction)
    _compare(x.transpose(0, -1).contiguous().transpose(0, -1), target, label_smoothing=0.1, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_integer_targets(dtype):
    x, target = torch.randn(6, 11), torch.randint(11, (6,))
    assert torch.equal(fastlm.cross_entropy(x, target.to(dtype)), fastlm.cross_entropy(x, target))


def test_ignore_index_may_be_a_class(kernels):
    x, target = torch.randn(6, 5), torch.tensor([0, 3, 2, 3, 4, 1])
    _compare(x, target, ignore_index=3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counts(kernels, reduction):
    """All targets ignored, or none there: the mean of nothing is NaN, gradients are 0."""
    for M in (0, 4):
        x = torch.randn(M, 9, requires_grad=True)
        target = torch.full((M,), -100)
        loss = fastlm.cross_entropy(x, target, reduction=reduction)
        torch.testing.assert_close(loss, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
        (dx,) = torch.autograd.grad(loss.sum(), x)
        assert torch.equal(dx, torch.zeros(M, 9))


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_huge_logits(kernels, offset, label_smoothing):
    """The maximum is subtracted before anything is rounded: an offset of every logit costs nothing."""
    x = torch.randn(4, 3001) + offset
    _compare(x, torch.randint(3001, (4,)), label_smoothing=label_smoothing)
    assert torch.equal(fastlm.cross_entropy(x, torch.arange(4)), fastlm.cross_entropy(x - offset, torch.arange(4)))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_infinite_logits(kernels, label_smoothing):
    """-inf is a class of probability 0; a row of nothing else, or with +inf, has no softmax."""
    x = torch.randn(6, 2100)
    x[0, 5:2060] = -torch.inf  # the whole first block but five
    x[1, 7] = -torch.inf  # the true class
    x[2] = -torch.inf
    x[3, 2090] = torch.inf
    x[4, :2048] = -torch.inf
    target = torch.tensor([3, 7, 0, 1, 2095, 8])
    _compare(x, target, reduction="none", label_smoothing=label_smoothing)


def test_certain_class_keeps_its_digits(kernels):
    """1 - p_y is summed from the others, not subtracted from 1: right to an ULP or so where p_y rounds to 1."""
    x = torch.randn(3, 300)
    x[:, 4] = torch.tensor([30.0, 60.0, 18.0])
    x.requires_grad_()
    loss = fastlm.cross_entropy(x, torch.full((3,), 4), reduction="none")
    (dx,) = torch.autograd.grad(loss.sum(), x)
    others = torch.logsumexp(torch.cat([x[:, :4], x[:, 5:]], 1).double(), 1) - x[:, 4].double()
    torch.testing.assert_close(loss.double(), torch.log1p(others.exp()), rtol=1e-6, atol=0)
    torch.testing.assert_close(dx[:, 4].double(), -torch.sigmoid(others), rtol=1e-6, atol=0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_nan_stays_in_its_row(kernels, label_smoothing):
    x, target = torch.randn(9, 4100), torch.randint(4100, (9,))
    target[7] = -100
    results = []
    for bad in (False, True):
        if bad:
            x[4, 4098] = x[5, target[5]] = x[7, 3] = torch.nan
        leaf = x.clone().requires_grad_()
        loss = fastlm.cross_entropy(leaf, target, reduction="none", label_smoothing=label_smoothing)
        results.append((loss, torch.autograd.grad(loss.sum(), leaf)[0]))
    keep = [0, 1, 2, 3, 6, 7, 8]  # 7 is ignored: what it holds is nobody's business
    for clean, got in zip(*results, strict=True):
        assert got[[4, 5]].isnan().all()
        assert torch.equal(got[keep], clean[keep])


@pytest.mark.parametrize(("M", "C"), [(3, 9001), (61, 2500)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_for_any_thread_count_and_batch(isa, threads, M, C, reduction):
    x, target, g = torch.randn(M, C), torch.randint(C, (M,)), torch.randn(M)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        leaf = x.clone().requires_grad_()
        loss = fastlm.cross_entropy(leaf, target, reduction=reduction, label_smoothing=0.1)
        (dx,) = torch.autograd.grad(loss, leaf, g if reduction == "none" else None)
        results.append((loss, dx))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    if reduction == "none":
        alone = fastlm.cross_entropy(x[2:3], target[2:3], reduction=reduction, label_smoothing=0.1)
        assert torch.equal(alone, results[0][0][2:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows_of_columns_fold_to_the_same_bits(isa, poisoned, dtype):
    M, C, block = 5, 7001, _kernels.CROSS_ENTROPY_BLOCK
    x, target = torch.randn(M, C).to(dtype), torch.randint(C, (M,))
    weight = torch.rand(C)
    loss, stats, dx = _kernels.cross_entropy_fwd(x, target, weight, -100, 0.1, scale=0.5)
    states = torch.empty(M, 5, dtype=loss.dtype)
    edges = [0, block, 3 * block, C]
    windows = [(a, x[:, a:b].contiguous()) for a, b in itertools.pairwise(edges)]
    for first, part in windows:
        _kernels.cross_entropy_update(part, target, weight, states, first, C, -100, 0.1)
    folded, folded_stats = _kernels.cross_entropy_finish(states, target, weight, C, -100, 0.1)
    assert torch.equal(loss, folded)
    assert torch.equal(stats, folded_stats)
    for first, part in windows:  # in place
        got = _kernels.cross_entropy_bwd(part, target, weight, stats, 0.5, -100, 0.1, part, first, C)
        assert torch.equal(got, dx[:, first : first + part.shape[1]])


def test_large_gradient_goes_past_the_caches(isa):
    """Above 4 Mi elements the stores are another kind; row starts are aligned to nothing."""
    x = torch.randn(90, 50257)
    target = torch.randint(50257, (90,))
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(fastlm.cross_entropy(leaf, target, reduction="sum"), leaf)
    rows = [0, 1, 44, 89]
    small = x[rows].clone().requires_grad_()
    (expected,) = torch.autograd.grad(fastlm.cross_entropy(small, target[rows], reduction="sum"), small)
    assert torch.equal(dx[rows], expected)
    assert dx.isfinite().all()


def test_the_guess_of_the_incoming_gradient_changes_no_bit():
    x, target = torch.randn(7, 50), torch.randint(50, (7,))

    def gradient(expected, factor):
        module._expected[0] = expected
        leaf = x.clone().requires_grad_()
        (fastlm.cross_entropy(leaf, target) * factor).backward()
        return leaf.grad

    for factor in (1.0, 0.25, 65536.0):
        assert torch.equal(gradient(factor, factor), gradient(3.0, factor))
    module._expected[0] = 1.0
    assert gradient(1.0, math.nan).isnan().all()


def test_a_retained_graph_gives_new_tensors():
    x = torch.randn(4, 9, requires_grad=True)
    loss = fastlm.cross_entropy(x, torch.arange(4))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(second, kept)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_backward(kernels, poisoned, reduction):
    x, target = torch.randn(6, 77, requires_grad=True), torch.randint(77, (6,))
    expected = torch.autograd.grad(fastlm.cross_entropy(x, target, reduction=reduction).sum(), x)[0]
    logits = x * 1
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    before = logits.detach().clone()
    loss = fastlm.cross_entropy(logits, target, reduction=reduction, inplace_backward=True)
    assert torch.equal(logits, before)
    loss.sum().backward(retain_graph=True)
    assert torch.equal(x.grad, expected)
    assert seen == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_loss_dtype_under_autocast():
    x, target = torch.randn(4, 9).bfloat16().requires_grad_(), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = fastlm.cross_entropy(x, target), F.cross_entropy(x, target)
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_gradcheck(backend, reduction, label_smoothing):
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    target, weight = torch.tensor([3, -100, 0, 6]), torch.rand(7, dtype=torch.float64)

    def f(x):
        return fastlm.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=label_smoothing)

    with fastlm.backend(backend):
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_class_probabilities(backend, reduction):
    x, target, weight = torch.randn(4, 7, 2), torch.rand(4, 7, 2).softmax(1), torch.rand(7)
    explanation = fastlm.explain(fastlm.cross_entropy, x, target)
    assert explanation.selected == "torch"
    assert "class probabilities" in explanation.reasons["cpu"]
    with fastlm.backend(backend):
        _compare(x, target, weight, reduction=reduction, label_smoothing=0.1)
    with fastlm.backend("cpu"), pytest.raises(fastlm.BackendError, match="class probabilities"):
        fastlm.cross_entropy(x, target)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference_and_torch_backends(options):
    options = dict(options)
    weight = torch.rand(13) if options.pop("weighted", False) else None
    for backend in ("reference", "torch"):
        with fastlm.backend(backend):
            _compare(*_inputs(6, 13, torch.float32), weight, **options)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_registered_op(reduction):
    x, target, weight = torch.randn(4, 5, requires_grad=True), torch.tensor([1, -100, 0, 4]), torch.rand(5)
    for args in [
        (x, target, weight, -100, reduction, 0.1, torch.float32),
        (x.detach().bfloat16(), target, None, -100, reduction, 0.0, torch.float32),
    ]:
        torch.library.opcheck(torch.ops.fastlm.cross_entropy, args)
    for backend in ("cpu", "reference"):
        with fastlm.backend(backend):
            loss, _ = torch.ops.fastlm.cross_entropy(x, target, weight, -100, reduction, 0.1, torch.float32)
            (dx,) = torch.autograd.grad(loss.sum(), x)
        expected = F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=0.1)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), x)[0])


def test_registered_op_refuses_a_second_derivative():
    x = torch.randn(4, 5, requires_grad=True)
    loss, _ = torch.ops.fastlm.cross_entropy(x, torch.arange(4), None, -100, "mean", 0.0, torch.float32)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="cross_entropy_backward"):
        g.square().sum().backward()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compile(reduction):
    x, target = torch.randn(3, 11, 4, requires_grad=True), torch.randint(11, (3, 4))

    def f(x):
        return fastlm.cross_entropy(x * 2, target, reduction=reduction, label_smoothing=0.1).sum()

    eager, compiled = f(x), torch.compile(f, fullgraph=True)(x)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, x), torch.autograd.grad(eager, x))


def test_func_transforms():
    x, target = torch.randn(4, 6), torch.randint(6, (4,))
    got = torch.func.vmap(torch.func.grad(fastlm.cross_entropy))(x, target)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(fastlm.cross_entropy(x, target, reduction="sum"), x)
    torch.testing.assert_close(got, expected)


T = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fastlm.cross_entropy(x, torch.tensor([0, 8])), ValueError, r"target\[1\] is 8, expected 0 to 7"),
        (lambda x: fastlm.cross_entropy(x, torch.tensor([-1, 0])), ValueError, r"target\[0\] is -1"),
        (
            lambda x: fastlm.cross_entropy(x, torch.tensor([0])),
            ValueError,
            r"shape \(1,\), expected \(2,\) for class ind",
        ),
        (
            lambda x: fastlm.cross_entropy(x, torch.rand(2, 7)),
            ValueError,
            r"\(2, 7\), expected \(2, 8\) for class prob",
        ),
        (lambda x: fastlm.cross_entropy(x, T.bool()), TypeError, "target has dtype torch.bool"),
        (lambda x: fastlm.cross_entropy(x, T.to("meta")), ValueError, "target is on meta"),
        (lambda x: fastlm.cross_entropy(x.long(), T), TypeError, "input has dtype torch.int64"),
        (lambda x: fastlm.cross_entropy(x[0, 0], T), ValueError, "input has no dimensions"),
        (lambda x: fastlm.cross_entropy(x[:, :0], T), IndexError, "out of bounds"),
        (lambda x: fastlm.cross_entropy(x, T, torch.ones(3)), ValueError, r"weight has shape \(3,\), expected \(8,\)"),
        (lambda x: fastlm.cross_entropy(x, T, torch.ones(8).long()), TypeError, "weight has dtype torch.int64"),
        (lambda x: fastlm.cross_entropy(x, T, torch.ones(8, device="meta")), ValueError, "weight is on meta"),
        (lambda x: fastlm.cross_entropy(x, T, torch.ones(8, requires_grad=True)), ValueError, "requires a gradient"),
        (lambda x: fastlm.cross_entropy(x, T, reduction="avg"), ValueError, "reduction is 'avg', expected one of none"),
        (lambda x: fastlm.cross_entropy(x, T, label_smoothing=1.5), ValueError, "label_smoothing is 1.5"),
        (
            lambda x: fastlm.cross_entropy(x.requires_grad_(), T, inplace_backward=True),
            ValueError,
            "input is a leaf that requires a gradient",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 8))
