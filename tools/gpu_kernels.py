"""The page docs/design/gpu_kernels.md: what every Triton kernel takes of every architecture that it is compiled for.

    python tools/gpu_kernels.py [LINES]

LINES is a file of what `python tools/aot.py all 0 1` printed; without it everything is compiled, in as many processes
as there are processors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/design/gpu_kernels.md"
PRODUCTS = ("wgmma", "tcgen05", "mma", "mfma", "wmma")


class Multiprocessor(NamedTuple):
    """What the blocks of a multiprocessor share; of AMD's RDNA a pair of compute units is one.

    Registers are those of one of its four parts, in 32-bit words a thread of a warp: NVIDIA's part has 16384 in all.
    """

    warps: int
    blocks: int
    shared_kb: int
    registers: int
    granule: int  # of a warp's registers, a thread
    reserved_kb: int = 0  # of shared memory, for each block


def _nvidia(warps: int, blocks: int, shared_kb: int) -> Multiprocessor:
    return Multiprocessor(warps, blocks, shared_kb, 16384 // 32, 8, 1)


# "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide. AMD: the ISA guides of CDNA3,
# CDNA4, RDNA3 and RDNA4; a test compares waves and granules with what LLVM says beside its code.
MULTIPROCESSORS = {
    "sm_80": _nvidia(64, 32, 164),
    "sm_86": _nvidia(48, 16, 100),
    "sm_89": _nvidia(48, 24, 100),
    "sm_90": _nvidia(64, 32, 228),
    "sm_100": _nvidia(64, 32, 228),
    "sm_103": _nvidia(64, 32, 228),
    "sm_120": _nvidia(48, 24, 100),
    "gfx942": Multiprocessor(32, 32, 64, 512, 8),
    "gfx950": Multiprocessor(32, 32, 160, 512, 8),
    "gfx1100": Multiprocessor(64, 32, 128, 1536, 24),
    "gfx1201": Multiprocessor(64, 32, 128, 1536, 24),
}
PARTS = 4


def warps_by_registers(line: dict[str, Any]) -> int:
    """Of a part of a multiprocessor, by their registers alone."""
    limit = MULTIPROCESSORS[line["arch"]]
    each = -(-max(line["REG"], 1) // limit.granule) * limit.granule
    return min(limit.warps // PARTS, limit.registers // each)


def occupancy(line: dict[str, Any]) -> float:
    """The share of a multiprocessor's warps that can be there at once, from registers, shared memory and block size."""
    limit, warps = MULTIPROCESSORS[line["arch"]], line["warps"]
    shared = (line["SHARED"] + line["dynamic"]) / 1024
    each_part = -(-warps // PARTS)  # a block's warps are dealt out to the parts
    blocks = min(limit.blocks, warps_by_registers(line) // each_part if warps >= PARTS else
                 warps_by_registers(line) * PARTS // warps)  # fmt: skip
    if shared:
        blocks = min(blocks, int(limit.shared_kb / (shared + limit.reserved_kb)))
    return min(blocks * warps, limit.warps) / limit.warps


def kernel_of(line: dict[str, Any]) -> str:
    name = line["name"].split()[1].strip("_").removesuffix("_kernel")
    centred = {True: "layer_", False: "rms_"}["'CENTRED': True" in line["name"]] if "CENTRED" in line["name"] else ""
    return centred + name


def _span(values: list[float], unit: str = "") -> str:
    low, high = min(values), max(values)
    return f"{low:.0f}{unit}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}{unit}"


def _products(lines: list[dict[str, Any]]) -> str:
    counts = {name: max(line.get(name, 0) for line in lines) for name in PRODUCTS}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "-"


def _row(kernel: str, lines: list[dict[str, Any]]) -> str:
    widest = max(lines, key=lambda line: (line["16-byte loads"], -line["loads"]))
    shared = [(line["SHARED"] + line["dynamic"]) / 1024 for line in lines]
    cells = (
        f"`{kernel}`",
        str(len(lines)),
        _span([line["REG"] for line in lines]),
        f"{max(shared):.1f}".removesuffix(".0"),
        f"{max(line['STACK'] for line in lines)}, {max(line['spills'] for line in lines)}",
        _span([100 * occupancy(line) for line in lines]),
        _products(lines),
        f"{widest['16-byte loads']} of {widest['loads']}",
    )
    return f"| {' | '.join(cells)} |"


HEADERS = (
    "kernel", "configurations", "registers", "shared KB", "stack bytes, spills", "occupancy %", "products",
    "16-byte loads",
)  # fmt: skip
INTRODUCTION = """\
# Triton kernels on every architecture

Made by `python tools/gpu_kernels.py`, with triton {triton} and torch {torch}: compiled ahead of time, run on no GPU.
The tests hold the bounds (`tests/backends/test_aot_compile.py`).

A row sums up the configurations of a kernel that were compiled: on {every}
all that its launcher may choose, on the others the one with the largest tile. *Registers* are 32-bit ones a thread.
*Shared* memory is the most that a block takes (AMD: local data share). *Stack, spills*: the most bytes of it a thread,
and the most places in loops that read or write it. *Occupancy* is computed from registers, shared memory and block
size. *Products* are matrix instructions in the code, the most of a configuration. *16-byte loads* are those among the
loads from global memory in the configuration that has the most.
"""


def page(lines: list[dict[str, Any]], every: str) -> str:
    """The whole page, of the lines that tools/aot.py prints."""
    text = INTRODUCTION.format(triton=triton.__version__, torch=torch.__version__.partition("+")[0], every=every)
    for arch in dict.fromkeys(line["arch"] for line in lines):
        by_kernel: dict[str, list] = {}
        for line in (line for line in lines if line["arch"] == arch):
            by_kernel.setdefault(kernel_of(line), []).append(line)
        rows = [_row(kernel, by_kernel[kernel]) for kernel in sorted(by_kernel)]
        text += (
            f"\n## {arch}\n\n" + "\n".join([f"| {' | '.join(HEADERS)} |", "|---" * len(HEADERS) + "|", *rows]) + "\n"
        )
    return text


def compiled() -> list[dict[str, Any]]:
    """Of every kernel, compiled here."""
    shares = os.cpu_count() or 1
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "TRITON_DISABLE_LINE_INFO": "1"}

    def share(index: int) -> str:
        command = [sys.executable, str(ROOT / "tools/aot.py"), "all", str(index), str(shares)]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    with ThreadPoolExecutor(shares) as pool:
        return [json.loads(line) for text in pool.map(share, range(shares)) for line in text.splitlines()]


if __name__ == "__main__":
    import aot

    found = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()] if sys.argv[1:] else compiled()
    order = [str(arch) for arch in aot.EVERY + aot.LARGEST]
    found.sort(key=lambda line: order.index(line["arch"]))
    PAGE.write_text(page(found, ", ".join(map(str, aot.EVERY))), encoding="utf-8")
