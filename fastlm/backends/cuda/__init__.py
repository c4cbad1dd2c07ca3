"""The CUDA extension: how it is loaded, what it was built for, and how its kernels are called.

A module an op holds that op's kernels behind tensors, the counterpart of fastlm.backends.cpu's: callers pass contiguous
tensors of one device; it allocates outputs and workspaces and queues the kernels on that device's current stream.
Imported when the cuda backend is first asked about.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..._core.architecture import Architecture
from ..._core.dropout import DeviceSeed
from ..._core.torch_private import current_device, current_raw_stream
from .. import cpu

_cuda: Any = None
missing_reason: str | None = None
try:
    _cuda = importlib.import_module("fastlm._cuda")
except ImportError as error:  # not built, or built for another Python
    missing_reason = cpu.why_missing(error, "_cuda")

emulated = False
ptr: Callable[[Tensor | None], int] = cpu.ptr


@contextlib.contextmanager
def emulate(module: Any) -> Iterator[None]:
    """Serve CPU tensors by `module`, a build of the kernels for the CPU whose `pointer` takes the place of data_ptr."""
    global _cuda, ptr, emulated, missing_reason
    before = _cuda, ptr, emulated, missing_reason
    _cuda, ptr, emulated, missing_reason = module, module.pointer, True, None
    try:
        yield
    finally:
        _cuda, ptr, emulated, missing_reason = before


def architectures() -> tuple[str, ...]:
    """What the kernels were compiled for, such as ("80", "90a"); empty where the extension is missing."""
    return tuple(filter(None, _cuda.architectures.split(";"))) if _cuda is not None else ()


def sources() -> str:
    """A hash of what the kernels were compiled from."""
    return getattr(_cuda, "sources", "")


def unserved(arch: Architecture) -> str | None:
    """Why this build has no code for a GPU of an architecture, or None where it has."""
    if arch.vendor != "nvidia":
        return f"its kernels are for NVIDIA's GPUs, this one is {arch}"
    built = architectures()
    for name in built:
        number = int(name.rstrip("af"))
        if number == arch.number or (name.isdigit() and number // 10 == arch.number // 10 and number <= arch.number):
            return None
    return f"its kernels were built for {', '.join(f'sm_{name}' for name in built)}, this GPU is {arch}"


def unusable() -> str | None:
    """Why the extension can't launch anything here, or None where it can: what `fastlm doctor` shows."""
    if missing_reason or emulated:
        return missing_reason
    driver, toolkit = _cuda.driver_version(), _cuda.toolkit_version()
    if driver == 0:
        return "no NVIDIA driver is loaded"
    if driver // 10 < toolkit // 10:  # within a major version, older drivers serve newer toolkits
        return f"the driver serves CUDA {driver / 10:.1f}, the kernels were built with {toolkit / 10:.1f}: update it"
    return None


def call(function: Callable, x: Tensor, *arguments: Any) -> Any:
    """function(device, stream, *arguments) for the current stream of x's device, while that is the current device."""
    if not x.is_cuda:
        return function(0, 0, *arguments)
    index = x.get_device()
    stream = current_raw_stream(index)
    if index == current_device():
        return function(index, stream, *arguments)
    with torch.cuda.device(index):
        return function(index, stream, *arguments)


def addresses(*tensors: Tensor | None) -> list[int]:
    """Of each of them, 0 where there is none."""
    return [ptr(t) for t in tensors]


def seed_argument(seed: int) -> tuple[int, bool]:
    """(a seed or its address, whether it is an address)."""
    return (ptr(seed.tensor), True) if isinstance(seed, DeviceSeed) else (seed, False)
