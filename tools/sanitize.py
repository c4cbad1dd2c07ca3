"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

Builds csrc/cpu once more with both, in a folder of its own with objects kept by the hash of what they are made of, and
runs the tests of the ops on it. torch's tensors come from the sanitizers' allocator, so that a kernel that reads or
writes beside one of them is found; so are misaligned loads, overflows, and shifts and offsets that C++ does not define.

Arguments go to pytest in place of the choice below. Exit status: pytest's; 2 without the compiler.
As a pytest plugin (`-p sanitize`), puts the extension that $FASTLM_SANITIZED names in the place of the installed one.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "sanitize"
VARIABLE = "FASTLM_SANITIZED"
# Without optimization, which takes twice as long to compile and hides what it makes of undefined behaviour.
FLAGS = ("-std=c++17", "-O0", "-g1", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they have until the process ends
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",
}
# The sanitizers write to the file descriptor, which pytest would keep from a process that they end.
PYTEST = (sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-p", "sanitize")
IN_PARALLEL = ("-n", "logical", "--maxprocesses", "8", "--dist", "worksteal")
# Every kernel on every instruction set of the machine, by small shapes; without what repeats them many times over.
TESTS = {
    "ops": ("layouts",),  # and each op's own
    "backends": ("products", "vec"),
    "training": ("adamw",),
    "compression": ("quantize",),
    "inference": ("decoder",),
}
LEFT_OUT = (
    "triton", "cuda", "compile", "traced", "registered", "opcheck", "gradcheck", "func_transforms", "same_bits",
    "closer_to_the_truth", "follow_steps",
)  # fmt: skip


def _build(cxx: str) -> Path:
    """The extension module's file."""
    import pybind11

    from emulation.build import digest, make

    found = [*CSRC.rglob("bindings_cpu*.cpp"), *CSRC.glob("cpu/**/*.cpp")]
    sources = sorted(found, key=lambda path: ("norm" not in path.stem, path))  # those that take longest go first
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, timeout=60).stdout
    common = [digest(path.name, path.read_bytes()) for path in sorted(CSRC.glob("**/*.h"))]
    includes = [f"-I{CSRC}", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    flags = [*FLAGS, *SANITIZERS, *includes]

    def compiled(source: Path) -> str:
        key = digest(*common, version, *flags, source.name, source.read_bytes())
        return str(make(FOLDER / f"{source.stem}-{key}.o", [cxx, *flags, "-c", str(source)]))

    FOLDER.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [*pool.map(compiled, sources)]
    return make(FOLDER / f"_cpu-{digest(*objects)}.so", [cxx, "-shared", "-fopenmp", *SANITIZERS, *objects])


def _library(cxx: str, name: str) -> str:
    found = subprocess.run([cxx, f"-print-file-name={name}"], capture_output=True, text=True, timeout=60)
    return found.stdout.strip()


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    from emulation.build import compiler

    cxx = compiler()
    if cxx is None:
        print("sanitize: there is no C++ compiler")
        return 2
    module = _build(cxx)
    preloaded = " ".join(_library(cxx, name) for name in ("libasan.so", "libstdc++.so"))
    paths = os.pathsep.join(filter(None, (str(ROOT / "tools"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | OPTIONS | {VARIABLE: str(module), "LD_PRELOAD": preloaded, "PYTHONPATH": paths}
    chosen = arguments or [*IN_PARALLEL, "-k", " and ".join(f"not {name}" for name in LEFT_OUT), *_tests()]
    return subprocess.run([*PYTEST, *chosen], env=environment, cwd=ROOT).returncode


def _tests() -> list[str]:
    from fastlm._core.registry import stems  # not above: the plugin comes before fastlm

    named = {**TESTS, "ops": (*TESTS["ops"], *stems())}
    return [str(ROOT / f"tests/{folder}/test_{name}.py") for folder, names in named.items() for name in names]


def _install(file: str) -> None:
    """Let `import fastlm._cpu` find the module of that file."""
    loader = importlib.machinery.ExtensionFileLoader("fastlm._cpu", file)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[loader.name] = module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
if VARIABLE in os.environ:
    _install(os.environ[VARIABLE])
