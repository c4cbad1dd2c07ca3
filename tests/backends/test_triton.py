"""What is Triton's own: rows wider than a block, the dropout mask, programs that share rows, and when it is chosen.

The op test files run the shared parity cases on it. Without a GPU all of it runs in Triton's interpreter.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastlm
from conftest import TRITON
from fastlm._core import dispatch as _dispatch
from fastlm._core import dropout as _dropout
from fastlm._core.architecture import SM90, parse
from fastlm.ops.layer_norm import add_layer_norm_ref
from tolerances import assert_as_close_as_torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")
_common = pytest.importorskip("fastlm.kernels._common")
dropout_factors = _common.dropout_factors


pytestmark = pytest.mark.parametrize("kernels", [TRITON], indirect=True)


@pytest.fixture(autouse=True)
def _on_triton(kernels):
    """Every test of this file is for the Triton backend, on the GPU or in the interpreter."""


def _gradients_agree(outputs, inputs, truth, doubled, size):
    grads = [torch.randn_like(o) for o in outputs]
    actual = torch.autograd.grad(outputs, inputs, grads)
    expected = torch.autograd.grad(truth, doubled, [g.double() for g in grads])
    for a, e in zip(actual, expected, strict=True):
        assert_as_close_as_torch(a, e, None, size, f"gradient of shape {tuple(a.shape)}")


@pytest.mark.parametrize("N", [4097, 16400])
def test_layer_norm_of_rows_wider_than_a_block(poisoned, N):
    """Dropout and an odd width split the rows at 4096 columns, any kernel at 16384; the mean is far from 0."""
    x, residual = (torch.randn(3, N).add(100).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(N).requires_grad_() for _ in range(2))
    torch.manual_seed(5)
    outputs = fastlm.add_layer_norm(x, residual, weight, bias, dropout_p=0.2)
    torch.manual_seed(5)
    seed = _dropout.draw_seed()
    doubled = [t.detach().double().requires_grad_() for t in (x, residual, weight, bias)]
    truth = add_layer_norm_ref(*doubled, 1e-5, 0.2, seed)
    for a, t in zip(outputs, truth, strict=True):
        assert_as_close_as_torch(a, t, None, N)
    _gradients_agree(outputs, (x, residual, weight, bias), truth, doubled, N)


@pytest.mark.parametrize("N", [8200, 16400])
def test_rms_norm_of_rows_wider_than_a_block(poisoned, N):
    x, residual, weight = (torch.randn(*s).requires_grad_() for s in ((3, N), (3, N), (N,)))
    outputs = fastlm.add_rms_norm(x, residual, weight)
    doubled = [t.detach().double().requires_grad_() for t in (x, residual, weight)]
    z = doubled[0] + doubled[1]
    truth = F.rms_norm(z, (N,), doubled[2], torch.finfo(torch.float32).eps), z
    for a, t in zip(outputs, truth, strict=True):
        assert_as_close_as_torch(a, t, None, N)
    _gradients_agree(outputs, (x, residual, weight), truth, doubled, N)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDEF])
def test_dropout_mask_is_the_reference_bit_for_bit(p, seed):
    """bias_gelu of a large constant is that constant where kept, so the mask is plain to see."""
    from fastlm.kernels import gelu

    x, bias = torch.full((5, 77), 64.0), torch.zeros(77)
    kept = gelu.gelu_fwd(x, bias, True, p, seed) != 0
    expected = _dropout.factors(5, 77, p, seed, torch.float32, x.device) != 0
    if p == 1:  # a factor of 0 drops whatever the mask says
        expected = torch.zeros_like(expected)
    assert torch.equal(kept, expected)


@triton.jit
def _mask_kernel(out_ptr, first: tl.int64, seed: tl.int64, threshold: tl.uint32, scale):
    out = dropout_factors(first + tl.arange(0, 4), 0, seed, threshold, scale, 16)
    tl.store(out_ptr + tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :], out)


def test_mask_of_rows_beyond_32_bits():
    """Row numbers have a high word; the kernels' helper is asked for such rows directly."""
    first, seed, p = 2**33 + 2, 99, 0.4
    out = torch.empty(4, 16)
    _mask_kernel[(1,)](out, first, *_common.dropout_arguments(p, seed))
    group, row = torch.arange(4).expand(4, 4), (first + torch.arange(4))[:, None].expand(4, 4)
    words = _dropout.philox(seed, (group, row & 0xFFFFFFFF, row >> 32, torch.zeros_like(row)))
    word = torch.stack(words, -1).reshape(4, 16)
    assert torch.equal(out != 0, word >= round(p * 2**32))


