"""Compiles the Triton kernels for GPUs that are not there, exactly as their launchers would launch them.

The launchers run on meta tensors with the launch itself recorded, so types, alignment, constants and options are a
real launch's own. Run as a script by tests/backends/test_aot_compile.py, outside the interpreter, once per share of
the work:
    python tools/aot.py one SHARE SHARES | all SHARE SHARES | keys
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastlm.kernels import _common, _norm, attention, cross_entropy, gelu, layer_norm, rms_norm, rotary, swiglu

TARGETS = (80, 90, 100)
BF16, FP32 = torch.bfloat16, torch.float32
NVIDIA = Path(triton.__file__).parent / "backends/nvidia/bin"


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layer_norm_pair(M: int, N: int, full: bool, dtype: torch.dtype = BF16, p: float = 0.1, seed: int = 7) -> None:
    """Forward and backward: plain, or with an fp32 residual stream, dropout and every optional tensor."""
    x, w, b, rows = empty(M, N, dtype=dtype), empty(N), empty(N), empty(M, dtype=FP32)
    stream = empty(M, N, dtype=FP32)
    if full:
        layer_norm.layer_norm_fwd(x, stream, w, b, N, 1e-5, p, seed)
        layer_norm.layer_norm_bwd(stream, stream, w, rows, rows, N, stream, p, seed, dtype)
    else:
        layer_norm.layer_norm_fwd(x, None, w, b, N, 1e-5)
        layer_norm.layer_norm_bwd(x, x, w, rows, rows, N)


def gelu_pair(M: int, N: int, full: bool, tanh: bool, dtype: torch.dtype = BF16, p: float = 0.1, seed: int = 5) -> None:
    x, bias = empty(M, N, dtype=dtype), empty(N) if full else None
    p = p if full else 0.0
    gelu.gelu_fwd(x, bias, tanh, p, seed)
    gelu.gelu_bwd(x, x, bias, tanh, p, seed)


def cross_entropy_pair(M: int, N: int, full: bool, dtype: torch.dtype = BF16, ignore_index: int = -100) -> None:
    """With the gradient in the forward pass and after it; or, `full`, weighted, smoothed and in windows."""
    x, target, one = empty(M, N, dtype=dtype), empty(M, dtype=torch.int64), empty(dtype=FP32)
    if full:
        w, states, rows = empty(N), empty(M, 5, dtype=FP32), empty(M, dtype=FP32)
        cross_entropy.cross_entropy_fwd(x, target, w, ignore_index, 0.1, 0.5)
        cross_entropy.cross_entropy_update(x, target, w, states, 2048, 2 * N, ignore_index, 0.1)
        cross_entropy.cross_entropy_finish(states, target, w, N, ignore_index, 0.1)
        cross_entropy.cross_entropy_bwd(x, target, w, empty(M, 3, dtype=FP32), rows, ignore_index, 0.1, x, 2048, 2 * N)
    else:
        cross_entropy.cross_entropy_fwd(x, target, None, ignore_index, 0.0, one)
        stats = empty(M, 3, dtype=FP32)
        cross_entropy.cross_entropy_bwd(x, target, None, stats, one, ignore_index, 0.0, x, unless=(one, 1.0))


def rms_norm_pair(M: int, N: int, full: bool, dtype: torch.dtype = BF16) -> None:
    x, w, stream, rstd = empty(M, N, dtype=dtype), empty(N), empty(M, N, dtype=FP32), empty(M, dtype=FP32)
    if full:
        rms_norm.rms_norm_fwd(x, stream, w, N, 1e-5)
        rms_norm.rms_norm_bwd(stream, stream, w, rstd, N, stream, dtype)
    else:
        rms_norm.rms_norm_fwd(x, None, w, N, 1e-5)
        rms_norm.rms_norm_bwd(x, x, w, rstd, N)


def swiglu_pair(M: int, N: int, dtype: torch.dtype = BF16) -> None:
    gate, up = empty(M, 2 * N, dtype=dtype).chunk(2, -1)
    swiglu.swiglu_fwd(gate, up)
    swiglu.swiglu_bwd(empty(M, N, dtype=dtype), gate, up)


def rotary_both(L: int, D: int, R: int, dtype: torch.dtype = BF16) -> None:
    cos = empty(L, R, dtype=FP32)
    for interleaved in (False, True):
        rotary.rotary(empty(4, L, 12, D, dtype=dtype).transpose(1, 2), cos, cos, interleaved, False)


class Attention(NamedTuple):
    """Features of a call, which choose what is compiled; up to 16 queries split the keys."""

    D: int
    Dv: int | None = None
    dtype: torch.dtype = BF16
    mask: str = ""  # bool, or with its gradient: bias (one for all batches) or whole (one for each)
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    p: float = 0.0
    T: int = 1024
    packed: bool = False
    descriptors: bool = False  # what no table turns on yet


def with_descriptors(call: Callable[[], object]) -> None:
    """Run `call` as if the forward pass's table asked for tensor descriptors, where the architecture has them."""
    blocks_for = attention.blocks_for
    on = _common.ASSUMED_ARCHITECTURE >= 90
    attention.blocks_for = lambda *args: blocks_for(*args)._replace(descriptors=on)
    try:
        call()
    finally:
        attention.blocks_for = blocks_for


