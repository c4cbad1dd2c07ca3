"""Builds fastlm's extension modules; everything else is in pyproject.toml.

torch is neither imported nor needed here: kernels take raw pointers, so one build serves every torch
release. FASTLM_CPU=0 skips the CPU module, FASTLM_CUDA=0 the CUDA module, =1 makes a failed build an
error; unset, a failed build leaves a working package without that module. pip shows nothing of that, so the
reason why there is no such module is written beside where it would be, and the commands show it. The CUDA
module is tried where nvcc is found: by CUDA_HOME, on PATH, or in /usr/local/cuda. FASTLM_CUDA_ARCHS="80;90a" names what
to compile it for. FASTLM_JOBS is how many files are compiled at a time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

ParallelCompile("FASTLM_JOBS").install()

LEFT_OUT: dict[str, str] = {}  # modules that this build does not try, and why

CPU_FLAGS = [
    "-O3",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]  # gcc 12 warns inside its own avx512fintrin.h
CUDA_ARCHS = ("80", "90a", "100", "120")  # Ampere and Ada, Hopper, Blackwell, its consumer GPUs
CUDA_FLAGS = ["-std=c++17", "-O3", "-Icsrc/cuda", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-warn-spills"]


def cpu_extension() -> Pybind11Extension | None:
    """The CPU module, or None where it is not asked for."""
    if os.environ.get("FASTLM_CPU") == "0":
        LEFT_OUT["fastlm._cpu"] = "it was installed with FASTLM_CPU=0"
        return None
    flags, link = CPU_FLAGS, ["-fopenmp"]
    if sys.platform == "darwin":  # Apple's clang ships no OpenMP: single-threaded kernels
        flags, link = [f for f in CPU_FLAGS if f != "-fopenmp"], []
    return Pybind11Extension(
        "fastlm._cpu",
        sources=["csrc/bindings/bindings_cpu.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=sorted(glob("csrc/cpu/*.h") + glob("csrc/bindings/*.h")),
        include_dirs=["csrc"],
        cxx_std=17,
        extra_compile_args=flags,
        extra_link_args=link,
        optional=os.environ.get("FASTLM_CPU", "") != "1",
    )


def find_nvcc() -> str | None:
    """CUDA_HOME's compiler, else the one on PATH, else the usual place's."""
    places = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"),) if home] + [
        None,
        Path("/usr/local/cuda/bin"),
    ]
    return next(filter(None, (shutil.which("nvcc", path=place and str(place)) for place in places)), None)


def cuda_archs(nvcc: str) -> list[str]:
    """FASTLM_CUDA_ARCHS, or what this compiler knows of CUDA_ARCHS."""
    if asked := os.environ.get("FASTLM_CUDA_ARCHS"):
        return [arch.strip() for arch in asked.split(";") if arch.strip()]
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, timeout=60).stdout.split()
    return [arch for arch in CUDA_ARCHS if f"sm_{arch.rstrip('a')}" in known]


def archs_of(source: str, archs: list[str]) -> list[str]:
    """What a source is compiled for: sm_100a in sm_100's place where its kernels need what sm_103 need not have."""
    if not source.endswith("_sm100.cu"):
        return archs
    return list(dict.fromkeys("100a" if arch == "100" else arch for arch in archs))


def cuda_runtime(nvcc: str) -> str:
    """The static runtime library of nvcc's toolkit: the module imports without a driver and needs no toolkit."""
    dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]  # nvcc may be a script elsewhere
    said = subprocess.run(dry_run, capture_output=True, text=True, timeout=60).stderr
    home = Path(next((line.partition("TOP=")[2] for line in said.splitlines() if "TOP=" in line), "")).resolve()
    for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        if (home / folder / "libcudart_static.a").exists():
            return str(home / folder / "libcudart_static.a")
    raise CompileError(f"no libcudart_static.a in {home}, the toolkit of {nvcc}")


def cuda_sources(nvcc: str) -> str:
    """A hash of the CUDA kernels' sources and of their compiler, which a proof of them holds for."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    found = hashlib.sha256(said.encode())
    for path in sorted(path for folder in ("csrc/cuda", "csrc/bindings") for path in Path(folder).iterdir()):
        found.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def cuda_extension() -> Pybind11Extension | None:
    """The CUDA module, or None where it is not asked for or can't be built."""
    wanted = os.environ.get("FASTLM_CUDA", "")
    nvcc = None if wanted == "0" else find_nvcc()
    if nvcc is None:
        why = "FASTLM_CUDA=0" if wanted == "0" else "no nvcc by CUDA_HOME, on PATH or in /usr/local/cuda"
        if wanted == "1":
            raise SystemExit(f"fastlm: FASTLM_CUDA=1 asks for the CUDA kernels, but there is {why}")
        print(f"fastlm: without the CUDA kernels ({why})")
        LEFT_OUT["fastlm._cuda"] = f"it was installed with {why}"
        return None
    archs = cuda_archs(nvcc)
    print(f"fastlm: CUDA kernels for {', '.join(f'sm_{a}' for a in archs)} by {nvcc}; FASTLM_CUDA=0 leaves them out")
    return Pybind11Extension(
        "fastlm._cuda",
        sources=["csrc/bindings/bindings_cuda.cpp"],
        depends=[],
        include_dirs=["csrc"],
        define_macros=[
            ("FASTLM_CUDA_ARCHS", f'"{";".join(archs)}"'),
            ("FASTLM_CUDA_SOURCES", f'"{cuda_sources(nvcc)}"'),
        ],
        cxx_std=17,
        extra_compile_args=["-O2", "-fvisibility=hidden"],
        extra_link_args=["-lpthread", "-ldl", "-lrt"],
        optional=wanted != "1",
    )


