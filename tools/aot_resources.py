"""What a kernel that was compiled ahead of time takes: registers, memory, spills, and some of its instructions.

Of NVIDIA's from the tools that Triton brings, of AMD's from the metadata in Triton's assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from fastlm._core.architecture import Architecture

NVIDIA = Path(triton.__file__).parent / "backends/nvidia/bin"
LABEL = re.compile(r"(\.L\w+):")
ACCESS = re.compile(r"\b(?:LDL|STL|scratch_load|scratch_store)")
JUMP = re.compile(r"\b(?:BRA\b.*`\(|s_c?branch\w*\s+)(\.L\w+)")
RARE = re.compile(r"SR_CTAID\.X|;;#ASMSTART")  # where a program makes its id anew


def accesses_in_loops(code: str) -> int:
    """How often a kernel's assembly reads or writes its stack between a jump back and what it jumps to.

    Up to where it makes its program's id anew: what attention makes again, where a result is not finite, runs rarely.
    """
    labels: dict[str, int] = {}
    accesses, loops = [], []
    for place, line in enumerate(code.splitlines()):
        if label := LABEL.match(line):
            labels[label[1]] = place
        elif ACCESS.search(line):
            accesses.append(place)
        elif (jump := JUMP.search(line)) and jump[1] in labels:
            loops.append((labels[jump[1]], place))
        elif loops and RARE.search(line):
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
    "vgpr_spill_count": "VGPR spills",
    "sgpr_spill_count": "SGPR spills",
    "private_segment_fixed_size": "STACK",
    "group_segment_fixed_size": "SHARED",
    "wavefront_size": "wavefront",
}


def amd_resources(assembly: str) -> dict[str, int]:
    """What the metadata at the end of the assembler's text says, and how often the stack is used inside loops."""
    code, _, metadata = assembly.partition(".amdgpu_metadata")
    found = re.findall(rf"^ *(?:- )?\.({'|'.join(AMD_METADATA)}): +(\d+)$", metadata, re.MULTILINE)
    waves = re.findall(r"^; Occupancy: (\d+)$", code, re.MULTILINE)
    used = {AMD_METADATA[key]: int(value) for key, value in found} | {"LOCAL": 0, "waves": int(waves[0])}
    return used | {"spills": accesses_in_loops(code) if used["STACK"] else 0}


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
