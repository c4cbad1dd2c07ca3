"""Proves one kernel in a process of its own, as `python -m fastlm.proving.worker`.

A process, since a kernel may crash, hang, or leave a GPU's context unusable. The job comes as one JSON document on
standard input; what is found goes out as one JSON line an event, and so does each step before it is taken, so that
whoever reads knows in which one this process ended.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fastlm
from fastlm._core import proofs, registry
from fastlm._core.dispatch import Request
from fastlm.benchmarks.case import Built, Case, Unavailable
from fastlm.benchmarks.harness import clock, interleave
from fastlm.benchmarks.kernel import KernelSession
from fastlm.benchmarks.registry import KERNELS
from fastlm.benchmarks.worker import is_memory, judge, tells_of_memory

from ..errors import BackendError
from ..verify import fuzz
from ..verify.checks import Failure, check, threads
from .jobs import ANY, TILES, Job

ROUND_SECONDS = 0.1  # to spend on the rounds of one pass
SEEDS = 4000  # that a search for calls of one dtype and class goes through at most
OUT_OF_MEMORY = "out of memory"
Emit = Callable[[str, Any], None]


class Wrong(Exception):
    """A kernel's result is wrong; carries the message and the command that repeats it."""

    def __init__(self, reason: str, command: str):
        super().__init__(reason)
        self.reason, self.command = reason, command


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    order = json.load(sys.stdin)
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the events

    def emit(kind: str, payload: Any) -> None:
        events.write(json.dumps([kind, payload]) + "\n")

    proofs.ignored = True  # what an earlier proof says must not decide what is timed
    with prepared(order["device"]):
        emit("started", None)
        run(Job.from_dict(order["job"]), order["device"], order["seconds"], emit)
    emit("done", None)
    return 0


@contextlib.contextmanager
def prepared(device: dict[str, Any]) -> Iterator[None]:
    sys.path[:0] = device["path"]
    if device["torch_device"] == "cuda":
        torch.cuda.set_device(device["index"])
    module, _, function = device["prepare"].partition(":")
    with getattr(importlib.import_module(module), function)() if module else contextlib.nullcontext():
        yield


def run(job: Job, device: dict[str, Any], seconds: float, emit: Emit) -> None:
    """Check the job's kernel, then time it, emitting ("step", command), ("checked", number), ("wrong", [reason,
    command]), ("skipped", text) and ("timing", a `proofs.Timing`'s fields) on the way.

    Args:
        seconds: for all of it; the checks come first, and cases that there is no time for are skipped.
    """
    end = time.monotonic() + seconds
    if job.features == TILES:
        search_tiles(job, device, seconds, emit)
        return
    try:
        emit("checked", check_calls(job, device, emit))
        for case in job.cases:
            if time.monotonic() > end:
                emit("skipped", f"{case.describe()}: no time was left")
                continue
            time_case(job, case, device["torch_device"], emit)
    except Wrong as found:
        emit("wrong", [found.reason, found.command])


def check_calls(job: Job, device: dict[str, Any], emit: Emit) -> int:
    """Check random calls of the job's dtype and class, as `fastlm verify` does; returns how many.

    Raises:
        Wrong: at the first that fails; after an illegal access no more would be told from it.
    """
    spec, (most, least), begun, count = fuzz.SPECS[job.op], device["samples"], time.monotonic(), 0
    with threads(1):
        for seed in itertools.islice(fuzz.seeds_of(spec, job.dtype), SEEDS):
            if count >= most or (count >= least and time.monotonic() - begun > device["check_seconds"]):
                break
            sample, layout_seed = fuzz.draw(spec, seed)
            try:
                told = fuzz.explained(spec, job.backend, sample)
            except BackendError:
                continue
            if told.selected != job.backend:
                continue
            if job.features not in (ANY, proofs.feature_class(told.request.features)):
                continue
            command = fuzz.command_of(spec, job.backend, seed)
            emit("step", command)
            problem = _problem(lambda: check(spec, job.backend, sample, layout_seed).failures)  # noqa: B023 (called now)
            if problem == OUT_OF_MEMORY:
                emit("skipped", f"{sample.describe()}: {problem}")
            elif problem:
                raise Wrong(f"{problem} ({sample.describe()})", command)
            else:
                count += 1
    return count


