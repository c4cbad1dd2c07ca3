"""Builds the CUDA kernels for the CPU and loads them in the place of fastlm._cuda.

Objects are kept by the hash of what they are made of, in a folder of the user under the system's temporary one, so that
a session builds once, and processes that test in parallel wait for one another.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi")


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "").split(" ")[-1] or "g++")


def _sources() -> list[Path]:
    return [CSRC / "bindings/bindings_cuda.cpp", *sorted(CSRC.glob("cuda/*.cu")), *sorted(HERE.glob("*.c*[pu]"))]


def _headers() -> list[Path]:
    return sorted(
        [
            *CSRC.glob("bindings/*.h"),
            *CSRC.glob("cuda/*.cuh"),
            *CSRC.glob("cuda/*.h"),
            *HERE.glob("*.cuh"),
            *HERE.glob("*.h"),
        ]
    )


def digest(*parts: bytes | str) -> str:
    """A short name for what `parts` hold."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
        found.update(b"\0")
    return found.hexdigest()[:24]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def make(target: Path, command: list[str]) -> Path:
    """The file that `command -o FILE` makes, complete or not at all."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            _run([*command, "-o", str(made)])
            made.rename(target)
    return target


def cache_folder() -> Path:
    """The user's own folder of things that tests build once."""
    folder = Path(tempfile.gettempdir()) / f"fastlm-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(folder: Path, what: str = "emulation") -> Iterator[None]:
    """Only one process at a time inside, of those that make the same."""
    with open(folder / f"{what}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build() -> Path:
    """The emulated extension module's file."""
    import pybind11

    cxx = str(compiler())
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    common = [digest(path.name, path.read_bytes()) for path in _headers()]
    includes = [f"-I{HERE}", f"-I{CSRC / 'cuda'}", f"-I{CSRC}"]
    python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]

    def compiled(source: Path) -> Path:
        key = digest(*common, version, *FLAGS, *python, source.name, source.read_bytes())
        return make(
            folder / f"{source.stem}-{key}.o", [cxx, *FLAGS, *includes, *python, "-x", "c++", "-c", str(source)]
        )

    with locked(folder := cache_folder()):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(path) for path in pool.map(compiled, _sources())]
        return make(folder / f"_cuda-{digest(*objects)}.so", [cxx, "-shared", *objects])


class Emulated:
    """The emulated module: its functions run as launches that may touch the tensors of their call and nothing else."""

    def __init__(self, file: Path):
        loader = importlib.machinery.ExtensionFileLoader("fastlm_emulated._cuda", str(file))
        spec = importlib.util.spec_from_loader(loader.name, loader)
        assert spec is not None
        self._module = importlib.util.module_from_spec(spec)
        loader.exec_module(self._module)
        self._library = ctypes.CDLL(str(file))
        self._library.fastlm_emulation_allow.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        self._library.fastlm_emulation_order.argtypes = (ctypes.c_uint64,)
        self._library.fastlm_emulation_fault.restype = ctypes.c_char_p

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        if not callable(value):
            return value

        def call(*args):
            try:
                return value(*args)
            finally:
                self._library.fastlm_emulation_forget()

        setattr(self, name, call)
        return call

    def pointer(self, t: Tensor | None) -> int:
        """The address of a tensor, whose elements the next launch may touch."""
        if t is None:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        if t.numel():
            self._library.fastlm_emulation_allow(t.data_ptr(), (last + 1) * t.element_size())
        return t.data_ptr()

    def set_order(self, seed: int) -> None:
        """The order of blocks, warps and lanes: ascending for 0, else drawn anew for each launch."""
        self._library.fastlm_emulation_order(seed)

    def set_device(self, architecture: int = 90, multiprocessors: int = 3) -> None:
        """What launches are planned for."""
        self._library.fastlm_emulation_device(architecture, multiprocessors)

    def fault(self, name: str) -> str:
        """What the emulation says about a kernel of faults.cu; empty where it finds nothing wrong."""
        return self._library.fastlm_emulation_fault(name.encode()).decode()
