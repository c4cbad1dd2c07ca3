"""The only place where a tensor becomes a ptr.

Callers pass contiguous CPU tensors of checked shapes and dtypes; this module allocates outputs and
workspaces, hands over addresses and sizes, and returns tensors. Nothing is checked in C++.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError

HOW_TO_BUILD = "FASTLM_CPU=1 pip install --force-reinstall --no-deps .  in the folder of fastlm's source"


def why_missing(error: ImportError, module: str) -> str:
    """What the build left to say of `module`, if it is not there at all; else why it does not load."""
    try:
        built = (Path(__file__).parents[2] / f"{module}_missing.txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        built = ""
    why = built if built and isinstance(error, ModuleNotFoundError) else str(error)
    return f"the {module[1:].upper()} extension is not there: {why}"


_cpu: Any = None
missing_reason: str | None = None
try:
    _cpu = importlib.import_module("fastlm._cpu")
except ImportError as error:  # not built, or built for another Python
    missing_reason = why_missing(error, "_cpu")

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
TYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use, or None where the extension is missing."""
    return None if _cpu is None else ISAS[_cpu.isa()]


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets that this CPU can run, least first; empty where the extension is missing."""
    return () if _cpu is None else ISAS[: _cpu.best_isa() + 1]


def is_intel() -> bool:
    """Whether Intel made this CPU; where the extension is missing, that is assumed."""
    return _cpu is None or _cpu.is_intel()


def set_cpu_isa(name: str) -> None:
    """Choose the instruction set of the CPU kernels; FASTLM_CPU_ISA does it at import.

    Raises:
        BackendError: if the name is unknown or the CPU lacks it.
    """
    if name not in cpu_isas() or _cpu is None:
        have = ", ".join(cpu_isas()) or missing_reason
        raise BackendError(f"cpu_isa: got {name!r}, this machine has: {have}")
    _cpu.set_isa(ISAS.index(name))


if _cpu is not None and os.environ.get("FASTLM_CPU_ISA"):
    set_cpu_isa(os.environ["FASTLM_CPU_ISA"])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and sums are kept in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def ptr(t: Tensor | None) -> int:
    """The address of its first element, 0 of None."""
    return 0 if t is None else t.data_ptr()


def weight_type(weight: Tensor | None, bias: Tensor | None) -> int:
    """The code of the dtype that a weight and a bias share, either of which may be absent."""
    if weight is not None:
        return TYPE_CODE[weight.dtype]
    return 0 if bias is None else TYPE_CODE[bias.dtype]


def chunks(M: int) -> int:
    """How many partial sums a backward pass over M rows writes of a weight's gradient."""
    return -(-M // _cpu.chunk_rows(M))


def omp_threads() -> int | None:
    """Threads that the CPU kernels would use, or None where the extension is missing."""
    return None if _cpu is None else _cpu.omp_threads()


def heads_like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape: dense, in x's order of dimensions, its last dimension contiguous.

    What `empty_like` makes of an x in which two dimensions have stride 1, as `unfold` makes them, has another last one.
    """
    grad = torch.empty_like(x)
    return grad if grad.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
