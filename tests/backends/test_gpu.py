"""On a GPU alone: repeated backward passes, no waiting for the device, CUDA graphs. `make gpu-check` runs this."""

import pytest
import torch

import fastlm
from fastlm._core import registry
from fastlm.backends import cuda as _native_cuda
from fastlm.errors import BackendError
from samples import CASES as SAMPLES

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
M, N, C = 512, 1000, 5000


def _inputs(*shapes, dtype=torch.bfloat16):
    return [torch.randn(*shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]


def _with_target(op, *shapes):
    """(function of the other inputs, inputs) of an op that takes a target."""
    target = torch.randint(C, (M,), device="cuda")
    return (lambda first, *rest: op(first, *rest, target)), _inputs(*shapes)


def _rotary():
    angle = torch.arange(128, device="cuda")[:, None] / 1e4 ** (torch.arange(32, device="cuda") / 32)
    cos, sin = angle.cos(), angle.sin()
    return (lambda x: fastlm.rotary(x, cos, sin)), _inputs((2, 4, 128, 64))


def _attention(queries, keys, size=64, **options):
    """Grouped heads, causal, on (B, H, T, D) = (2, 8, queries, size)."""
    options = {"is_causal": True, "enable_gqa": True, **options}
    inputs = _inputs((2, 8, queries, size), (2, 2, keys, size), (2, 2, keys, size))
    return (lambda q, k, v: fastlm.scaled_dot_product_attention(q, k, v, **options)), inputs


def _attention_bias():
    """A bias with its gradient and dropout, the same in every run."""
    inputs = _inputs((2, 4, 300, 64), (2, 4, 300, 64), (2, 4, 300, 64), (1, 4, 300, 300))

    def attend(q, k, v, bias):
        torch.default_generator.manual_seed(3)
        return fastlm.scaled_dot_product_attention(q, k, v, bias, 0.1, return_lse=True)

    return attend, inputs


def _attention_varlen():
    cu = torch.tensor([0, 5, 300, 300, 700], dtype=torch.int32, device="cuda")
    inputs = _inputs((700, 8, 64), (700, 2, 64), (700, 2, 64))
    return (lambda q, k, v: fastlm.attention_varlen(q, k, v, cu, is_causal=True)), inputs


CASES = {
    "attention": lambda: _attention(700, 700),
    "attention, large heads": lambda: _attention(700, 700, 128),
    "attention, window, softcap": lambda: _attention(300, 500, window=(100, None), softcap=20.0),
    "attention, bias, dropout": _attention_bias,
    "attention, few queries": lambda: _attention(4, 3000, is_causal=False),
    "attention_varlen": _attention_varlen,
    "layer_norm": lambda: ((lambda x, w, b: fastlm.layer_norm(x, N, w, b)), _inputs((M, N), (N,), (N,))),
    "layer_norm, wide": lambda: (
        (lambda x, w, b: fastlm.layer_norm(x, 70000, w, b)),
        _inputs((8, 70000), (70000,), (70000,)),
    ),
    "add_layer_norm": lambda: (
        (lambda x, r, w, b: fastlm.add_layer_norm(x, r, w, b)),
        _inputs((M, N), (M, N), (N,), (N,)),
    ),
    "rms_norm": lambda: ((lambda x, w: fastlm.rms_norm(x, N, w)), _inputs((M, N), (N,))),
    "add_rms_norm": lambda: (fastlm.add_rms_norm, _inputs((M, N), (M, N), (N,))),
    "gelu": lambda: (fastlm.gelu, _inputs((M, N))),
    "bias_gelu": lambda: ((lambda x, b: fastlm.bias_gelu(x, b, "tanh")), _inputs((M, N), (N,))),
    "swiglu": lambda: (fastlm.swiglu, _inputs((M, N), (M, N))),
    "rotary": _rotary,
    "cross_entropy": lambda: _with_target(fastlm.cross_entropy, (M, C)),
    "linear_cross_entropy": lambda: _with_target(fastlm.linear_cross_entropy, (M, 64), (C, 64)),
}


DROPOUT = "attention, bias, dropout"
OF = {"attention": "scaled_dot_product_attention"}  # cases that are not named after their op


def _sample(case):
    """An op's sample on the GPU, its dropout's mask the same in every run."""
    leaves, others = case.leaves("cuda", torch.bfloat16)

    def run(*tensors):
        torch.default_generator.manual_seed(3)
        return tuple(case.run(dict(zip(leaves, tensors, strict=True)), others))

    return run, list(leaves.values())


def _served(case, backend):
    """Whether the backend takes the sample, on any GPU that it takes at all."""
    if case.op.backend(backend) is None or not case.keeps_inputs:
        return False
    with fastlm.backend(backend):
        reason = fastlm.explain(case.op.function, **case.arguments("cuda", torch.bfloat16)).reasons[backend]
    return reason == "selected" or (backend == "cuda" and _native_cuda.missing_reason is not None)


PARAMS = [
    (backend, name)
    for backend in ("triton", "cuda")
    for name in CASES
    if registry.get(OF.get(op := name.partition(",")[0], op)).backend(backend)
]
PARAMS += [(b, f"sample of {name}") for b in ("triton", "cuda") for name, case in SAMPLES.items() if _served(case, b)]
DROPPED = {DROPOUT, *(f"sample of {name}" for name, case in SAMPLES.items() if "dropout_p" in case.arguments("meta"))}
CASES |= {f"sample of {name}": (lambda case=case: _sample(case)) for name, case in SAMPLES.items()}


@pytest.fixture(params=PARAMS, ids=" ".join, autouse=True)
def case(request):
    """(function, inputs), on either backend that has kernels."""
    backend, name = request.param
    if backend == "cuda" and _native_cuda.missing_reason:
        pytest.skip(_native_cuda.missing_reason)
    with fastlm.backend(backend):
        yield CASES[name]()


def _step(function, inputs):
    """Outputs and the gradients of all inputs."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return (*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs]))


def test_a_hundred_backward_passes_have_the_same_bits(case):
    first = _step(*case)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, _step(*case), strict=True))


def test_nothing_waits_for_the_device(case):
    _step(*case)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream(case):
    """Kernels run in the order of the current stream: after a long one there, and before what reads their results."""
    expected = _step(*case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    function, inputs = case
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = [(t.detach() * 2 / 2).requires_grad_() for t in inputs]
        actual = [t.clone() for t in _step(function, late)]
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device(request):
    """Tensors of the second device, while the first is the current one."""
    _, name = request.node.callspec.params["case"]
    made = []
    for device in (0, 1):
        with torch.cuda.device(device):
            torch.manual_seed(0)
            made.append(CASES[name]())
    expected, actual = (_step(*case) for case in made)
    assert all(b.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(expected, actual, strict=True))


def _check_masks(graph, captured, v):
    """Each replay drops other weights, the same ones in both directions: sum(out) = sum(dv v) for dout = 1."""
    out, _, _, _, dv, _ = captured
    runs = []
    for _ in range(2):
        graph.replay()
        runs.append(out.clone())
        assert abs((dv.double() * v.double()).sum() - out.double().sum()) < 4  # rounding: 1, another mask: 20
    assert not torch.equal(*runs)


def test_cuda_graph(case, request):
    """What is captured once and replayed on other inputs is what runs without a graph."""
    function, inputs = case
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _step(function, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    backend, name = request.node.callspec.params["case"]
    if backend == "triton" and name in DROPPED:
        with pytest.raises(BackendError, match="a CUDA graph would repeat one mask"), torch.cuda.graph(graph):
            _step(function, inputs)
        return
    with torch.cuda.graph(graph):
        captured = _step(function, inputs)
    if name == DROPOUT:
        _check_masks(graph, captured, inputs[2])
    if name in DROPPED:  # each replay drops others
        return
    with torch.no_grad():
        for t in inputs:
            t.copy_(torch.randn_like(t))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, _step(function, inputs), strict=True))
