"""Starts a worker for each allocator setting, follows its events, and survives its death."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastlm.errors import ConfigError

from .case import Case
from .results import Results, Row

ALLOCATORS = ("kept", "default")
COMPUTE_BOUND = ("attention", "gelu", "cross_entropy")  # timed on one thread too
KILLED = -9  # what the kernel does to a process when memory runs out


@dataclass
class Plan:
    """What to measure.

    Attributes:
        cases: in order.
        device, threads, against, seconds: see `worker.run`.
        allocators: the settings to measure under; with the second and later ones, headline cases only, fastlm
            and PyTorch only.
        scaling: whether headline cases bound by arithmetic run once more on one thread, for the gain of the others.
    """

    cases: list[Case]
    device: str = "cpu"
    threads: int = 1
    against: list[str] = field(default_factory=list)
    seconds: float = 1.0
    allocators: tuple[str, ...] = ALLOCATORS
    scaling: bool = False

    def parts(self) -> list[tuple[str, int, list[Case], list[str]]]:
        """(allocator, threads, cases, providers) of each worker."""
        first, *others = self.allocators
        headline = [case for case in self.cases if case.headline]
        found = [(first, self.threads, self.cases, self.against)]
        if headline:
            found += [(allocator, self.threads, headline, ["torch"]) for allocator in others]
        scaled = [case for case in headline if case.op in COMPUTE_BOUND]
        if self.scaling and scaled and self.threads > 1:
            found.append((first, 1, scaled, ["torch"]))
        return found

    @property
    def total(self) -> int:
        return sum(len(cases) for _, _, cases, _ in self.parts())


def run(plan: Plan, results: Results, started: Callable[[Case, str], None], measured: Callable[[Row], None]) -> None:
    """Measure everything, adding rows to `results` as they come, so that an interrupt loses nothing.

    Args:
        started: told each case and its allocator before it is measured.
        measured: told each row.

    Raises:
        ConfigError: if a worker cannot start.
    """
    for allocator, threads, cases, against in plan.parts():
        conditions = allocator if threads == plan.threads else f"{allocator}, {threads} thread"
        waiting = list(enumerate(cases))
        roof: dict[str, Any] | None = None
        while waiting:
            order = {
                "device": plan.device, "allocator": allocator, "threads": threads, "seconds": plan.seconds,
                "against": against, "roof": roof,
                "cases": [(index, dataclasses.asdict(case)) for index, case in waiting],
            }  # fmt: skip
            current: int | None = None
            for kind, payload in _events(order):
                if kind == "roof":
                    roof = results.roofs[conditions] = payload
                elif kind == "case":
                    current = payload
                    started(cases[current], conditions)
                elif kind == "row":
                    results.rows.append(Row(**payload))
                    measured(results.rows[-1])
                elif kind == "exit" and payload:
                    if current is None:
                        raise ConfigError(f"the benchmark's worker did not start (status {payload}); see above")
                    row = _dead(cases[current], allocator, threads, payload)
                    results.rows.append(row)
                    measured(row)
            waiting = [] if current is None else [(i, case) for i, case in waiting if i > current]


def _events(order: dict[str, Any]):
    """The worker's events, and at last ("exit", status)."""
    command = [sys.executable, "-m", "fastlm.benchmarks.worker"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None  # noqa: PT018  (for the type checker)
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(order))
            process.stdin.close()
        for line in process.stdout:
            yield json.loads(line)
        yield "exit", process.wait()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def _dead(case: Case, allocator: str, threads: int, status: int) -> Row:
    """The row of a case whose worker died in it."""
    shape = "x".join(map(str, case.shape))
    why = "out of memory" if status == KILLED else "failed"
    row = Row(case.op, case.variant, case.passes[0], case.dtype, shape, "worker", "worker", why)
    row.reason = f"the process ended with status {status}"
    row.allocator, row.threads = allocator, threads
    return row
