"""The CUDA kernels on the emulated GPU: what is their own, and that the emulation catches mistakes.

The op test files run the shared parity cases on them. With a GPU, the kernels' tests run on it instead.
"""

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import CUDA
from fastlm._core import dispatch as _dispatch
from fastlm._core import dropout as _dropout
from fastlm._core.architecture import SM90, parse
from fastlm.backends import cuda as _native_cuda
from fastlm.backends.cuda.gelu import gelu_fwd
from fastlm.ops.layer_norm import add_layer_norm_ref
from tolerances import assert_as_close_as_torch

on_cuda = pytest.mark.parametrize("kernels", [CUDA], indirect=True)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (
            "missing_barrier",
            "96 threads, the first of them 32, have ended; 32 threads, the first of them 0, wait at barrier 0",
        ),
        ("no_barrier", "unset values"),
        ("write_past_the_end", "thread 127: an access of 4 bytes out of bounds, at 512 of a buffer of 512 bytes"),
        ("read_before_the_start", "out of bounds, at -4 of a buffer of 512 bytes"),
        ("misaligned_load", "a load at a misaligned address"),
        ("shared_overflow", "wrote outside of its shared memory"),
        ("missing_wait", "unset values"),
        ("divergent_shuffle", "while others of its group wait at"),
        ("half_a_warp", "wait at shuffle"),
    ],
)
def test_a_mistake_is_caught(emulation, kernel, said, seed):
    emulation.set_order(seed)
    assert said in emulation.fault(kernel)


def test_a_right_kernel_is_not_blamed(emulation):
    assert emulation.fault("right") == ""


def test_dependence_on_the_order_of_blocks_shows(emulation):
    said = set()
    for seed in range(4):
        emulation.set_order(seed)
        said.add(emulation.fault("depends_on_block_order"))
    assert len(said) > 1


def test_any_order_gives_the_same_bits(emulation):
    x, residual = (torch.randn(37, 48).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(48).requires_grad_() for _ in range(2))
    inputs, g = (x, residual, weight, bias), torch.randn(37, 48)

    def run():
        torch.manual_seed(4)
        y, z = fastlm.add_layer_norm(*inputs, dropout_p=0.3)
        h = fastlm.bias_gelu(fastlm.rms_norm(y, 48, weight), bias, dropout_p=0.2)
        return (y, z, h, *torch.autograd.grad(h, inputs, g))

    results = []
    with fastlm.backend("cuda"):
        for seed in (0, 1, 2):
            emulation.set_order(seed)
            results.append(run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _agrees(op, inputs, truth, size):
    """Outputs and gradients of op(*inputs) against truth(*inputs) in fp64."""
    outputs = op(*inputs)
    doubled = [t.detach().double().requires_grad_() for t in inputs]
    expected = truth(*doubled)
    for a, t in zip(outputs, expected, strict=True):
        assert_as_close_as_torch(a, t, None, size)
    grads = [torch.randn_like(o) for o in outputs]
    actual = torch.autograd.grad(outputs, inputs, grads)
    expected = torch.autograd.grad(expected, doubled, [g.double() for g in grads])
    for a, e in zip(actual, expected, strict=True):
        assert_as_close_as_torch(a, e, None, size, f"gradient of shape {tuple(a.shape)}")


def _leaves(*shapes, mean=0.0):
    return [torch.randn(*shape).add(mean).requires_grad_() for shape in shapes]


# Block a row; a cluster of two and of four; longer than a cluster holds; and odd ones that vectors don't fit.
@on_cuda
@pytest.mark.parametrize("N", [1024, 8208, 16400, 66000, 8203])
def test_layer_norm_of_wide_rows(kernels, poisoned, N):
    def truth(*inputs):
        return add_layer_norm_ref(*inputs, 1e-5, 0.2, seed)

    def op(*inputs):
        torch.manual_seed(5)
        return fastlm.add_layer_norm(*inputs, dropout_p=0.2)

    inputs = _leaves((3, N), (3, N), (N,), (N,), mean=100.0)
    torch.manual_seed(5)
    seed = _dropout.draw_seed()
    _agrees(op, inputs, truth, N)


@on_cuda
@pytest.mark.parametrize("N", [1024, 8208, 66000, 8203])
def test_rms_norm_of_wide_rows(kernels, poisoned, N):
    def truth(x, residual, weight):
        return F.rms_norm(x + residual, (N,), weight, torch.finfo(torch.float32).eps), x + residual

    _agrees(fastlm.add_rms_norm, _leaves((3, N), (3, N), (N,)), truth, N)


@pytest.mark.parametrize(("architecture", "N"), [(80, 8208), (86, 8192)])
def test_wide_rows_on_smaller_gpus(emulation, poisoned, architecture, N):
    """sm_80 has no clusters, sm_86 less shared memory: rows that need either are gone over several times."""
    emulation.set_device(architecture=architecture)
    with fastlm.backend("cuda"):
        _agrees(
            lambda *args: (fastlm.layer_norm(args[0], N, *args[1:]),),
            _leaves((3, N), (N,), (N,)),
            lambda *args: (F.layer_norm(args[0], (N,), *args[1:]),),
            N,
        )


# Rows that share a warp's block, a block's own rows, more of both than blocks; 16-bit vectors and tails.
@on_cuda
@pytest.mark.parametrize(("M", "N"), [(301, 40), (45, 1032), (9, 2056)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_over_a_wide_stream(kernels, poisoned, dtype, M, N):
    x = torch.randn(M, N).to(dtype).requires_grad_()
    residual, weight, bias = _leaves((M, N), (N,), (N,))
    y, z = fastlm.add_layer_norm(x, residual, weight, bias, out_dtype=dtype)
    assert (y.dtype, z.dtype) == (dtype, torch.float32)
    X, R, W, B = (t.detach().double().requires_grad_() for t in (x, residual, weight, bias))
    Z = R + X
    Y = F.layer_norm(Z, (N,), W, B)
    assert_as_close_as_torch(y, Y, None, N)
    g = torch.randn(M, N).to(dtype)
    actual = torch.autograd.grad((y, z), (x, residual, weight, bias), (g, g.float()))
    expected = torch.autograd.grad((Y, Z), (X, R, W, B), (g.double(), g.double()))
    for a, e in zip(actual, expected, strict=True):
        assert_as_close_as_torch(a, e, None, max(M, N))


@on_cuda
def test_tensors_that_start_off_alignment(kernels, poisoned):
    """Vectors would fit the row's length but not the address."""
    M, N = 5, 64
    x, g, bias = (torch.randn(size + 1)[1:] for size in (M * N, M * N, N))
    x, g = x.view(M, N).requires_grad_(), g.view(M, N)
    for op, stock in (
        (lambda x: fastlm.layer_norm(x, N, None, bias), lambda x: F.layer_norm(x, (N,), None, bias)),
        (lambda x: fastlm.rms_norm(x, N, bias), lambda x: F.rms_norm(x, (N,), bias)),
        (lambda x: fastlm.bias_gelu(x, bias), lambda x: F.gelu(x + bias)),
        (fastlm.gelu, F.gelu),
    ):
        y, expected = op(x), stock(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g))


@on_cuda
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDEF])
@pytest.mark.parametrize("N", [77, 80])
def test_dropout_mask_is_the_reference_bit_for_bit(kernels, N, p, seed):
    """bias_gelu of a large constant is that constant where kept, so the mask is plain to see."""
    x, bias = torch.full((5, N), 64.0), torch.zeros(N)
    kept = gelu_fwd(x, bias, True, p, seed) != 0
    expected = _dropout.factors(5, N, p, seed, torch.float32, x.device) != 0
    assert torch.equal(kept, expected)