def compile_cuda(folder: Path) -> list[str]:
    """Object files of csrc/cuda/*.cu, each made anew where anything it may be made of is newer."""
    nvcc = find_nvcc()
    assert nvcc is not None
    folder.mkdir(parents=True, exist_ok=True)
    archs = cuda_archs(nvcc)
    has = {"90a": "90a" in archs, "100a": "100" in archs or "100a" in archs}
    without = [f"-DFASTLM_WITHOUT_SM{arch.upper()}" for arch, there in has.items() if not there]  # empty kernels
    newest = max(path.stat().st_mtime for path in Path("csrc/cuda").iterdir())

    def compiled(source: str) -> str:
        made = folder / f"{Path(source).stem}-{'-'.join(archs)}.o"
        if made.exists() and made.stat().st_mtime > newest:
            return str(made)
        partial = made.with_suffix(".partial.o")  # an interrupted compilation leaves no object that looks made
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs_of(source, archs)]
        command = [nvcc, *CUDA_FLAGS, *targets, *without, "-c", source, "-o", str(partial)]
        print(" ".join(command))
        if subprocess.run(command).returncode != 0:
            raise CompileError(f"nvcc failed on {source}")
        partial.replace(made)
        return str(made)

    with ThreadPoolExecutor(int(os.environ.get("FASTLM_JOBS") or os.cpu_count() or 1)) as pool:
        return [*pool.map(compiled, sorted(glob("csrc/cuda/*.cu"))), cuda_runtime(nvcc)]


def why_it_failed(error: Exception, said: str) -> str:
    """One line for a build that failed: what to install where that is known, else the compiler's first error."""
    if isinstance(error.__cause__ or error, FileNotFoundError) or "No such file or directory" in str(error):
        return f"there was no C++ compiler ({error})"
    if "Python.h" in said:
        return "Python's headers (Python.h) were not there"
    lines = [line for line in said.splitlines() if "error" in line.lower() or line.startswith("nvcc fatal")]
    return f"its build failed ({(lines or [str(error)])[0].strip()[:300]})"


@contextmanager
def output_of_children():
    """A function that returns what commands have written since; they write it out at the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as kept:
        for descriptor in (1, 2):
            os.dup2(kept.fileno(), descriptor)

        def said() -> bytes:
            kept.seek(0)
            return kept.read()

        try:
            yield lambda: said().decode(errors="replace")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), before, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
            os.write(2, said())


class BuildExtensions(build_ext):
    def run(self):
        self.reasons: dict[str, str] = {}
        super().run()
        for ext in self.extensions or []:
            folder = "." if self.inplace or self.editable_mode else self.build_lib
            write_reason(folder, ext.name, self.reasons.get(ext.name, ""))

    def build_extension(self, ext):
        with output_of_children() as said:
            try:
                if ext.name == "fastlm._cuda":
                    ext.extra_objects = compile_cuda(Path(self.build_temp) / "cuda")
                super().build_extension(ext)
            except Exception as error:
                self.reasons[ext.name] = why_it_failed(error, said())
                raise CompileError(str(error)) from error


class BuildPython(build_py):
    def run(self):
        super().run()
        for module, reason in LEFT_OUT.items():
            write_reason("." if self.editable_mode else self.build_lib, module, reason)


def write_reason(folder: str, module: str, reason: str) -> None:
    """Say beside a module's place why it is not there, or nothing where it is: fastlm/_cpu_missing.txt."""
    path = Path(folder) / f"{module.replace('.', '/')}_missing.txt"
    path.unlink(missing_ok=True)
    if reason:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reason + "\n", encoding="utf-8")


class SourceDistribution(sdist):
    def make_distribution(self):
        self.filelist.extend(sorted(glob("csrc/*.cpp") + glob("csrc/*/*")))  # whatever is built here
        super().make_distribution()


setup(
    ext_modules=[
        *filter(None, [cpu_extension(), cuda_extension()]),
    ],
    cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython, "sdist": SourceDistribution},
)
