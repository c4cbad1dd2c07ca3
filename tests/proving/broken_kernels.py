"""Kernels that are wrong in one way each, put in the place of gelu's on the Triton backend: what `fastlm tune` has to
refuse. A context manager each, by name, in which a worker runs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from emulation import build
from fastlm.backends import cuda
from fastlm.kernels import gelu as kernels
from fastlm.ops import gelu as op

TIMED = (24, 24)  # the shape that a stand-in times; no random call has so many rows


@contextlib.contextmanager
def in_place(forward: Callable[..., torch.Tensor], backward: Callable[..., Any] = kernels.gelu_bwd) -> Iterator[None]:
    before = op.KERNELS["triton"]
    op.KERNELS["triton"] = SimpleNamespace(gelu_fwd=forward, gelu_bwd=backward)
    try:
        yield
    finally:
        op.KERNELS["triton"] = before


def _after(change: Callable[[torch.Tensor], Any]) -> contextlib.AbstractContextManager[None]:
    """With `change` applied to each result."""

    def forward(x: torch.Tensor, *args: Any) -> torch.Tensor:
        y = kernels.gelu_fwd(x, *args)
        changed = change(y)
        return y if changed is None else changed

    return in_place(forward)


def wrong():
    return _after(lambda y: y * 1.02)


def wrong_gradient():
    def backward(dy: torch.Tensor, x: torch.Tensor, *args: Any) -> tuple:
        dx, db = kernels.gelu_bwd(dy, x, *args)
        return dx * 1.02, db

    return in_place(kernels.gelu_fwd, backward)


def wrong_where_timed():
    return _after(lambda y: y * 1.02 if y.shape == TIMED else y)


def not_repeatable():
    calls = iter(range(1 << 30))
    return _after(lambda y: y * (1 + next(calls) % 7 * torch.finfo(y.dtype).eps))


def out_of_bounds():
    def write(y: torch.Tensor) -> None:
        if y.numel():
            beyond = torch.empty(0, dtype=y.dtype).set_(y.untyped_storage(), y.storage_offset() + y.numel(), (1,))
            beyond.fill_(1.0)

    return _after(write)


def unwritten():
    def leave(y: torch.Tensor) -> torch.Tensor:
        fresh = torch.empty_like(y)
        fresh.view(-1)[1:] = y.view(-1)[1:]
        return fresh

    return _after(leave)


def _raises(error: BaseException) -> Callable[[torch.Tensor], None]:
    def fail(y: torch.Tensor) -> None:
        raise error

    return fail


def illegal_access():
    return _after(_raises(RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")))


def out_of_memory():
    def fail(y: torch.Tensor) -> None:
        if y.shape == TIMED:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    return _after(fail)


def no_memory_at_all():
    return _after(_raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")))


def crash():
    return _after(lambda y: os.kill(os.getpid(), signal.SIGSEGV))


def crash_where_timed():
    return _after(lambda y: os.abort() if y.shape == TIMED else None)


def killed():
    return _after(lambda y: os.kill(os.getpid(), signal.SIGKILL))


def ends():
    def leave(y: torch.Tensor) -> None:
        print("an unspecified launch failure", file=sys.stderr, flush=True)
        os._exit(7)

    return _after(leave)


def hang():
    return _after(lambda y: time.sleep(3600))


def slow():
    return _after(lambda y: time.sleep(0.01))


@contextlib.contextmanager
def not_there():
    raise RuntimeError("CUDA error: no kernel image is available")
    yield


@contextlib.contextmanager
def emulation() -> Iterator[None]:
    """The CUDA kernels, built for the CPU."""
    with cuda.emulate(build.Emulated(build.build())):
        yield
