"""fastlm doctor: what it reports agrees with what the package and torch say themselves."""

import json
import re
import types

import pytest
import torch

import fastlm
from fastlm import runtime
from fastlm._core import dispatch as _dispatch
from fastlm.backends import cpu as _native
from fastlm.backends import cuda as _native_cuda
from fastlm.cli import doctor, main
from fastlm.ops import _gemm


def test_json_agrees_with_the_package(capsys, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert report["tried"] == {name: list(versions) for name, versions in runtime.TRIED.items()}
    assert report["cpu"]["isas"] == list(fastlm.cpu_isas())
    products = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    assert report["cpu"]["large_products"] == {
        name: "fastlm's" if _gemm.leads(dtype) else "PyTorch's" for name, dtype in products.items()
    }
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["cpu"]["extension"] == (_native.missing_reason or "loaded")
    assert report["settings"]["MALLOC_ARENA_MAX"] == "3"
    assert set(report["backends"]) == set(_dispatch.ops())
    for rows in report["backends"].values():
        for states in rows.values():
            assert list(states.values()).count("selected") == 1


def with_versions(monkeypatch, **versions):
    """Let these packages be installed in these versions, None for not at all, and the others as they are."""
    real = runtime.version
    monkeypatch.setattr(doctor, "version", lambda name: versions[name] if name in versions else real(name))


def test_the_versions_that_were_tried_stand_beside_the_installed_ones(monkeypatch, capsys):
    with_versions(monkeypatch, torch="2.13.7+cpu", triton=None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    shown = {name: ", ".join(v.rpartition(".")[0] for v in versions) for name, versions in runtime.TRIED.items()}
    assert f"torch 2.13.7+cpu (tried: {shown['torch']})  triton missing (tried: {shown['triton']})  numpy" in out
    assert "never tried" not in out, "another patch of a minor version that was tried"


@pytest.mark.parametrize(
    ("versions", "named"),
    [
        ({"torch": "2.14.1", "triton": "3.9.0"}, "with torch 2.14.1;"),
        ({"torch": "2.14.1+cu132", "triton": "3.8.0"}, "with torch 2.14.1+cu132 and triton 3.8.0;"),
        ({"torch": "3.0.0a0", "triton": None}, "with torch 3.0.0a0;"),
        ({"torch": "2.1.0", "triton": "3.60.0"}, "with torch 2.1.0 and triton 3.60.0;"),
    ],
)
def test_another_minor_version_is_said_in_a_line(versions, named, monkeypatch, capsys):
    with_versions(monkeypatch, **versions)
    assert main(["doctor"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "never tried" in line]
    assert named in line
    assert line.endswith(f"python tools/versions.py {versions['torch'].partition('+')[0]}")


def test_text_names_every_op_and_every_missing_peer_is_left_out(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(op in out for op in _dispatch.ops())
    assert runtime.cpu_model() in out
    assert "memory     " in out


def test_a_forced_backend_is_the_selected_one():
    with fastlm.backend("reference"):
        backends = doctor.collect()["backends"]
    states = [states for rows in backends.values() for states in rows.values()]
    assert {name for rows in states for name, state in rows.items() if state == "selected"} == {"reference"}


def test_advice_is_a_command():
    report = doctor.collect()
    report["cpu"]["extension"], report["packages"]["tokenizers"] = "missing", None
    advice = doctor._advice(report)
    assert any("FASTLM_CPU=1 pip install" in line for line in advice)
    assert any("pip install tokenizers" in line for line in advice)
    assert not any(re.search(r"install( --\S+)* '?fastlm\b", line) for line in advice), "no registry has fastlm"


def test_the_cuda_kernels_are_explained(monkeypatch):
    module = types.SimpleNamespace(architectures="80;90a", driver_version=lambda: 112, toolkit_version=lambda: 130)
    for name, value in {"_cuda": module, "missing_reason": None, "emulated": False}.items():
        monkeypatch.setattr(_native_cuda, name, value)
    report = doctor.collect()
    assert report["cuda"]["built_for"] == ["sm_80", "sm_90a"]
    assert report["cuda"]["extension"] == "the driver serves CUDA 11.2, the kernels were built with 13.0: update it"
    assert any("driver serves CUDA 11.2" in line for line in report["advice"])
    module.driver_version = lambda: 0
    assert doctor.collect()["cuda"]["extension"] == "no NVIDIA driver is loaded"
    module.driver_version = lambda: 130
    report = doctor.collect()
    assert report["cuda"]["extension"] == "loaded"
    report["cuda"]["devices"] = [{"name": "x", "arch": "sm_120", "memory_gib": 1}]
    assert any('FASTLM_CUDA_ARCHS="120"' in line for line in doctor._advice(report))
    report["cuda"]["devices"] = [{"name": "x", "arch": "gfx942", "memory_gib": 1}]
    assert not any("FASTLM_CUDA_ARCHS" in line for line in doctor._advice(report))


def test_advice_to_build_the_cuda_kernels():
    report = doctor.collect()
    report["cuda"].update(available=True, built_for=[], nvcc=None)
    assert any("install a CUDA toolkit, then  FASTLM_CUDA=1 pip install" in line for line in doctor._advice(report))


def test_no_driver_without_its_command(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "DRIVERS", (tmp_path / "nvidia", tmp_path / "amdgpu" / "version"))
    monkeypatch.setenv("PATH", "")
    assert runtime.driver_version() is None
