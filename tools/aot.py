"""Compiles the Triton kernels for GPUs that are not there, exactly as their launchers would launch them.

The launchers run on meta tensors with the launch itself recorded, so types, alignment, constants and options are a
real launch's own; with what arguments, tools/launches says. Run as a script by tests/backends/test_aot_compile.py,
outside the interpreter, once per share of the work:
    python tools/aot.py one SHARE SHARES | all SHARE SHARES | keys
FASTLM_AOT_RESULTS names a folder that keeps results, so that only what has changed is compiled again.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import aot_resources
from fastlm._core.architecture import GFX942, SM90, Architecture, parse
from fastlm._core.registry import ops
from fastlm.kernels import _common

# What the kernels are for. EVERY: all of their configurations are compiled; the others take the rows of one of these
# and much the same code is made for them, so that of each kernel the configuration with the largest tile is.
EVERY = tuple(map(parse, ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100")))
LARGEST = tuple(map(parse, ("sm_86", "sm_89", "sm_103", "sm_120", "gfx950", "gfx1201")))
SAMPLE = "_attention_fwd_kernel", "_norm_fwd_split_kernel"


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


def intermediate(source: ASTSource, target: GPUTarget, options: Any) -> str:
    """What Triton makes of a kernel's source first, without names of files and numbers of lines."""
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    makers = backend.get_codegen_implementation(options), backend.get_module_map()
    return source.make_ir(target, options, *makers, context).str_nodebug()


def result_of(arch: Architecture, compilation: tuple) -> dict[str, Any]:
    """What aot_resources.measured says of a compilation; kept, where a folder is named, by all that it depends on."""
    kernel, options, signature, constants, attributes = compilation
    _common.ASSUMED_ARCHITECTURE = arch
    source, target = ASTSource(kernel, signature, constants, attributes), gpu_target(arch)
    kept = None
    if folder := os.environ.get("FASTLM_AOT_RESULTS"):
        parts = intermediate(source, target, options), options, triton.__version__, inspect.getsource(aot_resources)
        kept = Path(folder) / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.json"
        if kept.exists():
            return json.loads(kept.read_text())
    result = aot_resources.measured(arch, triton.compile(source, target=target, options=options.__dict__))
    if kept is not None:
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(result))
        partial.replace(kept)
    return result


def compile_share(every: bool, share: int, shares: int) -> None:
    """Compile this share of the chosen kernels; a JSON line each."""
    for i, (arch, name, compilation) in enumerate(chosen(every)):
        if i % shares == share:
            line = {"name": name, "arch": str(arch), "warps": compilation[1].num_warps, **result_of(arch, compilation)}
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