def attention_pair(B: int, f: Attention, p: float | None = None, seed: int = 7) -> None:
    """Forward and backward (forward alone with descriptors or split keys) of 12 heads in groups of 3."""
    Dv, S = f.Dv or f.D, max(f.T, 1024)
    options = (f.right == 0, 0.125, f.p if p is None else p, seed, f.left, f.right, f.softcap)
    q, out = (empty(B, f.T, 12, size, dtype=f.dtype) for size in (f.D, Dv))
    k, v = (empty(B, S, 4, size, dtype=f.dtype) for size in (f.D, Dv))
    if f.packed:
        q, k, v, out = (x.flatten(0, 1) for x in (q, k, v, out))
        cu, lse = empty(B + 1, dtype=torch.int32), empty(12, B * f.T, dtype=FP32)
        attention.attention_varlen_fwd(q, k, v, cu, cu, *options)
        attention.attention_varlen_bwd(out, lse, q, k, v, cu, cu, out, lse, *options)
        return
    q, k, v, out = (x.transpose(1, 2) for x in (q, k, v, out))
    lse = empty(B, 12, f.T, dtype=FP32)
    masks = {"": None, "bool": empty(B, 1, 1, S, dtype=torch.bool), "bias": empty(12, f.T, S, dtype=f.dtype)[None]}
    masks["whole"] = empty(B, 12, f.T, S, dtype=f.dtype)
    mask = masks[f.mask]
    if f.descriptors:
        with_descriptors(lambda: attention.attention_fwd(q, k, v, mask, *options))
        return
    added = f.mask in ("bias", "whole")
    rest = lse if added else None
    attention.attention_fwd(q, k, v, mask, *options, rest=rest)
    if f.T > 16:
        attention.attention_bwd(out, lse, q, k, v, mask, out, lse, *options, mask_grad=added, rest=rest)


# Every row of every table: with what most models run, and with the features that take the most registers.
ATTENTION = (
    Attention(64, right=0),
    Attention(128, right=0),
    Attention(128, right=0, descriptors=True),
    Attention(64, left=100, right=0, softcap=30.0),
    Attention(80, 128, left=100, right=100, softcap=30.0, packed=True),
    Attention(256, left=100, right=0, softcap=30.0),
    Attention(64, dtype=torch.float16, mask="bias", right=0, p=0.1),
    Attention(64, mask="whole", right=0, softcap=30.0, p=0.1),
    Attention(128, mask="bias", right=0, p=0.1),
    Attention(128, mask="whole", left=100, right=100, softcap=30.0, p=0.1),
    Attention(256, mask="bias", right=0, softcap=30.0, p=0.1),
    Attention(64, dtype=FP32, mask="bias", right=0, p=0.1),
    Attention(128, dtype=FP32, mask="bias", right=0, softcap=30.0, p=0.1),
    Attention(256, dtype=FP32, mask="bias", right=0, p=0.1),
    Attention(128, T=1),
    Attention(256, T=1, mask="bias", right=0, softcap=30.0),
    Attention(256, T=1, dtype=FP32, mask="bool"),
    Attention(128, T=16, mask="bool", p=0.1),
    Attention(256, T=16, mask="bool"),
    Attention(256, T=16, mask="bool", dtype=FP32),
)


def norm_widths(*tables: _common.Table) -> list[int]:
    """The widest row of each tile of the tables."""
    return sorted({tile.block for table in tables for tile in _common.tiles(table, _common.ASSUMED_ARCHITECTURE)})


