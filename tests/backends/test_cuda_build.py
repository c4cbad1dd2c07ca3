"""The CUDA module's build: nvcc compiles every kernel for every architecture within its limits, and the module loads.

A build is kept, with its log, by the hash of what it is made of. The ordinary run compiles for the architecture that
has every kernel, `make test-gpu-code` for all of them.
"""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from emulation import build

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("80", "86", "89", "90a", "100", "120")
SAME = {"100": ("100", "100a")}  # whose own kernels are compiled for the latter alone
REGISTERS = 64 * 1024  # of a multiprocessor


def _nvcc():
    """The compiler that setup.py finds."""
    code = "import setuptools; setuptools.setup = dict; import runpy; print(runpy.run_path('setup.py')['find_nvcc']())"
    env = {**os.environ, "FASTLM_CUDA": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    return done.stdout.split()[-1] if done.returncode == 0 and not done.stdout.endswith("None\n") else None


class Build(NamedTuple):
    folder: Path  # of the module
    log: str
    archs: tuple[str, ...]


@pytest.fixture(scope="session", params=[("90a",), pytest.param(ARCHS, marks=pytest.mark.gpu_code)], ids="-".join)
def built(request):
    nvcc, archs = _nvcc(), request.param
    if nvcc is None:
        pytest.skip("no nvcc by CUDA_HOME, on PATH or in /usr/local/cuda")
    sources = [ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file() and "cpu" not in p.name)]
    version = subprocess.run([nvcc, "--version"], capture_output=True).stdout
    key = build.digest(sys.version, version, *archs, *(path.read_bytes() for path in sources))
    with build.locked(cache := build.cache_folder(), "nvcc"):
        folder = cache / f"nvcc-{key}"
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                made = Path(scratch) / "made"
                done = subprocess.run(
                    [sys.executable, "setup.py", "build_ext", "--build-lib", made, "--build-temp", made / "objects"],
                    cwd=ROOT,
                    env={**os.environ, "FASTLM_CPU": "0", "FASTLM_CUDA": "1", "FASTLM_CUDA_ARCHS": ";".join(archs),
                         "NVCC_APPEND_FLAGS": "-Xptxas=-v"},
                    capture_output=True, text=True,
                )  # fmt: skip
                assert done.returncode == 0, done.stderr[-4000:]
                (made / "log").write_text(done.stdout + done.stderr)
                made.rename(folder)
    return Build(folder / "fastlm", (folder / "log").read_text(), archs)


ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="session")
def kernels_built(built):
    """What ptxas says of each kernel for each architecture."""
    return [match.groupdict() for match in ENTRY.finditer(built.log)]


def test_every_kernel_compiles_for_every_architecture(built, kernels_built):
    names = {arch: {k["name"] for k in kernels_built if k["arch"] in SAME.get(arch, (arch,))} for arch in built.archs}
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu*"))
    for declared in re.findall(r"__global__ void[^;{]*?(\w+_kernel)\(", sources):
        for arch in built.archs:
            assert any(declared in name for name in names[arch]), f"{declared} for sm_{arch}"


def test_nothing_spills(kernels_built):
    """But for attention's mask gradient on sm_120, of which ptxas keeps a few words of the products in memory."""
    for kernel in kernels_built:
        few = kernel["arch"] == "120" and "attention_bwd_mask_kernel" in kernel["name"]
        assert int(kernel["stack"]) <= (64 if few else 0), kernel
        assert int(kernel["stores"]) + int(kernel["loads"]) <= (256 if few else 0), kernel


def test_registers_fit_a_block(kernels_built):
    """The norms and Blackwell's launch up to 512 threads, Hopper's 384, others 256: more and the launch would fail."""
    most = {"norm": 512, "sm90": 384, "sm100": 512}
    for kernel in kernels_built:
        threads = next((count for part, count in most.items() if part in kernel["name"]), 256)
        assert int(kernel["registers"]) * threads <= REGISTERS, kernel