@on_cuda
def test_rows_do_not_see_the_batch(kernels):
    x, weight = torch.randn(37, 48), torch.randn(48)
    assert torch.equal(fastlm.layer_norm(x, 48, weight)[20:21], fastlm.layer_norm(x[20:21], 48, weight))


class TestChoice:
    @pytest.fixture(autouse=True)
    def _one_gpu(self, monkeypatch):
        """A GPU of sm_90 and a module with code for it."""
        monkeypatch.setattr(_dispatch, "oldest_architecture", lambda: SM90)
        monkeypatch.setattr(_native_cuda, "emulated", False)
        monkeypatch.setattr(_native_cuda, "unusable", lambda: None)
        monkeypatch.setattr(_native_cuda, "architectures", lambda: ("80", "90a"))
        _dispatch.clear_cache()
        yield
        _dispatch.clear_cache()

    def test_unproved_kernels_are_passed_over(self):
        request = _dispatch.Request("cuda", torch.bfloat16)
        assert _dispatch._choose("layer_norm", request, None) == "torch"
        assert _dispatch._choose("layer_norm", request, "cuda") == "cuda"
        row = next(row for row in _dispatch.backends("gelu") if row.name == "cuda")
        assert "unproved: run `fastlm tune`" in _dispatch.held_back("gelu", row, request)

    @pytest.mark.parametrize(("arch", "served"), [(80, True), (86, True), (90, True), (75, False), (100, False)])
    def test_code_runs_on_its_own_generation(self, monkeypatch, arch, served):
        monkeypatch.setattr(_dispatch, "oldest_architecture", lambda: parse(f"sm_{arch}"))
        request = _dispatch.Request("cuda", torch.float32)
        if served:
            assert _dispatch._choose("gelu", request, "cuda") == "cuda"
        else:
            with pytest.raises(fastlm.BackendError, match=f"built for sm_80, sm_90a, this GPU is sm_{arch}"):
                _dispatch._choose("gelu", request, "cuda")


def test_emulated_kernels_serve_only_an_explicit_choice(emulation):
    row = next(row for row in _dispatch.backends("gelu") if row.name == "cuda")
    request = _dispatch.Request("cpu", torch.float32)
    assert row.unsupported(request) is None
    assert "explicit choice" in _dispatch.held_back("gelu", row, request)
    assert "float64" in row.unsupported(request._replace(dtype=torch.float64))