def cases() -> Iterator[Callable[[], None]]:
    """Calls that together use every kernel in every configuration of the architecture in force."""
    widths = norm_widths(_norm.FORWARD, _norm.BACKWARD)
    for full in (False, True):
        for N in (64, *widths, 65536) if full else (1024, _norm.ONE_BLOCK_BACKWARD, 65536):
            yield partial(layer_norm_pair, 4096, N, full)
            yield partial(rms_norm_pair, 4096, N, full)
        for tanh in (False, True):
            yield partial(gelu_pair, 4096, 3072, full, tanh)
        for N in (1024, 50304):
            yield partial(cross_entropy_pair, 4096, N, full)
    for features in ATTENTION:
        yield partial(attention_pair, 8, features)
    # without 16-byte loads, and with the most bytes a row
    yield lambda: layer_norm_pair(4096, 8191, True)
    yield lambda: layer_norm_pair(4096, 4095, True)
    yield lambda: layer_norm_pair(4096, 16383, True)
    yield lambda: layer_norm_pair(4096, 8191, False)
    yield lambda: layer_norm_pair(4096, 8192, True, p=0.0)
    yield lambda: layer_norm_pair(4096, 8192, False, FP32)
    yield lambda: layer_norm_pair(4096, 8192, True, FP32, p=0.0)
    yield lambda: layer_norm_pair(4096, 16384, False, FP32)
    yield lambda: gelu_pair(4096, 3071, True, False, FP32)
    yield lambda: rms_norm_pair(4096, 4095, True)
    yield lambda: rms_norm_pair(4096, 8191, False)
    yield lambda: rms_norm_pair(4096, 16383, True)
    yield lambda: rms_norm_pair(4096, 8192, False, FP32)
    yield lambda: rms_norm_pair(4096, 16384, False, FP32)
    yield lambda: swiglu_pair(4096, 11008)
    yield lambda: swiglu_pair(4096, 2731, FP32)
    yield lambda: rotary_both(1024, 128, 64)
    yield lambda: rotary_both(1024, 80, 16, FP32)
    yield lambda: cross_entropy_pair(4096, 50257, False)
    yield lambda: cross_entropy_pair(4096, 50257, True, FP32)


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
    for case in cases():
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
            if every or compilation[0].__name__ not in seen:
                seen.add(compilation[0].__name__)
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
    calls = {
        "layer_norm": lambda M, p, seed: layer_norm_pair(M, 768, True, p=p, seed=seed),
        "wide layer_norm": lambda M, p, seed: layer_norm_pair(M, 65536, True, p=p, seed=seed),
        "rms_norm": lambda M, p, seed: rms_norm_pair(M, 768, True),
        "swiglu": lambda M, p, seed: swiglu_pair(M, 768),
        "rotary": lambda M, p, seed: rotary_both(M, 64, 32),
        "cross_entropy": lambda M, p, seed: cross_entropy_pair(M, 50257, True, ignore_index=seed),
        "bias_gelu": lambda M, p, seed: gelu_pair(M, 768, True, True, p=p, seed=seed),
        "attention": lambda M, p, seed: attention_pair(2, Attention(64, left=M, right=0, T=M + 16), p, seed),
        "attention_varlen": lambda M, p, seed: attention_pair(M, Attention(64, packed=True, right=0), p, seed),
        "decode": lambda M, p, seed: attention_pair(M, Attention(64, T=1), p, seed),
    }
    rows = ((2, 0.5, 1), (16, 0.1, -1), (17, 0.3, 2**62), (4096, 0.9, 0), (1_000_003, 0.01, 2**31))
    for name, call in calls.items():
        for M, p, seed in rows:
            launches = recorded(partial(call, M, p, seed))
            keys = [specialized(launch, GPUTarget("cuda", 90, 32)) for launch in launches]
            lines = [f"{kernel.__name__} {options.hash()} {rest}" for kernel, options, *rest in keys]
            print(json.dumps({"op": name, "M": M, "keys": sorted(k for k in lines if "_sum_partials" not in k)}))


if __name__ == "__main__":
    if sys.argv[1] == "keys":
        compile_keys()
    else:
        compile_share(sys.argv[1] == "all", int(sys.argv[2]), int(sys.argv[3]))
