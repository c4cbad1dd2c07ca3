"""Kernels whose accesses to memory and turns are known from their source, compiled; prints what tools/sass.py counts.

Run by test_side_by_side.py, outside the interpreter.
"""

import json
from functools import partial

import torch
import triton
import triton.language as tl

import aot
import sass
from fastlm._core.architecture import parse

# 4 warps: 128 threads, so that a thread has 8 of 1024 elements.
N, WARPS = 1024, 4
HALF, SINGLE = (torch.empty(2**20, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))


@triton.jit
def _copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _sum(x_ptr, y_ptr, turns, BLOCK: tl.constexpr):
    """Adds up blocks in a loop, and stores one."""
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(0, turns, loop_unroll_factor=1, num_stages=1):
        total += tl.load(x_ptr + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.arange(0, BLOCK), total)


def regions(call, arch):
    kernel, options, signature, constants, attributes = aot.specialized(aot.recorded(call)[0], aot.gpu_target(arch))
    source = aot.ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=aot.gpu_target(arch), options=options.__dict__)
    return sass.regions(sass.disassembled(compiled.asm["cubin"]))


if __name__ == "__main__":
    for name in ("sm_80", "sm_90"):
        arch = parse(name)
        calls = {f"copy {x.dtype}": partial(_copy[(1,)], x, x, N, num_warps=WARPS) for x in (HALF, SINGLE)}
        calls["sum"] = partial(_sum[(1,)], SINGLE, SINGLE, 37, N, num_warps=WARPS)
        for case, call in calls.items():
            found = [{"n": r.instructions, "loads": r.loads, "stores": r.stores, "names": r.names}
                     for r in regions(call, arch)]  # fmt: skip
            print(json.dumps({"case": case, "arch": name, "regions": found}))
