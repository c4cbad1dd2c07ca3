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
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastlm._core.architecture import GFX942, SM90, Architecture, parse
from fastlm._core.registry import ops
from fastlm.kernels import _common

# What the kernels are for. EVERY: all of their configurations are compiled; the others take the rows of one of these
# and much the same code is made for them, so that of each kernel the configuration with the largest tile is.
EVERY = tuple(map(parse, ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100")))
LARGEST = tuple(map(parse, ("sm_86", "sm_89", "sm_103", "sm_120", "gfx950", "gfx1201")))
SAMPLE = "_attention_fwd_kernel", "_norm_fwd_split_kernel"
NVIDIA = Path(triton.__file__).parent / "backends/nvidia/bin"


def gpu_target(arch: Architecture) -> GPUTarget:
    """As Triton calls an architecture."""
    if arch.vendor == "nvidia":
        return GPUTarget("cuda", arch.number, arch.wavefront)
    return GPUTarget("hip", str(arch), arch.wavefront)


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


def distinct(arch: Architecture) -> dict[str, tuple]:
    """The compilations of one architecture by a name of what sets them apart."""
    _common.ASSUMED_ARCHITECTURE = arch
    found = {}
    for case in (case for op in launch_files() for case in op.cases()):
        for launch in recorded(case):
            kernel, options, signature, constants, attributes = specialized(launch, gpu_target(arch))
            names = list(signature)
            values = {names[path[0]]: value for path, value in constants.items()}
            types = f"{sorted(set(signature.values()))}, {sum(map(len, attributes.values()))} known"
            name = f"{arch} {kernel.__name__} {values} warps={options.num_warps} stages={options.num_stages} {types}"
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


def nvidia_resources(cubin: bytes) -> dict[str, int]:
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


# Of what a code object says of its kernel ("Code Object V5 Metadata" of LLVM's user guide for AMDGPU), by NVIDIA's
# names where they have the same. Vector registers count those of matrix products too.
AMD_METADATA = {
    "vgpr_count": "REG",
    "agpr_count": "AGPR",
    "sgpr_count": "SGPR",
    "vgpr_spill_count": "spills",
    "sgpr_spill_count": "SGPR spills",
    "private_segment_fixed_size": "STACK",
    "group_segment_fixed_size": "SHARED",
    "wavefront_size": "wavefront",
}


def amd_resources(assembly: str) -> dict[str, int]:
    """What the metadata at the end of the assembler's text says."""
    metadata = assembly.partition(".amdgpu_metadata")[2]
    found = re.findall(rf"^ *(?:- )?\.({'|'.join(AMD_METADATA)}): +(\d+)$", metadata, re.MULTILINE)
    waves = re.findall(r"^; Occupancy: (\d+)$", assembly, re.MULTILINE)
    return {AMD_METADATA[key]: int(value) for key, value in found} | {"LOCAL": 0, "waves": int(waves[0])}


# Products of matrices, and loads from global memory, in PTX and in AMD's assembly.
INSTRUCTIONS = {
    "nvidia": {
        "wgmma": r"wgmma\.mma_async",
        "tcgen05": r"tcgen05\.mma",
        "mma": r"\bmma\.sync",
        "loads": r"\bld\.global|\bcp\.async\.c[ag]\.shared",
        "16-byte loads": r"\bld\.global\S*\.(?:v4\.b32|v2\.b64)|\bcp\.async\.cg\.shared",
    },
    "amd": {
        "mfma": r"\bv_s?mfmac?_",
        "wmma": r"\bv_s?wmmac?_",
        "loads": r"\b(?:global|buffer)_load_",
        "16-byte loads": r"\b(?:global|buffer)_load_(?:dwordx4|b128)",
    },
}


def measured(arch: Architecture, compiled: Any) -> dict[str, int]:
    """Resources of a compiled kernel, and how many of the instructions above it has."""
    nvidia = arch.vendor == "nvidia"
    code = compiled.asm["ptx" if nvidia else "amdgcn"]
    used = nvidia_resources(compiled.asm["cubin"]) if nvidia else amd_resources(code)
    counts = {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS[arch.vendor].items()}
    return used | {"dynamic": compiled.metadata.shared} | counts


def kind_of(compilation: tuple) -> tuple[str, bool]:
    """Which kernel; LayerNorm and RMSNorm share theirs."""
    kernel, _, signature, constants, _ = compilation
    names = list(signature)
    return kernel.__name__, any(names[path[0]] == "CENTRED" and value for path, value in constants.items())


def size_of(compilation: tuple) -> tuple[int, int]:
    """(elements of the tile, arguments that are there): by what a kernel's demand for registers grows."""
    _, _, signature, constants, _ = compilation
    names, sides = list(signature), []
    for path, value in constants.items():
        constant = value._asdict() if hasattr(value, "_asdict") else {names[path[0]]: value}
        sides += [side for name, side in constant.items() if name in ("M", "N", "ROWS") or name.startswith("BLOCK_")]
    return math.prod(filter(None, sides)), -len(constants)


def chosen(every: bool) -> Iterator[tuple[Architecture, str, tuple]]:
    """(architecture, name, compilation): what EVERY and LARGEST say, or of each kernel the first for one architecture.

    For AMD then the two of SAMPLE alone.
    """
    for arch in EVERY + LARGEST if every else (SM90, GFX942):
        found = distinct(arch)
        of_kind: dict[tuple, list[str]] = {}
        for name, compilation in found.items():
            of_kind.setdefault(kind_of(compilation), []).append(name)
        if every and arch in EVERY:
            names = list(found)
        elif every:
            names = [max(same, key=lambda name: size_of(found[name])) for same in of_kind.values()]
        else:
            names = [same[0] for kind, same in of_kind.items() if arch == SM90 or kind[0] in SAMPLE]
        yield from ((arch, name, found[name]) for name in names)


def compile_share(every: bool, share: int, shares: int) -> None:
    """Compile this share of the chosen kernels; a JSON line each."""
    for i, (arch, name, (kernel, options, signature, constants, attributes)) in enumerate(chosen(every)):
        if i % shares == share:
            _common.ASSUMED_ARCHITECTURE = arch
            source = ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=gpu_target(arch), options=options.__dict__)
            line = {"name": name, "arch": str(arch), "warps": options.num_warps, **measured(arch, compiled)}
            print(json.dumps(line), flush=True)


def compile_keys() -> None:
    """For calls that differ in row count, seed and probability alone: the kernels' compile keys, a JSON line each."""
    rows = ((2, 0.5, 1), (16, 0.1, -1), (17, 0.3, 2**62), (4096, 0.9, 0), (1_000_003, 0.01, 2**31))
    for op, (M, p, seed) in itertools.product(launch_files(), rows):
        for name, call in op.calls(M, p, seed).items():
            keys = [specialized(launch, gpu_target(SM90)) for launch in recorded(call)]
            lines = [f"{kernel.__name__} {options.hash()} {rest}" for kernel, options, *rest in keys]
            print(json.dumps({"op": name, "M": M, "keys": sorted(k for k in lines if "_sum_partials" not in k)}))


if __name__ == "__main__":
    if sys.argv[1] == "keys":
        compile_keys()
    else:
        compile_share(sys.argv[1] == "all", int(sys.argv[2]), int(sys.argv[3]))