def _cuobjdump():
    """The disassembler beside nvcc, which may be a script elsewhere, or Triton's."""
    places = [Path(_nvcc()).parent]
    if triton := importlib.util.find_spec("triton"):
        places.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return shutil.which("cuobjdump", path=os.pathsep.join(map(str, places)))


PRODUCTS = ("HGMMA.64x128x16", "UTMALDG.4D", "SYNCS", "USETMAXREG")
SUMS = ("HGMMA.64x64x16", "STSM.16.M88.4", "UBLKCP.G.S", "UBLKRED.G.S.ADD.F32", "FENCE.VIEW.ASYNC.G")


@pytest.mark.parametrize(
    ("stem", "name", "instructions"),
    [
        ("attention_sm90", "attention_fwd_sm90_kernel", PRODUCTS),
        ("attention_bwd_sm90", "attention_bwd_sm90_kernel", PRODUCTS + SUMS),
    ],
)
def test_hopper_kernels_use_its_instructions(built, stem, name, instructions):
    """wgmma, TMA and setmaxnreg are in the machine code; the compiler neither serializes products nor ignores them."""
    tool = _cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump beside nvcc or in Triton")
    (made,) = (built.folder.parent / "objects" / "cuda").glob(f"{stem}-*.o")
    command = [tool, "--dump-sass", "--gpu-architecture", "sm_90a", made]
    code = subprocess.run(command, capture_output=True, text=True).stdout
    kernels = [part for part in code.split("Function : ")[1:] if name in part.split("\n")[0]]
    assert len(kernels) == 4  # two head sizes, two dtypes
    for kernel in kernels:
        for instruction in instructions:
            assert instruction in kernel, instruction
        assert "HMMA" not in kernel
    assert not re.findall(r".*\(C75\d\d\).*", built.log)


# Of tcgen05: products and their commits, loads and stores of tensor memory, its allocation; TMA, mbarriers, setmaxnreg.
TENSOR = ("UTCHMMA", "UTCBAR", "LDTM", "STTM", "UTCATOMSWS", "UTMALDG.4D", "SYNCS", "USETMAXREG")


