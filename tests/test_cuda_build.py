"""The CUDA module's build: nvcc compiles every kernel for every architecture within its limits, and the module loads.

One build serves all tests of this file; it is kept, with its log, by the hash of what it is made of.
"""

import importlib.machinery
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from emulation import build

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("80", "90a", "100")
REGISTERS = 64 * 1024  # of a multiprocessor


def _nvcc():
    """The compiler that setup.py finds."""
    code = "import setuptools; setuptools.setup = dict; import runpy; print(runpy.run_path('setup.py')['find_nvcc']())"
    env = {**os.environ, "FASTLM_CUDA": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    return done.stdout.split()[-1] if done.returncode == 0 and not done.stdout.endswith("None\n") else None


@pytest.fixture(scope="session")
def built():
    """(folder of the module, what the build printed)."""
    nvcc = _nvcc()
    if nvcc is None:
        pytest.skip("no nvcc by CUDA_HOME, on PATH or in /usr/local/cuda")
    sources = [ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file() and "cpu" not in p.name)]
    version = subprocess.run([nvcc, "--version"], capture_output=True, timeout=60).stdout
    with build.locked(cache := build.cache_folder()):
        folder = cache / f"nvcc-{build.digest(sys.version, version, *(path.read_bytes() for path in sources))}"
        log = folder / "log"
        if not log.exists():
            done = subprocess.run(
                [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"],
                cwd=ROOT,
                env={**os.environ, "FASTLM_CPU": "0", "FASTLM_CUDA": "1", "FASTLM_CUDA_ARCHS": ";".join(ARCHS),
                     "NVCC_APPEND_FLAGS": "-Xptxas=-v"},
                capture_output=True, text=True, timeout=580,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-4000:]
            log.write_text(done.stdout + done.stderr)
    return folder / "fastlm", log.read_text()


ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="session")
def kernels_built(built):
    """What ptxas says of each kernel for each architecture."""
    return [match.groupdict() for match in ENTRY.finditer(built[1])]


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture(kernels_built):
    names = {arch: {k["name"] for k in kernels_built if k["arch"] == arch} for arch in ARCHS}
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu*"))
    for declared in re.findall(r"__global__ void[^;{]*?(\w+_kernel)\(", sources):
        for arch in ARCHS:
            assert any(declared in name for name in names[arch]), f"{declared} for sm_{arch}"


@pytest.mark.slow
def test_nothing_spills(kernels_built):
    spilled = [k for k in kernels_built if int(k["stores"]) or int(k["loads"]) or int(k["stack"])]
    assert not spilled, "\n".join(map(str, spilled))


@pytest.mark.slow
def test_registers_fit_a_block(kernels_built):
    """The norms launch up to 512 threads, GELU 256, Hopper's 384: more registers a thread and the launch would fail."""
    threads = {"norm": 512, "gelu": 256, "sum_partials": 256, "sm90": 384}
    for kernel in kernels_built:
        for part, count in threads.items():
            if part in kernel["name"]:
                assert int(kernel["registers"]) * count <= REGISTERS, kernel


PRODUCTS = ("HGMMA.64x128x16", "UTMALDG.4D", "SYNCS", "USETMAXREG")
SUMS = ("HGMMA.64x64x16", "STSM.16.M88.4", "UBLKCP.G.S", "UBLKRED.G.S.ADD.F32", "FENCE.VIEW.ASYNC.G")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "name", "instructions"),
    [
        ("attention_sm90", "attention_fwd_sm90_kernel", PRODUCTS),
        ("attention_bwd_sm90", "attention_bwd_sm90_kernel", PRODUCTS + SUMS),
    ],
)
def test_hopper_kernels_use_its_instructions(built, stem, name, instructions):
    """wgmma, TMA and setmaxnreg are in the machine code; the compiler neither serializes products nor ignores them."""
    tool = Path(_nvcc()).parent / "cuobjdump"
    if not tool.exists():
        pytest.skip("no cuobjdump beside nvcc")
    (made,) = (built[0].parent / "objects" / "cuda").glob(f"{stem}-*.o")
    command = [tool, "--dump-sass", "--gpu-architecture", "sm_90a", made]
    code = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    kernels = [part for part in code.split("Function : ")[1:] if name in part.split("\n")[0]]
    assert len(kernels) == 4  # two head sizes, two dtypes
    for kernel in kernels:
        for instruction in instructions:
            assert instruction in kernel, instruction
        assert "HMMA" not in kernel
    assert not re.findall(r".*\(C75\d\d\).*", built[1])


@pytest.mark.slow
def test_the_module_imports_without_a_driver(built, tmp_path):
    (module,) = built[0].glob("_cuda*" + importlib.machinery.EXTENSION_SUFFIXES[0])
    libraries = subprocess.run(["ldd", module], capture_output=True, text=True, timeout=60).stdout
    assert not [word for word in ("libcuda", "libtorch", "libc10") if word in libraries]
    code = f"""
import importlib.machinery, importlib.util
loader = importlib.machinery.ExtensionFileLoader("_cuda", {str(module)!r})
cuda = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))
loader.exec_module(cuda)
print(cuda.architectures, cuda.toolkit_version() >= 110, cuda.driver_version() >= 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["80;90a;100", "True", "True"], done.stderr


def _setup(*arguments, **env):
    env = {**os.environ, "FASTLM_CPU": "0", **env}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_without_nvcc_the_build_says_so(tmp_path):
    missing = {"CUDA_HOME": str(tmp_path), "PATH": str(tmp_path), "FASTLM_CUDA": "0"}
    done = _setup("--name", **missing)
    assert done.returncode == 0, done.stderr
    assert "without the CUDA kernels (FASTLM_CUDA=0)" in done.stdout


@pytest.mark.skipif(Path("/usr/local/cuda/bin/nvcc").exists(), reason="a toolkit is in the usual place")
def test_asking_for_the_kernels_without_nvcc_is_an_error(tmp_path):
    done = _setup("--name", CUDA_HOME="", PATH=str(tmp_path), FASTLM_CUDA="1")
    assert done.returncode != 0
    assert "FASTLM_CUDA=1 asks for the CUDA kernels, but there is no nvcc" in done.stderr
