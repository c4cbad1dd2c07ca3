"""The backend table: forcing, refusing, explaining, and importing without the extension."""

import os
import subprocess
import sys

import pytest
import torch

import fastlm
from fastlm._core import dispatch as _dispatch
from fastlm.backends import cpu as _native


def _python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


def test_forced_backend_is_used_and_restored():
    x = torch.randn(3, 8)
    outside = fastlm.explain(fastlm.layer_norm, x, 8).selected
    for name in ("cpu", "torch", "reference"):
        with fastlm.backend(name):
            assert fastlm.explain(fastlm.layer_norm, x, 8).selected == name
            torch.testing.assert_close(fastlm.layer_norm(x, 8), torch.nn.functional.layer_norm(x, (8,)))
    assert fastlm.explain(fastlm.layer_norm, x, 8).selected == outside


def test_a_forced_backend_nests_and_decorates():
    x = torch.randn(3, 8)
    reference = fastlm.backend("reference")

    @reference
    def chosen() -> str | None:
        with fastlm.backend("torch"), fastlm.backend(None):
            pass
        return fastlm.explain(fastlm.layer_norm, x, 8).selected

    assert chosen() == chosen() == "reference"
    with reference, fastlm.backend("cpu"), reference:  # one object, entered again
        assert _dispatch.forced_backend() == "reference"
    with reference:
        pass
    assert _dispatch.forced_backend() == _dispatch._AT_IMPORT
    with pytest.raises(ZeroDivisionError), fastlm.backend("torch"):
        raise ZeroDivisionError
    with fastlm.backend("torch"):
        assert chosen() == "reference"
        assert _dispatch.forced_backend() == "torch"
    assert _dispatch.forced_backend() == _dispatch._AT_IMPORT


@pytest.mark.skipif(_native.missing_reason is not None, reason="without the CPU kernels")
def test_quick_calls_obey_a_forced_backend():
    """Calls without gradients skip most questions, but not which backend is asked for."""
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    with torch.no_grad():
        quick = fastlm.layer_norm(x, 8, weight, bias)
        for name in ("torch", "reference"):
            with fastlm.backend(name):
                assert fastlm.explain(fastlm.layer_norm, x, 8, weight, bias).selected == name
        with fastlm.backend("reference"):
            torch.testing.assert_close(fastlm.layer_norm(x, 8, weight, bias), quick)
        with fastlm.backend("torch"), pytest.raises(fastlm.BackendError, match="add_layer_norm: the torch backend"):
            fastlm.add_layer_norm(x, x, weight, bias)


def test_forced_backend_that_cannot_serve_raises(monkeypatch):
    x = torch.randn(3, 8)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _dispatch.clear_cache()
    with fastlm.backend("triton"), pytest.raises(fastlm.BackendError, match="but the tensors are on cpu"):
        fastlm.gelu(x)
    with fastlm.backend("torch"), pytest.raises(fastlm.BackendError, match="add_layer_norm: the torch backend"):
        fastlm.add_layer_norm(x, x)
    with fastlm.backend("cpu"), pytest.raises(fastlm.BackendError, match="on meta"):
        fastlm.gelu(x.to("meta"))
    with pytest.raises(fastlm.BackendError, match="no backend is called 'tpu'; choose from cpu, triton"):
        fastlm.backend("tpu").__enter__()


def test_explain_lists_every_backend():
    told = fastlm.explain(fastlm.layer_norm, torch.randn(3, 8), 8)
    assert set(told.reasons) == set(_dispatch.NAMES)
    assert told.reasons[told.selected] == "selected"
    assert [name for name, reason in told.reasons.items() if reason == "selected"] == [told.selected]
    assert "layer_norm on cpu, float32" in str(told)
    meta = fastlm.explain(fastlm.layer_norm, torch.randn(3, 8, device="meta"), 8)
    assert meta.selected == "torch"
    assert "on meta" in meta.reasons["cpu"]
    with pytest.raises(fastlm.BackendError, match="reached no fastlm op"):
        fastlm.explain(torch.exp, torch.ones(1))


def test_environment_variable():
    code = "import torch, fastlm; print(fastlm.explain(fastlm.gelu, torch.ones(2)).selected)"
    assert _python(code, FASTLM_BACKEND="reference").stdout.strip() == "reference"
    wrong = _python(code, FASTLM_BACKEND="quick")
    assert wrong.returncode != 0
    assert "FASTLM_BACKEND: no backend is called 'quick'" in wrong.stderr


@pytest.mark.skipif(not fastlm.cpu_isas(), reason="no CPU extension")
def test_isa_variable():
    code = "import fastlm; print(fastlm.cpu_isa())"
    assert _python(code, FASTLM_CPU_ISA="baseline").stdout.strip() == "baseline"
    wrong = _python(code, FASTLM_CPU_ISA="sse9")
    assert wrong.returncode != 0
    assert "got 'sse9', this machine has: baseline" in wrong.stderr


def test_import_without_the_extension_and_without_triton():
    """Every public op still runs, on the reference, and the reason is told."""
    code = """
import sys
sys.modules["fastlm._cpu"] = sys.modules["triton"] = None
import torch, fastlm
x = torch.randn(2, 8, requires_grad=True)
y = fastlm.bias_gelu(fastlm.layer_norm(x, 8), torch.zeros(8))
y.sum().backward()
told = fastlm.explain(fastlm.bias_gelu, x, torch.zeros(8))
print(told.selected, told.reasons["cpu"], fastlm.cpu_isa())
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference the CPU extension is not there")
    assert done.stdout.strip().endswith("None")


def test_import_is_light():
    done = _python(
        "import sys, torch; before = set(sys.modules); import fastlm;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - {'fastlm'} - set(sys.stdlib_module_names)))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(_native.missing_reason is not None, reason="without the CPU kernels")
def test_small_calls_are_left_to_torch_unless_a_backend_is_forced():
    q, k, long = (torch.randn(1, 2, t, 8) for t in (1, 16, 2**14))
    attend = fastlm.scaled_dot_product_attention
    small = fastlm.explain(attend, q, k, k)
    assert small.selected == "torch"
    assert "PyTorch's is faster" in small.reasons["cpu"]
    assert fastlm.explain(attend, q, long, long).selected == "cpu"
    assert fastlm.explain(attend, q, k, k, softcap=3.0).selected == "cpu"
    assert fastlm.explain(attend, q.clone().requires_grad_(), k, k).selected == "cpu"
    x, weight = torch.randn(4, 64), torch.randn(4096, 64)
    assert fastlm.explain(fastlm.linear, x, weight[:64]).selected == "torch"
    assert fastlm.explain(fastlm.linear, x, weight).selected == "cpu"
    with fastlm.backend("cpu"):
        assert fastlm.explain(attend, q, k, k).selected == "cpu"
        assert fastlm.explain(fastlm.linear, x, weight[:64]).selected == "cpu"
    torch.testing.assert_close(attend(q, k, k), torch.softmax(q @ k.mT / 8**0.5, -1) @ k)
