"""Compiles the Triton kernels for GPUs that are not there, exactly as their launchers would launch them.

The launchers run on meta tensors with the launch itself recorded, so types, alignment, constants and options are a
real launch's own; with what arguments, tools/launches says. Run as a script by tests/backends/test_aot_compile.py,
outside the interpreter, once per share of the work:
    python tools/aot.py one SHARE SHARES | all SHARE SHARES | keys
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastlm._core.registry import ops
from fastlm.kernels import _common

TARGETS = (80, 90, 100)
NVIDIA = Path(triton.__file__).parent / "backends/nvidia/bin"


def launch_files() -> Iterator[ModuleType]:
    """The files of tools/launches, one for each op with Triton kernels."""
    for stem in dict.fromkeys(op.stem for op in ops() if op.backend("triton")):
        yield importlib.import_module(f"launches.{stem}")


def recorded(call: Callable[[], None]) -> list[tuple[JITFunction, tuple, dict]]:
    """What `call` launches."""
    launches: list = []
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append((self, args, kwargs))
    try:
        call()
    finally:
        JITFunction.run = run
    return launches


def specialized(launch: tuple, target: GPUTarget) -> tuple:
    """(kernel, options, signature, constants, attributes) that Triton's run-time would compile for a launch."""
    kernel, args, kwargs = launch
    backend = make_backend(target)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs
    )
    options, *rest = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return kernel, options, *rest


def distinct(arch: int) -> dict[str, tuple]:
    """The compilations of one architecture by a name of what sets them apart."""
    _common.ASSUMED_ARCHITECTURE = arch
    found = {}
    for case in (case for op in launch_files() for case in op.cases()):
        for launch in recorded(case):
            kernel, options, signature, constants, attributes = specialized(launch, GPUTarget("cuda", arch, 32))
            names = list(signature)
            values = {names[path[0]]: value for path, value in constants.items()}
            types = f"{sorted(set(signature.values()))}, {sum(map(bool, attributes.values()))} aligned"
            name = f"sm_{arch} {kernel.__name__} {values} warps={options.num_warps} stages={options.num_stages} {types}"
            found[name] = (kernel, options, signature, constants, attributes)
    return found


def accesses_in_loops(code: str) -> int:
    """How often a disassembled kernel reads or writes its stack between a jump back and what it jumps to.

    Up to where it reads its program's id anew: what attention makes again, where a result is not finite, runs rarely.
    """
    labels: dict[str, int] = {}
    accesses, loops = [], []
    for place, line in enumerate(code.splitlines()):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = place
        elif re.search(r"\b(LDL|STL)\b", line):
            accesses.append(place)
        elif (jump := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and jump[1] in labels:
            loops.append((labels[jump[1]], place))
        elif loops and "SR_CTAID.X" in line:
            break
    return sum(any(first < place < last for first, last in loops) for place in accesses)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, bytes of stack, shared and local memory, and how often the stack is used inside loops."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output(tool: str, *options: str) -> str:
            command = [str(NVIDIA / tool), *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        sizes = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", output("cuobjdump", "--dump-resource-usage"))
        used = {key: int(value) for key, value in sizes}
        return used | {"spills": accesses_in_loops(output("nvdisasm", "-c")) if used["STACK"] else 0}


def chosen(every: bool) -> Iterator[tuple[int, str, tuple]]:
    """(architecture, name, compilation): all of them, or for one architecture the first of each kernel."""
    seen = set()
    for arch in TARGETS if every else (90,):
        for name, compilation in distinct(arch).items():
            kind = compilation[0].__name__, "'CENTRED': True" in name  # LayerNorm and RMSNorm share their kernels
            if every or kind not in seen:
                seen.add(kind)
                yield arch, name, compilation


def compile_share(every: bool, share: int, shares: int) -> None:
    """Compile this share of the chosen kernels; a JSON line each."""
    for i, (arch, name, (kernel, options, signature, constants, attributes)) in enumerate(chosen(every)):
        if i % shares == share:
            _common.ASSUMED_ARCHITECTURE = arch
            source = ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options.__dict__)
            used = resources(compiled.asm["cubin"]) | {"dynamic": compiled.metadata.shared}
            used["wgmma"] = compiled.asm["ptx"].count("wgmma.mma_async")
            print(json.dumps({"name": name, "arch": arch, "warps": options.num_warps, **used}), flush=True)


def compile_keys() -> None:
    """For calls that differ in row count, seed and probability alone: the kernels' compile keys, a JSON line each."""
    rows = ((2, 0.5, 1), (16, 0.1, -1), (17, 0.3, 2**62), (4096, 0.9, 0), (1_000_003, 0.01, 2**31))
    for op, (M, p, seed) in itertools.product(launch_files(), rows):
        for name, call in op.calls(M, p, seed).items():
            keys = [specialized(launch, GPUTarget("cuda", 90, 32)) for launch in recorded(call)]
            lines = [f"{kernel.__name__} {options.hash()} {rest}" for kernel, options, *rest in keys]
            print(json.dumps({"op": name, "M": M, "keys": sorted(k for k in lines if "_sum_partials" not in k)}))


if __name__ == "__main__":
    if sys.argv[1] == "keys":
        compile_keys()
    else:
        compile_share(sys.argv[1] == "all", int(sys.argv[2]), int(sys.argv[3]))
