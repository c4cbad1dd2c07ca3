"""Runs cases in a process of its own, as `python -m fastlm.benchmarks.worker`.

A process, because the allocator's setting cannot be undone, and a system short of memory may kill it. The plan
comes as one JSON document on standard input; results go out as one JSON line an event.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import fastlm
from fastlm.verify.tolerance import RATIO_TO_TORCH, atol, magnitude, max_error, rms_error

from . import memory, providers
from .case import Built, Case, Counts, Session, Unavailable
from .harness import Timing, clock, interleave
from .registry import BENCHMARKS
from .results import Row
from .roof import Roof, measure

RATIO_OF_PEERS = 8.0  # a peer may keep fewer digits than PyTorch, three bits fewer, but must compute the same thing
Emit = Callable[[str, Any], None]


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    plan = json.load(sys.stdin)
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the events

    def emit(kind: str, payload: Any) -> None:
        events.write(json.dumps([kind, payload]) + "\n")

    run(plan, emit)
    return 0


def run(plan: dict[str, Any], emit: Emit) -> None:
    """Do what the plan says, emitting ("roof", ...), ("case", index) and ("row", ...) on the way.

    Args:
        plan: {"device", "allocator", "threads", "seconds", "against", "cases": [[index, case], ...], "roof"}.
    """
    torch.set_num_threads(plan["threads"])
    device, allocator = plan["device"], plan["allocator"]
    if allocator == "kept":
        from fastlm.runtime import keep_freed_memory

        if not keep_freed_memory():
            raise SystemExit("this C library cannot be told to keep freed memory")
    cases = [(index, Case(**{**case, "shape": tuple(case["shape"]), "passes": tuple(case["passes"])}))
             for index, case in plan["cases"]]  # fmt: skip
    if plan.get("roof"):
        roof = Roof(**plan["roof"])
    else:
        roof = measure(device, sorted({case.dtype for _, case in cases}))
        emit("roof", roof.to_dict())
    for index, case in cases:
        gc.collect()
        gc.freeze()  # what is imported by now is never garbage, and takes 0.1 s to search
        emit("case", index)
        for row in run_case(case, device, plan["against"], roof, plan["seconds"]):
            row.allocator, row.threads = allocator, torch.get_num_threads()
            emit("row", dataclasses.asdict(row))


def run_case(case: Case, device: str, against: list[str], roof: Roof, seconds: float) -> list[Row]:
    """Rows of every provider on every pass of a case.

    Args:
        against: providers to run beside fastlm's own; empty for all, of which the slow ones run on some cases only.
        seconds: time to spend on the rounds of one pass.
    """
    names = [n for n in BENCHMARKS[case.op].providers() if not against or n in against or _always(n)]
    try:
        session = BENCHMARKS[case.op].session(case, device)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        return [_row(case, which, n, "out of memory", _line(error)) for n in names for which in case.passes]
    if "torch" in names:  # it is the yardstick of the others
        names.insert(0, names.pop(names.index("torch")))
    rows: list[Row] = []
    built: dict[str, Built] = {}
    errors: dict[str, dict[str, tuple[float, float]]] = {}
    peaks: dict[tuple[str, str], int | None] = {}
    known: dict[tuple[str, str], float] = {}
    yardstick: dict[str, float] = {}
    scales: dict[str, tuple[float, float]] = {}
    for name in names:
        try:
            if name in providers.SLOW and not case.slow and name not in against:
                raise Unavailable("runs on some cases only, unless asked for by name")
            before = memory.in_use(device) if session.counts_state else None
            made = session.build(name)
            errors[name], wrong = judge(session, name, made, yardstick, scales)
            if wrong:
                rows += [_row(case, w, name, "wrong", wrong, errors[name], made.label) for w in case.passes]
                continue
            made.results.clear()
            for which, call in made.run.items():
                if name == "compile":  # what compiling takes is not what running takes
                    call()
                start = time.perf_counter()
                peaks[name, which] = memory.peak(call, device, before)
                known[name, which] = time.perf_counter() - start
            built[name] = made
        except Unavailable as error:
            rows += [_row(case, w, name, "unsupported", str(error)) for w in case.passes]
        except Exception as error:  # a peer may fail in any way; the others go on
            status = "out of memory" if is_memory(error) else "failed"
            rows += [_row(case, w, name, status, _line(error)) for w in case.passes]
        gc.collect()
    for which in case.passes:
        rows += _time(case, which, session, built, errors, peaks, known, roof, seconds, device)
    return rows


def _always(provider: str) -> bool:
    return providers.is_ours(provider) and provider not in providers.SLOW


def _time(
    case: Case, which: str, session: Session, built: dict[str, Built], errors: dict, peaks: dict, known: dict,
    roof: Roof, seconds: float, device: str,
) -> list[Row]:  # fmt: skip
    """Rows of one pass: those who can, in interleaved rounds."""
    rows, samplers = [], {}
    timekeeper = clock(device)
    for name, made in built.items():
        if which not in made.run:
            rows.append(_row(case, which, name, "unsupported", "it has no such pass", errors[name], made.label))
        elif not made.timed:
            rows.append(_row(case, which, name, "checked", "not timed under an interpreter", errors[name], made.label))
        else:
            samplers[name] = timekeeper.prepare(made.run[which], known[name, which])
    timings = interleave(samplers, seconds)
    counts = session.counts(which)
    for name, timing in timings.items():
        row = _row(case, which, name, "ok", "", errors[name], built[name].label)
        _fill(row, timing, counts, roof)
        row.peak_bytes = peaks[name, which]
        row.work = getattr(session, "work", {})
        if "torch" in timings:
            row.ratio_to_torch = timings["torch"].median / timing.median
        rows.append(row)
    return rows


def _row(
    case: Case, which: str, provider: str, status: str, reason: str, errors: dict | None = None, label: str = ""
) -> Row:
    shape = "x".join(map(str, case.shape))
    row = Row(case.op, case.variant, which, case.dtype, shape, provider, label or provider, status, reason)
    row.isa = fastlm.cpu_isa()
    if errors:
        wanted = [e for name, e in errors.items() if which != "fwd" or not name.startswith("gradient")]
        row.max_error, row.rms_error = (max(e[i] for e in wanted) for i in (0, 1))
    return row


def _fill(row: Row, timing: Timing, counts: Counts, roof: Roof) -> None:
    row.rounds, row.median = len(timing.samples), timing.median
    row.p10, row.p90 = timing.quantile(0.1), timing.quantile(0.9)
    row.bytes, row.flops = counts.bytes, counts.flops
    row.gbps, row.tflops = counts.bytes / timing.median / 1e9, counts.flops / timing.median / 1e12
    row.bound, row.roof_fraction = roof.bound(counts), roof.seconds(counts) / timing.median


def judge(
    session: Session, provider: str, made: Built, yardstick: dict[str, float], scales: dict[str, tuple[float, float]]
) -> tuple[dict[str, tuple[float, float]], str]:
    """(result -> (largest, rms) relative error, why the result is wrong or "").

    Args:
        yardstick: PyTorch's largest absolute error by result; filled in when the provider is torch.
        scales: largest magnitude and root mean square of the truth by result; filled in when first needed.
    """
    errors, problems = {}, []
    ratio = RATIO_TO_TORCH if providers.is_ours(provider) else RATIO_OF_PEERS
    for name, actual in made.results.items():
        truth = session.truth[name]
        try:
            error = max_error(actual, truth)
        except AssertionError as problem:
            problems.append(f"{name}: {problem}")
            continue
        if name not in scales:
            scales[name] = magnitude(truth) or 1.0, rms_error(truth, torch.zeros_like(truth)) or 1.0
        top, rms = scales[name]
        errors[name] = error / top, rms_error(actual, truth) / rms
        if provider == "torch":
            yardstick[name] = error
        elif provider != "compile" or name in yardstick:
            bound = ratio * yardstick.get(name, 0.0) + atol(session.case.torch_dtype, top, session.terms)
            if error > bound:
                problems.append(f"{name}: error {error:.1e} > {bound:.1e}")
    return errors, "; ".join(problems)


def is_memory(error: BaseException) -> bool:
    """Whether a device or the system is out of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or tells_of_memory(str(error))


def tells_of_memory(message: str) -> bool:
    """Whether an error's message is about memory that there is none of; torch has a type for GPUs' alone."""
    return any(words in message for words in ("can't allocate memory", "out of memory", "OutOfMemoryError"))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


if __name__ == "__main__":
    sys.exit(main())
