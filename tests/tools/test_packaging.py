"""What a user installs: a source distribution, a wheel built from it, imported outside the checkout."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastlm

ROOT = Path(__file__).resolve().parents[2]


def _run(*command, cwd, **env):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip builds from the source distribution, in a folder that holds nothing else."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT, cwd=out, FASTLM_CUDA="0")
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*")} <= names
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, sdist]
    _run(*pip, cwd=out, FASTLM_CPU="1", FASTLM_CUDA="0")
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_every_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {
        str(Path(installed) / path.relative_to(ROOT / folder))
        for folder, installed in (
            ("fastlm", "fastlm"),
            ("kernels", "fastlm/kernels"),
            ("benchmarks", "fastlm/benchmarks"),
        )
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources
    assert any(name.startswith("fastlm/_cpu.") for name in names)
    assert "fastlm/py.typed" in names
    assert not [name for name in names if not name.startswith(("fastlm/", "fastlm-"))]


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    _run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    code = """
import torch, fastlm, fastlm.kernels, fastlm.benchmarks
x = torch.randn(4, 33, requires_grad=True)
fastlm.layer_norm(x, 33).sum().backward()
print(fastlm.__file__, fastlm.explain(fastlm.layer_norm, x, 33).selected)
"""
    file, backend = _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target)).split()
    assert Path(file).is_relative_to(target)
    assert backend == "cpu"


@pytest.mark.skipif(not fastlm.cpu_isas() or sys.platform != "linux", reason="no CPU extension, or not Linux")
def test_extension_needs_no_torch_and_shares_its_openmp():
    from fastlm import _cpu

    libraries = _run("ldd", _cpu.__file__, cwd=ROOT)
    assert "libtorch" not in libraries
    assert "libc10" not in libraries
    code = """
import torch, fastlm
torch.set_num_threads(1)
from fastlm.backends import cpu as _native
lines = {l.split()[-1] for l in open("/proc/self/maps") if "libgomp" in l}
print(len(lines), _native.omp_threads())
"""
    assert _run(sys.executable, "-c", code, cwd=ROOT).split() == ["1", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "fails_with", "reason"),
    [
        ("0", "", "it was installed with FASTLM_CUDA=0"),
        (
            "",
            "nvcc fatal   : Unsupported gpu architecture 'compute_100'",
            "its build failed (nvcc fatal   : Unsupported",
        ),
        ("", "norm.cu(3): error: expected a ';'", "its build failed (norm.cu(3): error: expected a ';')"),
        ("", "", "its build failed (nvcc failed on csrc/cuda/"),
    ],
)
def test_a_package_without_the_cuda_kernels_says_why(tmp_path, wanted, fails_with, reason):
    """pip shows nothing of a build that fails, so what is installed has to, beside the CPU kernels' reason."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\necho "{fails_with}" >&2\nexit 1\n')
    nvcc.chmod(0o755)
    settings = {"FASTLM_CPU": "0", "FASTLM_CUDA": wanted, "FASTLM_CUDA_ARCHS": "80", "CUDA_HOME": str(tmp_path)}
    places = ["--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    _run(sys.executable, "setup.py", "-q", "build", *places, cwd=ROOT, **settings)
    code = """
import sys
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in str(f)]  # an editable install's finder has modules
from fastlm.backends import cpu, cuda
print(cpu.missing_reason, cuda.missing_reason, sep="\\n")
"""
    of_cpu, of_cuda = _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "lib")).splitlines()
    assert of_cpu == "the CPU extension is not there: it was installed with FASTLM_CPU=0"
    assert of_cuda.startswith(f"the CUDA extension is not there: {reason}")


def test_nothing_tells_to_take_the_package_from_an_index_that_has_it_not():
    places = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    for path in [*places, *(ROOT / "fastlm").rglob("*.py")]:
        assert not re.search(r"pip install '?fastlm\b", path.read_text(encoding="utf-8")), path