def test_repeats_bit_for_bit_and_rows_do_not_see_the_batch(poisoned):
    x, residual, weight, bias = (torch.randn(*s).requires_grad_() for s in ((37, 48), (37, 48), (48,), (48,)))
    inputs = (x, residual, weight, bias)
    g = torch.randn(37, 48)

    def run():
        y, z = fastlm.add_layer_norm(*inputs)
        h = fastlm.bias_gelu(fastlm.rms_norm(y, 48, weight), bias)
        loss = fastlm.cross_entropy(h, torch.arange(37))
        return (y, z, h, loss, *torch.autograd.grad((h, loss), inputs, (g, torch.ones(()))))

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(), strict=True))
    alone = fastlm.add_layer_norm(x[20:21], residual[20:21], weight, bias)
    assert all(torch.equal(a, b[20:21]) for a, b in zip(alone, first, strict=False))


def test_target_out_of_range_is_nan_in_its_row():
    """Nothing waits for the GPU, so nothing can raise: the row says it."""
    x = torch.randn(4, 9, requires_grad=True)
    loss = fastlm.cross_entropy(x, torch.tensor([1, 9, -3, 8]), reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False]
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert dx.isnan().all(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("incoming", [1.0, 0.25])
def test_gradient_made_in_the_forward_pass_changes_no_bit(incoming):
    """It serves where the loss receives 1; else the kernel makes it again."""
    x, target = torch.randn(6, 50), torch.arange(6)
    by_guess, without = (x.clone().requires_grad_() for _ in range(2))
    (a,) = torch.autograd.grad(fastlm.cross_entropy(by_guess, target) * incoming, by_guess)
    each = fastlm.cross_entropy(without, target, reduction="none")
    (b,) = torch.autograd.grad(each, without, torch.full((6,), incoming) / 6)
    assert torch.equal(a, b)


class TestChoice:
    """A GPU without a proof: over the reference alone, never over PyTorch's operator."""

    @pytest.fixture(autouse=True)
    def _one_gpu(self, monkeypatch):
        monkeypatch.setattr(_dispatch, "oldest_architecture", lambda: SM90)
        _dispatch.clear_cache()
        yield
        _dispatch.clear_cache()

    def _choose(self, op, dtype=torch.bfloat16, device="cuda"):
        return _dispatch._choose(op, _dispatch.Request(device, dtype), None)

    def test_unproved(self):
        assert self._choose("layer_norm") == "torch"
        assert self._choose("add_layer_norm") == "triton"
        assert self._choose("bias_gelu", torch.float64) == "reference"
        row = next(row for row in _dispatch.backends("layer_norm") if row.name == "triton")
        reason = _dispatch.held_back("layer_norm", row, _dispatch.Request("cuda", torch.bfloat16))
        assert reason == "unproved: run `fastlm tune`"

    def test_older_than_sm_80(self, monkeypatch):
        monkeypatch.setattr(_dispatch, "oldest_architecture", lambda: parse("sm_75"))
        assert self._choose("add_layer_norm") == "reference"
        with pytest.raises(fastlm.BackendError, match="need sm_80 or newer, this GPU is sm_75"):
            _dispatch._choose("gelu", _dispatch.Request("cuda", torch.float32), "triton")

    def test_interpreter_serves_only_an_explicit_choice(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        row = next(row for row in _dispatch.backends("bias_gelu") if row.name == "triton")
        request = _dispatch.Request("cpu", torch.float32)
        assert row.unsupported(request) is None
        assert "explicit choice" in _dispatch.held_back("bias_gelu", row, request)


def test_triton_is_imported_when_a_kernel_is_needed():
    code = "import sys, torch, fastlm; fastlm.layer_norm(torch.ones(2, 8), 8); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "False", done.stderr
