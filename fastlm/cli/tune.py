"""`fastlm tune`: prove every GPU kernel on this machine's GPU and time it, for the choice of backends."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from .._core import proofs
from .._core.dispatch import backend
from .._core.files import replace_text
from .._core.proofs import Entry
from ..errors import ConfigError
from ..proving import devices, jobs
from ..proving.devices import Device
from ..proving.jobs import Job
from ..proving.tuner import Limits, Result, begin, tune
from .flags import parse
from .tables import print_table


@dataclass
class Options:
    """Prove every GPU kernel on this machine's GPU and time it, so that the right and fast ones serve.

    Each kernel is checked in each dtype and for each class of features, as `fastlm verify` does it: values and
    gradients against fp64, the memory around every buffer, the same bits again. Then it is timed beside PyTorch's
    operator, and tiles are searched. Each runs in a process of its own: one that crashes or hangs costs the others
    nothing. The proof goes into the user's cache folder (or FASTLM_PROOFS) after each; Ctrl-C leaves what there is, and
    the next run continues. From then on the automatic choice of backends goes by it, until the GPU, its driver, torch,
    triton or the kernels change.

    Exit status: 0, 1 if a kernel is wrong, 2 without a GPU, 130 after Ctrl-C.
    """

    ops: Annotated[str, arg(metavar="OP,...")] = ""
    """ops to prove; all by default"""
    minutes: Annotated[float | None, arg(metavar="M")] = None
    """begin nothing new after this time; by default until all is proved"""
    device: str = "auto"
    """auto, cuda, cuda:N; or interpreter: Triton's, to try the command without a GPU"""
    fresh: bool = False
    """forget what an earlier run proved of this device"""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """write the proof here too, to be committed"""


def main(argv: list[str]) -> int:
    options = parse(Options, "fastlm tune", argv)
    if options.minutes is not None and not 0 < options.minutes < float("inf"):
        raise ConfigError(f"minutes is {options.minutes}, expected a finite number above 0")
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"{options.json}: the folder {options.json.parent} is not there")
    names = [name.strip() for name in options.ops.split(",") if name.strip()]
    pairs = jobs.kernels(names, ("triton", "cuda"))
    device = devices.find(options.device)
    if device is None:
        ops = len({op for op, _ in pairs})
        dtypes = ", ".join(devices.DTYPES)
        print(
            f"fastlm tune: no GPU here: tune would check {ops} ops x their Triton and CUDA kernels x {dtypes} against "
            f"fp64, time them, and write the proof to {proofs.folder()}",
            file=sys.stderr,
        )
        return 2
    return _tune(options, names, device)


def _tune(options: Options, names: list[str], device: Device) -> int:
    with backend(None):  # whatever FASTLM_BACKEND says
        planned = jobs.plan(names, device)
    limits = Limits(float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes)
    result = begin(device, options.fresh)
    if result.unwritten:
        print(f"fastlm tune: the proof cannot be kept: {result.unwritten}", file=sys.stderr)
    status = 0
    try:
        with _progress(len(planned)) as (started, finished):
            tune(planned, device, limits, result, started, finished)
    except KeyboardInterrupt:
        print("interrupted: what was proved before that is kept; the same command continues", file=sys.stderr)
        status = 130
    _print(result, device)
    for reason, ops in _absent(names, device).items():
        print(f"not there   {', '.join(ops)}: {reason}")
    if options.json:
        replace_text(options.json, proofs.dump(result.proof))
    return status or (1 if result.wrong else 0)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[Job, str], None], Callable[[Job], None]]]:
    """A bar with the time left on a terminal, a line a job elsewhere; both on standard error."""
    if not sys.stderr.isatty():
        done, begun = 0, time.monotonic()

        def note(job: Job, what: str) -> None:
            elapsed = f"{time.monotonic() - begun:.0f} s"
            print(f"{done + 1}/{total} {elapsed} {job.describe()}{_also(what)}", file=sys.stderr, flush=True)

        def count(job: Job) -> None:
            nonlocal done
            done += 1

        yield note, count
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as bar:
        task = bar.add_task("", total=total)
        yield (
            lambda job, what: bar.update(task, description=job.describe() + _also(what)),
            lambda job: bar.update(task, advance=1),
        )


def _absent(names: list[str], device: Device) -> dict[str, list[str]]:
    """Why kernels cannot run here, and which."""
    found: dict[str, list[str]] = {}
    for op, kernel in jobs.kernels(names, device.backends):
        if reason := jobs.absent(op, kernel, device):
            found.setdefault(reason, []).append(f"{op} on {kernel}")
    return found


def _also(what: str) -> str:
    return f" ({what})" if what else ""


def _print(result: Result, device: Device) -> None:
    entries = [entry for _, entry in sorted(result.proof.entries.items()) if entry.features != proofs.TILES]
    key = device.key
    if entries:
        headers = ("op", "backend", "dtype", "features", "verdict", "calls", "fastest", "slowest", "against")
        title = f"{key.device} ({key.architecture}), {key.runtime}, driver {key.driver}, torch {key.torch}"
        print_table(headers, [_cells(entry) for entry in entries], f"{title}, triton {key.triton or 'none'}", left=5)
    for entry in result.wrong:
        what = f"{entry.op} on {entry.backend}, {entry.dtype}, {entry.features}"
        print(f"{entry.verdict.upper()} {what}: {entry.reason}" + (f"\n  {entry.command}" if entry.command else ""))
    for entry in result.proof.entries.values():
        for row, tile in entry.tiles.items():
            print(f"tile       {row} -> {','.join(map(str, tile))}")
    for line in result.skipped:
        print(f"skipped    {line}")
    if result.left:
        print(f"{result.left} more were not begun: the same command continues")
    if not result.unwritten:
        print(f"proof      {proofs.folder() / key.file_name}")


def _cells(entry: Entry) -> tuple[str, ...]:
    """A row of the table: how many times as fast the kernel is, at best and at worst, as what serves without it."""
    ratios = [next(s for n, s in t.seconds.items() if n != entry.backend) / t.seconds[entry.backend]
              for t in entry.timings]  # fmt: skip
    other = next((n for t in entry.timings for n in t.seconds if n != entry.backend), "")
    best, worst = (f"{max(ratios):.2f}x", f"{min(ratios):.2f}x") if ratios else ("", "")
    return (*entry.name, entry.verdict, str(entry.samples), best, worst, other)