@pytest.mark.parametrize(
    ("archs", "own"),
    [(["80", "90a", "100", "120"], ["80", "90a", "100a", "120"]), (["100", "100a"], ["100a"]), (["90a"], ["90a"])],
)
def test_blackwell_kernels_are_compiled_for_its_instructions(archs, own):
    """In the place of sm_100, of which a GPU would find two versions otherwise; other files are compiled as asked."""
    code = "import setuptools; setuptools.setup = dict; import runpy; of = runpy.run_path('setup.py')['archs_of']; "
    code += f"print([of(name, {archs}) for name in ('csrc/cuda/attention_sm100.cu', 'csrc/cuda/attention_sm90.cu')])"
    env = {**os.environ, "FASTLM_CUDA": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str([own, archs]), done.stderr


@pytest.mark.gpu_code
def test_blackwell_kernels_use_its_instructions(tmp_path):
    """Within the registers of 512 threads, without a stack, and without a product that is not tcgen05's."""
    nvcc, tool, made = _nvcc(), _cuobjdump(), tmp_path / "attention_sm100.o"
    if nvcc is None or tool is None:
        pytest.skip("no nvcc, or no cuobjdump beside it or in Triton")
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc/cuda'}", "-Xptxas=-v", "-gencode=arch=compute_100a,code=sm_100a"]
    command = [nvcc, *flags, "-c", ROOT / "csrc/cuda/attention_sm100.cu", "-o", made]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [match.groupdict() for match in ENTRY.finditer(done.stdout + done.stderr)]
    assert len(found) == 4  # two head sizes, two dtypes
    for kernel in found:
        assert int(kernel["registers"]) <= 128  # handed round as 48, 184 and 96
        assert (kernel["stack"], kernel["stores"], kernel["loads"]) == ("0", "0", "0"), kernel
    assert not re.findall(r".*\(C75\d\d\).*", done.stdout + done.stderr)
    code = subprocess.run([tool, "--dump-sass", made], capture_output=True, text=True).stdout
    kernels = code.split("Function : ")[1:]
    assert len(kernels) == 4
    for kernel in kernels:
        for instruction in TENSOR:
            assert instruction in kernel, instruction
        # of each half: scores in steps of 16 columns, before the loop and in it, and 128 keys in steps of 16
        size = 64 if "ELi64E" in kernel.split("\n")[0] else 128
        assert kernel.count("UTCHMMA") == 4 * size // 16 + 2 * 128 // 16
        assert not re.search(r"\b(HMMA|HGMMA|IMMA)\b", kernel)


def test_the_module_imports_without_a_driver(built, tmp_path):
    (module,) = built.folder.glob("_cuda*" + importlib.machinery.EXTENSION_SUFFIXES[0])
    libraries = subprocess.run(["ldd", module], capture_output=True, text=True).stdout
    assert not [word for word in ("libcuda", "libtorch", "libc10") if word in libraries]
    code = f"""
import importlib.machinery, importlib.util
loader = importlib.machinery.ExtensionFileLoader("_cuda", {str(module)!r})
cuda = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda", loader))
loader.exec_module(cuda)
print(cuda.architectures, cuda.toolkit_version() >= 110, cuda.driver_version() >= 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [";".join(built.archs), "True", "True"], done.stderr


def _setup(*arguments, before="pass", **env):
    """Runs setup.py after some Python code, without the CPU module."""
    code = f"import runpy, shutil, sys; {before}; sys.argv = ['setup.py', *sys.argv[1:]]; runpy.run_path('setup.py')"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env={**os.environ, "FASTLM_CPU": "0", **env},
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_build_says_that_it_leaves_the_kernels_out():
    done = _setup("--name", FASTLM_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "fastlm: without the CUDA kernels (FASTLM_CUDA=0)" in done.stdout


NOWHERE = "shutil.which = lambda *_, **__: None"  # no compiler in any place


def test_without_nvcc_the_build_goes_on():
    done = _setup("--name", before=NOWHERE, FASTLM_CUDA="")
    assert done.returncode == 0, done.stderr
    why = "no nvcc by CUDA_HOME, on PATH or in /usr/local/cuda"
    assert done.stdout.splitlines() == [f"fastlm: without the CUDA kernels ({why})", "fastlm"]


def test_asking_for_the_kernels_without_nvcc_is_an_error():
    done = _setup("--name", before=NOWHERE, FASTLM_CUDA="1")
    assert done.returncode != 0
    assert "fastlm: FASTLM_CUDA=1 asks for the CUDA kernels, but there is no nvcc" in done.stderr


def _older_nvcc(folder):
    """A compiler that knows nothing after Hopper."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_80 sm_86 sm_90 sm_90a\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize(
    ("asked", "built"), [("", "sm_80, sm_90a"), ("80;90a", "sm_80, sm_90a"), (" 86 ; ", "sm_86")], ids=repr
)
def test_architectures(tmp_path, asked, built):
    """FASTLM_CUDA_ARCHS, or what the compiler knows of ours; CUDA_HOME's compiler comes before the one on PATH."""
    home, path = _older_nvcc(tmp_path / "home"), _older_nvcc(tmp_path / "path")
    env = {"PATH": f"{path.parent}:{os.environ['PATH']}", "FASTLM_CUDA": "", "FASTLM_CUDA_ARCHS": asked}
    for cuda_home, nvcc in ((str(tmp_path / "home"), home), ("", path)):
        done = _setup("--name", CUDA_HOME=cuda_home, **env)
        assert done.returncode == 0, done.stderr
        assert f"fastlm: CUDA kernels for {built} by {nvcc};" in done.stdout
