"""`fastlm verify`: random calls of every op and backend against the fp64 reference."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from ..errors import ConfigError
from ..verify import fuzz
from .flags import parse
from .tables import print_table

SHOWN = 3  # failures of one kind on one op and backend that are printed; the others are counted
COMMAND_BYTES = 4096


@dataclass
class Options:
    """Check every op on every backend that is present, on random inputs, until the time is up.

    Shapes, memory layouts, masks, dtypes, dropout and empty batches are drawn from the seed. Values and
    gradients are compared with the fp64 reference; on kernels also: memory around every buffer, exactness on
    small integers, the same bits again, for any number of threads and in any batch. Exit status 1 if a check
    fails; each failure comes with the command that repeats it. What PyTorch's own operators, the torch backend, get
    wrong is printed likewise, as NOTED, but fails nothing.
    """

    seconds: float = 60.0
    """how long to go on"""
    seed: int = 0
    """the first round's seed; each further round takes the next"""
    op: Annotated[str, arg(metavar="OP,...")] = ""
    """ops to check; all by default"""
    backend: Annotated[str, arg(metavar="BACKEND,...")] = ""
    """backends to check; all that are present by default"""
    samples: Annotated[int | None, arg(metavar="N")] = None
    """stop after this many rounds instead of by time"""


def main(argv: list[str]) -> int:
    options = parse(Options, "fastlm verify", argv)
    if not options.seconds > 0:
        raise ConfigError(f"seconds is {options.seconds}, expected a number above 0")
    if options.samples is not None and options.samples < 1:
        raise ConfigError(f"samples is {options.samples}, expected at least 1")
    pairs, absent = fuzz.select(_names(options.op), _names(options.backend))
    if not pairs:
        reasons = "; ".join(f"{op} on {backend}: {why}" for (op, backend), why in absent.items())
        raise ConfigError(f"nothing to verify: {reasons}")
    return _survive_crashes(lambda note: _verify(options, pairs, absent, note))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _survive_crashes(work: Callable[[Callable[[str], None]], int]) -> int:
    """Run `work` in a forked process, so that a kernel that crashes still leaves the command that repeats it.

    `work` is handed a function that notes the command under way in memory that both processes share.
    """
    if not hasattr(os, "fork"):
        return work(lambda command: None)
    shared = mmap.mmap(-1, COMMAND_BYTES)

    def note(command: str) -> None:
        shared[:] = command.encode().ljust(COMMAND_BYTES, b"\0")

    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = work(note)
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(_wait(child))
    if status >= 0:
        return status
    command = bytes(shared).rstrip(b"\0").decode()
    print(f"FAILED crash: {signal.Signals(-status).name}\n  {command}", flush=True)
    return 1


def _wait(child: int) -> int:
    """The child's status; Ctrl-C reaches it as well, and it decides when to end."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return os.waitpid(child, 0)[1]


def _verify(options: Options, pairs: list, absent: dict, note: Callable[[str], None]) -> int:
    shown: Counter = Counter()
    printed = Counter[str]()

    def show(word: str, findings: list[fuzz.Finding]) -> None:
        for op, backend, kind, message, reproduce in findings[printed[word] :]:
            shown[op, backend, kind] += 1
            if shown[op, backend, kind] <= SHOWN:
                print(f"{word} {op} on {backend}, {kind}: {message}\n  {reproduce}", flush=True)
        printed[word] = len(findings)

    def step(report: fuzz.Report, command: str) -> None:
        note(command)
        show("FAILED", report.failures)
        show("NOTED", report.foreign)
        status(report)

    with _status(options) as status:
        report = fuzz.run(pairs, options.seed, options.seconds, options.samples, step)
    step(report, "")
    for key, count in shown.items():
        if count > SHOWN:
            print(f"... and {count - SHOWN} more of {', '.join(key)}")
    _print_absent(absent)
    _print_errors(report)
    noted = f", {len(report.foreign)} noted in PyTorch's own operators" if report.foreign else ""
    print(f"{report.samples} samples, {_failures(report)}{noted}")
    return 1 if report.failures else 0


def _failures(report: fuzz.Report) -> str:
    count = len(report.failures)
    return f"{count} failure{'' if count == 1 else 's'}"


@contextlib.contextmanager
def _status(options: Options) -> Iterator[Callable[[fuzz.Report], None]]:
    """A line on the terminal that says how far the run is."""
    if not sys.stderr.isatty():
        yield lambda report: None
        return
    start, last = time.monotonic(), 0.0

    def show(report: fuzz.Report) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.2:
            left = f"{max(options.seconds - now + start, 0):.0f} s left" if options.samples is None else ""
            sys.stderr.write(f"\r\x1b[K{report.samples} samples, {_failures(report)}  {left}")
            sys.stderr.flush()
            last = now

    yield show
    sys.stderr.write("\r\x1b[K")


def _print_absent(absent: dict[tuple[str, str], str]) -> None:
    by_backend: dict[str, list[str]] = {}
    for (op, backend), _ in absent.items():
        by_backend.setdefault(backend, []).append(op)
    for backend, ops in by_backend.items():
        reasons = {absent[op, backend].replace(op, "the op") for op in ops}
        print(f"not run on {backend}: {', '.join(ops)} ({'; '.join(sorted(reasons))})")


def _print_errors(report: fuzz.Report) -> None:
    rows = [
        (
            op, backend, dtype, str(row.samples), f"{row.ulp:.1f}", f"{row.torch_ulp:.1f}",
            f"{row.rms:.2e}", f"{row.torch_rms:.2e}", f"{100 * row.of_bound:.0f} %",
        )
        for (op, backend, dtype), row in sorted(report.table.items())
    ]  # fmt: skip
    headers = ("op", "backend", "dtype", "samples", "max ULP", "torch's", "rms error", "torch's", "of bound")
    print_table(headers, rows, "errors of outputs and gradients against fp64", left=3)
