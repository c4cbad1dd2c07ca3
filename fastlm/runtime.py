"""The machine a process runs on: its devices and dtypes, threads, memory, signals and what is installed."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from .errors import ConfigError

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
# What the drivers of NVIDIA and AMD tell of themselves; "... Kernel Module  570.86.10 ...", and "6.12.12".
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))
DRIVER_VERSION = re.compile(r"\b\d+\.\d+(?:\.\d+)*\b")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h
KEEP_ALL = -1  # read as the largest size_t
TOP_PAD_BYTES = 64 * 1024 * 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PEERS = (
    "transformers",
    "onnxruntime",
    "ctranslate2",
    "liger-kernel",
    "flash-attn",
    "quack-kernels",
    "cut-cross-entropy",
)
SETTINGS = (
    "FASTLM_", "OMP_", "KMP_", "GOMP_", "MKL_NUM_THREADS", "GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD", "TRITON_",
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA",
)  # fmt: skip
PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors", "rich", "matplotlib", "tyro", "psutil")
TRIED = {"torch": ("2.10.0", "2.13.0", "2.15.0"), "triton": ("3.6.0", "3.7.1", "3.9.0")}
"""Versions that every test passes with: each of torch with the one of triton below it (tools/versions.py)."""


def choose_device(name: str) -> torch.device:
    """The device that `name` asks for; "auto" takes a CUDA device where there is one.

    Raises:
        ConfigError: if the name is none of cpu, cuda, cuda:N, auto, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products, and why.

    "auto" is bfloat16 where the hardware multiplies it: on other CPUs it is several times slower than
    float32 (huggingface/transformers issue 27994 tells of 12.5 s becoming 115 s).

    Raises:
        ConfigError: for float16 on a CPU.
    """
    if name == "float16" and device.type != "cuda":
        raise ConfigError("dtype is 'float16', which needs a CUDA device; on a CPU use bfloat16 or float32")
    if name != "auto":
        return DTYPES[name], "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU multiplies it"
        return torch.float32, "the GPU has no bfloat16"
    feature = cpu_bfloat16_feature()
    if feature:
        return torch.bfloat16, f"the CPU has {feature}"
    return torch.float32, "this CPU is not known to have amx_bf16 or avx512_bf16"


def cpu_bfloat16_feature() -> str | None:
    """The instruction set that makes bfloat16 matrix products fast on this CPU, if Linux reports one."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return None
    # "bf16" is Arm's name for it.
    return next((name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in words), None)


def refuse_ranks() -> None:
    """Raise ConfigError in one of several processes of a launcher: each would train the same run by itself."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks not in ("", "1"):
        raise ConfigError(f"WORLD_SIZE is {ranks}, but training runs in one process: start it without a launcher")


def memory_of(device: torch.device) -> int:
    """Bytes of a device's memory, swap included; 0 where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("MemTotal:", "SwapTotal:")))


def choose_threads(asked: int, started_with: int, cpu_max: Path = CPU_MAX) -> int:
    """CPU threads to use: what is asked for, else PyTorch's choice, but no more than a container may run.

    PyTorch counts the machine's cores; in a container limited to 2 of 64 its 64 threads would spend their
    time waiting for each other. OMP_NUM_THREADS is the user's own word and stands.

    Args:
        asked: 0 for the automatic choice.
        started_with: PyTorch's choice.
        cpu_max: the control group's "QUOTA PERIOD" in microseconds, or "max PERIOD".
    """
    if asked or "OMP_NUM_THREADS" in os.environ:
        return asked or started_with
    try:
        quota, period = (int(word) for word in cpu_max.read_text(encoding="utf-8").split())
    except (OSError, ValueError):  # no control group, or "max"
        return started_with
    return max(1, min(started_with, quota // period))


class Interrupt:
    """Set by the first SIGINT or SIGTERM; true once that has come."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def catch_interrupts() -> Iterator[Interrupt]:
    """Turn the first SIGINT or SIGTERM inside into a flag; the second acts as it did before.

    Python delivers signals to the main thread alone; elsewhere nothing is caught.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def on_signal(number: int, frame: object) -> None:
        interrupt.signal = number
        for signum, handler in before.items():
            signal.signal(signum, handler)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    for signum in before:
        signal.signal(signum, on_signal)
    try:
        yield interrupt
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from the heap and never to shrink it; True where that took hold.

    By default glibc maps each tensor above 32 MB anew and unmaps it when it is freed, so every step touches
    fresh pages, each a page fault. The price is that freed memory is never returned to the system.
    FASTLM_KEEP_FREED_MEMORY=0 turns it off. Elsewhere than on glibc nothing is done.

    Measured with PyTorch's operators on one thread of a Xeon with AMX (4 layers of 384, 8 x 256 tokens,
    bfloat16, median CPU time of a step, two interleaved rounds): with a vocabulary of 32768, whose logits
    are large, 1.48 and 1.45 s became 1.03 and 1.04 s, 366,000 page faults a step became fewer than 10,000,
    and the peak rose from 2.1 to 2.6-2.9 GB; with one of 2048 the difference was within the noise (5 %).
    """
    if os.environ.get("FASTLM_KEEP_FREED_MEMORY") == "0" or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEEP_ALL), (M_TOP_PAD, TOP_PAD_BYTES))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def minor(version: str) -> str:
    """2.13 of 2.13.0+cpu."""
    return ".".join(version.split(".")[:2])


def untried(versions: dict[str, str | None]) -> dict[str, str]:
    """Those of the installed `versions` of `TRIED`'s packages of whose minor version none was tried."""
    known = {name: {minor(version) for version in tried} for name, tried in TRIED.items()}
    return {name: v for name in TRIED if (v := versions.get(name)) and minor(v) not in known[name]}


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    """The GPU driver's version, or None where there is no driver; AMD's in the kernel is of the kernel's version."""
    for path in DRIVERS:
        with contextlib.suppress(OSError):
            if found := DRIVER_VERSION.search(path.read_text(encoding="utf-8").partition("\n")[0]):
                return found[0]
    if DRIVERS[1].parent.is_dir():
        return platform.release()
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def settings() -> dict[str, str]:
    """Environment variables that change which kernels run, on how many threads and in what memory."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(SETTINGS)}