def search_tiles(job: Job, device: dict[str, Any], seconds: float, emit: Emit) -> None:
    """Emit ("tile", [row, better one]) for each row of the kernels' tables for which there is one."""
    from fastlm.kernels._tuned import Row

    from . import tiles  # imports Triton's kernels

    few = device | {"samples": (device["samples"][1],) * 2}

    def right(row: Row) -> bool:
        try:
            for op in users_of(row.table, device):
                for dtype in device["dtypes"]:
                    check_calls(Job(op, job.backend, dtype, ANY), few, emit)
        except Wrong:
            return False
        return True

    def step(what: str) -> None:
        emit("step", what)

    for found in tiles.search(list(job.cases), device["torch_device"], right, seconds, step):
        emit("tile", found)


def users_of(table: str, device: dict[str, Any]) -> list[str]:
    """The ops whose kernels look rows up in a table: LayerNorm and RMSNorm share theirs, both cross-entropies too."""
    return [op for op, found in _tables(tuple(device["dtypes"])).items() if table in found]


@functools.cache
def _tables(dtypes: tuple[str, ...]) -> dict[str, set[str]]:
    """The tables of each op, by a few calls of it."""
    from fastlm.kernels import _tuned

    found = {}
    for op in registry.ops():
        if op.backend("triton"):
            with _tuned.seen() as rows, contextlib.suppress(Wrong):
                few = {"samples": (4, 4), "check_seconds": 0.0}
                check_calls(Job(op.name, "triton", dtypes[0], ANY), few, lambda kind, payload: None)
            found[op.name] = {row.table for row in rows}
    return found


def _problem(checked: Callable[[], list[Failure]]) -> str:
    """The first failure of a check in words, `OUT_OF_MEMORY`, or nothing."""
    try:
        failures = checked()
    except (MemoryError, RuntimeError) as error:
        return OUT_OF_MEMORY if is_memory(error) else _line(error)
    first = next(iter(failures), None)
    if first is None:
        return ""
    return OUT_OF_MEMORY if tells_of_memory(first.message) else f"{first.kind}: {first.message}"


def _line(error: BaseException) -> str:
    return f"error: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def time_case(job: Job, case: Case, device: str, emit: Emit) -> None:
    """Compare a case's results with fp64, and time its passes beside what serves without the kernel."""
    command = f"fastlm bench {case.op} --dtype {case.dtype} --shape {'x'.join(map(str, case.shape))}"
    try:
        for timing in timings_of(job, case, device, command, emit):
            emit("timing", timing)
    except Unavailable as error:
        emit("skipped", f"{case.describe()}: {error}")
    except Wrong:
        raise
    except Exception as error:
        if not is_memory(error):
            raise Wrong(_line(error), command) from error
        emit("skipped", f"{case.describe()}: {OUT_OF_MEMORY}")
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _of_others(session: KernelSession, name: str) -> Built:
    """What somebody else's operator makes of a case.

    Raises:
        Unavailable: if it fails, which is no fault of the kernel.
    """
    try:
        return session.build(name)
    except Exception as error:
        if is_memory(error):
            raise
        raise Unavailable(f"{name} fails: {_line(error)}") from error


def _serves_without(job: Job, request: Request) -> str:
    """The provider of what serves a request where no kernel for GPUs does."""
    row = registry.get(job.op).backend("torch")
    return "torch" if row is not None and row.unsupported(request) is None else "fastlm-reference"


def timings_of(job: Job, case: Case, device: str, command: str, emit: Emit) -> list[dict[str, Any]]:
    benchmark = next(b for b in KERNELS if b.name == case.op)
    session = benchmark.session(case, device)
    request = fastlm.explain(benchmark.ours(case), *session.tensors).request
    ours, other = f"fastlm-{job.backend}", _serves_without(job, request)
    yardstick: dict[str, float] = {}
    built = {}
    for name in dict.fromkeys(("torch", other, ours)):
        emit("step", f"{command} --against {name}")
        made = session.build(name) if name == ours else _of_others(session, name)
        _, wrong = judge(session, name, made, yardstick, {})
        if wrong and name == ours:
            raise Wrong(f"value: {wrong} ({case.describe()})", command)
        made.results.clear()
        built[name] = made
    session.truth.clear()
    found = []
    timekeeper = clock(device)
    for which in case.passes:
        emit("step", f"{command} --pass {which}")
        pair = {name: built[name].run.get(which) for name in (ours, other)}
        if all(pair.values()):
            timed = interleave({name: timekeeper.prepare(call) for name, call in pair.items()}, ROUND_SECONDS)
            seconds = {name.removeprefix("fastlm-"): timing.median for name, timing in timed.items()}
            found.append({"shape": case.shape, "variant": case.variant, "which": which, "size": request.size,
                          "seconds": seconds})  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
