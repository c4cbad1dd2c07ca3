"""fastlm verify: a short seeded run passes, and each kind of check can fail on a kernel that is broken for it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastlm
from fastlm._core import dispatch as _dispatch
from fastlm.backends import cpu as _native
from fastlm.backends.cpu import gelu as gelu_kernels
from fastlm.backends.cpu import layer_norm as layer_norm_kernels
from fastlm.cli import main
from fastlm.ops import gelu as gelu_module
from fastlm.ops import layer_norm as layer_norm_module
from fastlm.verify import fuzz
from fastlm.verify.checks import KINDS, measure
from fastlm.verify.guards import MARGIN, Guards, carve, guarded_allocations

needs_extension = pytest.mark.skipif(_native.missing_reason is not None, reason="no CPU extension")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_seeded_run_passes(backend):
    pairs, absent = fuzz.select([], [backend])
    assert {op for op, _ in absent} | {spec.name for spec, _ in pairs} == set(fuzz.SPECS)
    report = fuzz.run(pairs, seed=4100, seconds=0, samples=6)
    assert report.samples == 6 * len(pairs)
    assert not report.failures


def test_every_op_of_the_table_is_verified():
    assert set(_dispatch.ops()) <= set(fuzz.SPECS)


def _broken(**functions):
    """The CPU kernels with some functions exchanged."""
    kernels = type("Broken", (), {})()
    plain = {**vars(gelu_kernels), **vars(layer_norm_kernels)}
    for name in ("gelu_fwd", "gelu_bwd", "layer_norm_fwd", "layer_norm_bwd"):
        setattr(kernels, name, functions.get(name, plain[name]))
    return kernels


def _writes_past_the_end(x, *args):
    y = gelu_kernels.gelu_fwd(x, *args)
    if y.numel():
        torch.empty(0, dtype=y.dtype).set_(y.untyped_storage(), y.storage_offset() + y.numel(), (1,)).fill_(1.0)
    return y


def _writes_before_the_start(x, *args):
    y = gelu_kernels.gelu_fwd(x, *args)
    if y.numel():
        torch.empty(0, dtype=y.dtype).set_(y.untyped_storage(), y.storage_offset() - 1, (1,)).fill_(1.0)
    return y


def _writes_its_input(x, *args):
    y = gelu_kernels.gelu_fwd(x, *args)
    x.mul_(1.5)
    return y


def _leaves_an_element(x, *args):
    y, fresh = gelu_kernels.gelu_fwd(x, *args), torch.empty_like(x)
    fresh.view(-1)[1:] = y.view(-1)[1:]
    return fresh


_calls = [0]


def _differs_between_runs(x, *args):
    _calls[0] += 1
    y = gelu_kernels.gelu_fwd(x, *args)
    return y * (1 + _calls[0] % 7 * torch.finfo(y.dtype).eps)


def _depends_on_the_batch(x, *args):
    y = gelu_kernels.gelu_fwd(x, *args)
    return y * (1 + len(x) % 2 * torch.finfo(y.dtype).eps)


def _depends_on_threads(x, *args):
    y = gelu_kernels.gelu_fwd(x, *args)
    return y * (1 + torch.get_num_threads() % 2 * torch.finfo(y.dtype).eps)


def _slightly_wrong(x, *args):
    return gelu_kernels.gelu_fwd(x, *args) * 1.02


def _rounds_too_much(x, *args):
    return gelu_kernels.gelu_fwd(x, *args) * (1 + torch.finfo(x.dtype).eps)


def _raises(x, *args):
    raise RuntimeError("no such kernel")


def _wrong_gradient(dy, x, *args):
    dx, db = gelu_kernels.gelu_bwd(dy, x, *args)
    return dx * 1.02, db


BROKEN = {
    "past the end": ("guard", {"gelu_fwd": _writes_past_the_end}),
    "before the start": ("guard", {"gelu_fwd": _writes_before_the_start}),
    "its input": ("guard", {"gelu_fwd": _writes_its_input}),
    "an element left": ("unwritten", {"gelu_fwd": _leaves_an_element}),
    "not repeatable": ("repeat", {"gelu_fwd": _differs_between_runs}),
    "by batch": ("batch", {"gelu_fwd": _depends_on_the_batch}),
    "by threads": ("threads", {"gelu_fwd": _depends_on_threads}),
    "wrong": ("value", {"gelu_fwd": _slightly_wrong}),
    "one unit off": ("exact", {"gelu_fwd": _rounds_too_much}),
    "raises": ("error", {"gelu_fwd": _raises}),
    "wrong gradient": ("gradient", {"gelu_bwd": _wrong_gradient}),
}


@needs_extension
@pytest.mark.parametrize(("kind", "functions"), BROKEN.values(), ids=BROKEN)
def test_a_broken_kernel_is_found(monkeypatch, kind, functions):
    monkeypatch.setenv("FASTLM_CPU_ISA", fastlm.cpu_isa())  # one instruction set will do
    monkeypatch.setitem(gelu_module.KERNELS, "cpu", _broken(**functions))
    pairs, _ = fuzz.select(["gelu"], ["cpu"])
    report = fuzz.run(pairs, seed=0, seconds=0, samples=40)
    assert kind in {failure[2] for failure in report.failures}


def test_every_kind_of_check_is_broken_above():
    assert {kind for kind, _ in BROKEN.values()} == set(KINDS)


@needs_extension
def test_a_dropped_gradient_is_found(monkeypatch):
    def drops(*args, **kwargs):
        dz, dx, dw, _ = layer_norm_kernels.layer_norm_bwd(*args, **kwargs)
        return dz, dx, dw, None

    monkeypatch.setitem(layer_norm_module.KERNELS, "cpu", _broken(layer_norm_bwd=drops))
    pairs, _ = fuzz.select(["layer_norm"], ["cpu"])
    report = fuzz.run(pairs, seed=0, seconds=0, samples=4)
    assert any(kind == "gradient" and "dbias: there is none" in text for _, _, kind, text, _ in report.failures)


@needs_extension
def test_the_printed_command_repeats_the_failure(monkeypatch, capsys):
    monkeypatch.setattr("fastlm.cli.verify._survive_crashes", lambda work: work(lambda command: None))
    monkeypatch.setitem(gelu_module.KERNELS, "cpu", _broken(gelu_fwd=_slightly_wrong))
    assert main(["verify", "--op", "gelu", "--backend", "cpu", "--seed", "3", "--samples", "2"]) == 1
    first, command = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("FAILED gelu on cpu, ")
    assert main(command.split()[1:]) == 1
    assert capsys.readouterr().out.splitlines()[0] == first
    monkeypatch.undo()
    monkeypatch.setattr("fastlm.cli.verify._survive_crashes", lambda work: work(lambda command: None))
    assert main(command.split()[1:]) == 0


@pytest.mark.parametrize(("backend", "status", "word"), [("torch", 0, "NOTED"), ("reference", 1, "FAILED")])
def test_only_what_is_ours_fails(monkeypatch, capsys, backend, status, word):
    """PyTorch's own operator, made wrong, is reported with its command, and the exit status stays 0."""
    monkeypatch.setattr("fastlm.cli.verify._survive_crashes", lambda work: work(lambda command: None))
    stock, ours = torch.nn.functional.gelu, gelu_module.gelu_ref
    monkeypatch.setattr(gelu_module, "F", SimpleNamespace(gelu=lambda x, **how: stock(x, **how) * 2))
    monkeypatch.setattr(gelu_module, "gelu_ref", lambda x, *how: ours(x, *how) * 2)
    assert main(["verify", "--op", "gelu", "--backend", backend, "--seed", "3", "--samples", "4"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{word} gelu on {backend}, ")
    assert lines[1].startswith(f"  fastlm verify --op gelu --backend {backend} --seed ")
    assert ("0 failures" in lines[-1]) is (status == 0)
    assert ("noted in PyTorch's own operators" in lines[-1]) is (status == 0)


def test_command_line(capfd):
    assert main(["verify", "--op", "gelu", "--backend", "reference,cuda", "--samples", "2"]) == 0
    out = capfd.readouterr().out
    assert "2 samples, 0 failures" in out
    assert "not run on cuda: gelu" in out
    assert "max ULP" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], "op is 'softmax', expected one of scaled_dot_product_attention, attention_varlen, "),
        (["--backend", "metal"], "backend is 'metal', expected one of cpu, triton, cuda, torch, reference"),
        (["--seconds", "0"], "seconds is 0.0, expected a number above 0"),
        (["--samples", "0"], "samples is 0, expected at least 1"),
        (["--op", "gelu", "--backend", "cuda"], "nothing to verify: gelu on cuda: "),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert main(["verify", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_crash_leaves_its_command():
    code = """
import os, signal, sys
from fastlm.ops import gelu
import fastlm.cli
class Crash:
    def gelu_fwd(self, *args): os.kill(os.getpid(), signal.SIGSEGV)
gelu.KERNELS["cpu"] = Crash()
sys.exit(fastlm.cli.main(["verify", "--op", "gelu", "--backend", "cpu", "--seed", "8"]))
"""
    if _native.missing_reason:
        pytest.skip("no CPU extension")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "FAILED crash: SIGSEGV" in done.stdout
    assert "fastlm verify --op gelu --backend cpu --seed 8 --samples 1" in done.stdout


def test_carved_tensors_keep_values_and_see_writes():
    import random

    values = torch.randn(3, 4, 5)
    for seed in range(30):
        tensor, buffer = carve(values, random.Random(seed))
        assert torch.equal(tensor, values)
        assert int(buffer.isnan().sum()) == buffer.numel() - values.numel() >= 2 * MARGIN // 4
    guards = Guards()
    x = guards.place("x", torch.arange(6), random.Random(1))
    assert guards.violations() == []
    x[3] = 9
    assert guards.violations() == ["x or the memory around it was written to"]


def test_allocations_are_guarded_in_forward_and_backward_and_put_back():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.zeros_like(x).add_(x, alpha=2)

        @staticmethod
        def backward(ctx, dy):
            return dy.new_empty(dy.shape).copy_(dy).mul_(2)

    functions = torch.empty, torch.zeros_like, torch.Tensor.new_empty
    guards = Guards()
    x = torch.ones(3, requires_grad=True)
    with guarded_allocations(guards):
        assert torch.empty(5).isnan().all()
        y = Twice.apply(x)
        torch.autograd.backward(y, y.detach(), inputs=[x])
    assert torch.equal(y, torch.full((3,), 2.0))
    assert torch.equal(x.grad, torch.full((3,), 4.0))
    assert [name for name, *_ in guards.outputs] == ["empty", "zeros_like", "new_empty"]
    assert (torch.empty, torch.zeros_like, torch.Tensor.new_empty) == functions
    assert "new_empty" not in vars(torch.Tensor)


def test_units_in_the_last_place():
    truth = torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    errors = measure((truth + torch.tensor([0, 0, 4 * eps]).double()).float(), truth, None, 0.5)
    assert errors.ulp == 2.0  # at 2.0 a unit is 2 eps
    assert measure(truth.float(), truth, truth.float(), 0.0).torch_ulp == 0.0
