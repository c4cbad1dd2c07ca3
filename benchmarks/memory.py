"""Peak memory of a call.

On a GPU the caching allocator counts it. On Linux the kernel does: freed memory is handed back first
(malloc_trim), the process's high-water mark is reset (/proc/self/clear_refs), and after the call the mark stands
at its peak of resident memory, to the page. Elsewhere there is no number.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESET_PEAK = "5"  # clear_refs: "reset the peak resident set size", proc(5)


def resident() -> int | None:
    """Bytes of memory in use by the process, after freed memory has been returned; None where unknown."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        return _status("VmRSS")
    except (AttributeError, OSError, ValueError):
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def peak(run: Callable[[], Any], device: str, before: int | None = None) -> int | None:
    """Bytes that a call adds at its peak, what it returns included; None where that cannot be told.

    Args:
        run: the call; it has run before, so that nothing of it is loaded for the first time.
        before: memory in use to count from, if not that at the start of the call.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if before is None else before
        result = run()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    start = resident()
    if start is None:
        return None
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        result = run()
        mark = _status("VmHWM")
    except (OSError, ValueError):
        return None
    del result
    return max(0, mark - (start if before is None else before))


def in_use(device: str) -> int | None:
    """What `peak` counts from by default."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else resident()
