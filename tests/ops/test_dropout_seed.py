"""Dropout whose seed lies in memory, as a CUDA graph's does: the same masks, and others once the memory changes."""

import pytest
import torch

import fastlm
from conftest import CUDA, TRITON
from fastlm._core import dropout as _dropout
from fastlm.errors import BackendError

on_cuda = pytest.mark.parametrize("kernels", [CUDA], indirect=True)
SEEDS = 0x1234567890ABCDEF, -7


def _leaves(*shapes):
    return [torch.randn(*shape).requires_grad_() for shape in shapes]


def _attention(T, S, mask=None, **options):
    q, k, v = _leaves((1, 2, T, 16), (1, 2, S, 16), (1, 2, S, 16))
    inputs = [q, k, v] if mask is None else [q, k, v, *_leaves(mask)]
    return (lambda *given: fastlm.scaled_dot_product_attention(*given, dropout_p=0.3, **options)), inputs


def _attention_varlen():
    cu = torch.tensor([0, 5, 40], dtype=torch.int32)
    return (lambda q, k, v: fastlm.attention_varlen(q, k, v, cu, dropout_p=0.3)), _leaves(*[(40, 2, 16)] * 3)


CASES = {
    "bias_gelu": lambda: ((lambda x, b: fastlm.bias_gelu(x, b, dropout_p=0.3)), _leaves((5, 40), (40,))),
    "add_layer_norm": lambda: (
        (lambda *given: fastlm.add_layer_norm(*given, dropout_p=0.3)),
        _leaves((5, 40), (5, 40), (40,), (40,)),
    ),
    "add_layer_norm, wide": lambda: (
        (lambda *given: fastlm.add_layer_norm(*given, dropout_p=0.3)),
        _leaves((2, 17000), (2, 17000), (17000,), (17000,)),
    ),
    "attention": lambda: _attention(40, 50),
    "attention, few queries": lambda: _attention(2, 600),
    "attention, gradient of a mask": lambda: _attention(40, 50, (40, 50)),
    "attention_varlen": _attention_varlen,
}


def _step(op, inputs):
    """Outputs and gradients, the latter made twice: nothing but the seed decides which elements are dropped."""
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.linspace(-1, 1, o.numel()).view(o.shape) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def _check(case, monkeypatch):
    op, inputs = case
    memory = torch.empty((), dtype=torch.int64)
    results = []
    for seed in SEEDS:
        memory.fill_(seed)
        both = []
        for drawn in (seed, _dropout.DeviceSeed(memory)):
            monkeypatch.setattr(_dropout, "draw_seed", lambda device, drawn=drawn: drawn)
            both.append(_step(op, inputs))
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
        results.append(both[0])
    assert not torch.equal(results[0][0], results[1][0])


@on_cuda
@pytest.mark.parametrize("name", CASES)
def test_it_drops_the_same(kernels, monkeypatch, name):
    _check(CASES[name](), monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_does_too(monkeypatch, name):
    with fastlm.backend("reference"):
        _check(CASES[name](), monkeypatch)


@on_cuda
def test_the_backward_pass_reads_what_the_forward_pass_read(kernels, monkeypatch):
    """The memory of a captured seed keeps its value from one to the other, and stays alive."""
    x, bias = torch.full((5, 80), 64.0, requires_grad=True), torch.zeros(80)
    monkeypatch.setattr(_dropout, "draw_seed", lambda device: _dropout.DeviceSeed(torch.tensor(99)))
    y = fastlm.bias_gelu(x, bias, dropout_p=0.5)
    torch.full((1000,), 7)  # would take the place of freed memory
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y != 0, dx != 0)
    assert torch.equal(y != 0, _dropout.factors(5, 80, 0.5, 99, torch.float32, x.device) != 0)


@pytest.mark.parametrize("kernels", [TRITON], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_triton_refuses_it(kernels, monkeypatch, name):
    monkeypatch.setattr(_dropout, "draw_seed", lambda device: _dropout.DeviceSeed(torch.tensor(99)))
    op, inputs = CASES[name]()
    with pytest.raises(BackendError, match="a CUDA graph would repeat one mask at every replay"):
        op(*inputs)


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_a_captured_seed_is_drawn_on_the_gpu(capturing, monkeypatch):
    """By an operator that the graph repeats; elsewhere a number is drawn, which costs no launch."""
    drawn = []
    monkeypatch.setattr(_dropout, "_random_seed", lambda device: drawn.append(device) or torch.tensor(5))
    seed = _dropout.draw_seed(torch.device("cuda", 1))
    assert isinstance(seed, _dropout.DeviceSeed)
    assert (seed.tensor.item(), drawn) == (5, [torch.device("cuda", 1)])


@pytest.mark.parametrize("name", CASES)
def test_what_runs_on_the_cpu_meanwhile_is_no_part_of_the_graph(capturing, monkeypatch, name):
    op, inputs = CASES[name]()
    torch.manual_seed(0)
    during = _step(op, inputs)
    monkeypatch.undo()
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(during, _step(op, inputs), strict=True))


def test_a_graph_of_a_compiled_model_is_refused(capturing):
    """Inductor draws the seed on the CPU, before the graph is replayed."""
    with pytest.raises(BackendError, match="capture the model before it is compiled"):
        _dropout.traced_seed(torch.tensor(5), torch.device("cuda"))
    assert _dropout.traced_seed(torch.tensor(5), torch.device("cpu")) == 5
    assert _dropout.traced_seed(None, torch.device("cuda")) == 0
