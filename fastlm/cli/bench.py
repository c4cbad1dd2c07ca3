"""`fastlm bench`: how fast every op and the engine are here, against whom, and how close to the machine's limits."""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from ..benchmarks import providers, registry, report
from ..benchmarks.case import Case
from ..benchmarks.results import Results, Row, environment, load
from ..benchmarks.runner import ALLOCATORS, Plan, run
from ..errors import ConfigError, shown
from ..training.config import MAX_THREADS
from .flags import parse
from .tables import print_table

ROUND_SECONDS, QUICK_ROUND_SECONDS = 0.2, 0.1


@dataclass
class Options:
    """Time ops and the engine against PyTorch and the peers that are installed.

    Every result is compared with fp64 first: a wrong one gets no time. All providers take turns in one process;
    shown are medians, the spread, the share of the roof measured in the same run, and peak memory. On a CPU
    each headline case runs twice: with freed memory kept by the C library, and as it comes.

    See also: fastlm bench compare A.json B.json, fastlm bench report README.md RESULTS.json, fastlm bench prepare
    """

    op: Positional[Annotated[str, arg(metavar="[OP,...|train|generate|all]")]] = "all"
    """what to time"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    dtype: Annotated[str, arg(metavar="DTYPE,...")] = ""
    """float32, bfloat16, float16, float64; by default those of each op"""
    shape: Annotated[str, arg(metavar="SHAPE,...")] = ""
    """extents such as 4096x768 instead of the op's own cases"""
    passes: Annotated[str, arg(name="pass", metavar="PASS,...")] = ""
    """fwd, bwd, full"""
    against: Annotated[str, arg(metavar="PROVIDER,...")] = ""
    """who to compare with; by default everyone that is installed"""
    quick: bool = False
    """small shapes: about a minute in all"""
    allocator: Literal["kept", "default", "both"] = "both"
    """whether the C library keeps freed memory on a CPU"""
    threads: Annotated[int | None, arg(metavar="N")] = None
    """of the CPU; by default as many as torch uses"""
    seconds: Annotated[float | None, arg(metavar="S")] = None
    """to spend on the rounds of each pass (by default 0.2, 0.1 if quick): more of them make steadier medians"""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """write the results here"""
    plot: Annotated[Path | None, arg(metavar="DIR")] = None
    """write PNG plots here"""
    csv: Annotated[Path | None, arg(metavar="FILE")] = None
    """write the rows here, as comma-separated values"""


@dataclass
class CompareOptions:
    """Show what moved between two results files beyond the noise; exit status 1 if fastlm got slower."""

    before: Positional[Annotated[Path, arg(metavar="A.json")]]
    after: Positional[Annotated[Path, arg(metavar="B.json")]]
    threshold: float = 0.05
    """slow-down that counts as a regression: 0.05 is 5 %"""
    relative: bool = False
    """compare ratios to PyTorch instead of times, for files of different machines"""


@dataclass
class ReportOptions:
    """Write tables from results files into a text, between <!-- bench:NAME --> and <!-- /bench -->.

    NAME is an op, train, generate, all, or goals: what is to be reached and what is.
    """

    readme: Positional[Annotated[Path, arg(metavar="README.md")]]
    results: Positional[Annotated[tuple[Path, ...], arg(metavar="RESULTS.json ...")]]
    plot: Annotated[Path | None, arg(metavar="DIR")] = None
    """write the plots of each file here, in a folder of the file's name"""


@dataclass
class PrepareOptions:
    """Time the data pipeline beside datasets, tokenizers and datatrove, and watch the memory of fastlm prepare.

    All work on the same bytes, real text repeated to size, in turns and in processes of their own. A peer that is not
    there is named and left out; it may have an interpreter of its own.
    """

    text: tuple[Path, ...]
    """files of real English text, UTF-8; a line of a .tsv is a document, elsewhere blank lines part them"""
    megabytes: int = 500
    """of text and of documents"""
    memory_megabytes: tuple[int, ...] = (100, 500, 2000)
    """of documents whose preparation is watched for memory"""
    rounds: int = 5
    """of each provider; shown are medians"""
    workers: int = 2
    """processes or threads of each provider"""
    parts: Annotated[str, arg(metavar="PART,...")] = "tokens,documents,memory"
    """what to measure"""
    peers: Annotated[str, arg(metavar="PEER,...")] = "datasets,tokenizers,datatrove"
    """who to compare with"""
    datasets_python: Annotated[str, arg(metavar="PYTHON")] = ""
    """an interpreter that has datasets and tokenizers; by default this one"""
    datatrove_python: Annotated[str, arg(metavar="PYTHON")] = ""
    """an interpreter that has datatrove; by default this one"""
    tokenizer: Annotated[Path | None, arg(metavar="FILE")] = None
    """a tokenizer.json; by default one of 32,000 tokens is trained on the start of the text"""
    work: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """where to write, by default the system's temporary folder; it takes several times the largest size"""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """write the results here"""
    report: Annotated[Path | None, arg(metavar="GUIDE.md")] = None
    """write the table into this text, between <!-- bench:prepare --> and <!-- /bench -->"""


def main(argv: list[str]) -> int:
    verbs: dict[str, tuple[type, Callable]] = {
        "compare": (CompareOptions, _compare),
        "report": (ReportOptions, _report),
        "prepare": (PrepareOptions, _prepare),
    }
    if argv and argv[0] in verbs:
        kind, action = verbs[argv[0]]
        return action(parse(kind, f"fastlm bench {argv[0]}", argv[1:]))
    return _bench(parse(Options, "fastlm bench", argv))


def _bench(options: Options) -> int:
    plan = make_plan(options)
    for path in (options.json, options.csv):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.parent} is not there")
    results = Results(environment(plan.device))
    status = 0
    try:
        with _progress(plan) as (started, measured):
            run(plan, results, started, measured)
    except KeyboardInterrupt:
        print("interrupted: what follows was measured before that", file=sys.stderr)
        status = 130
    _print(results)
    if options.json:
        results.save(options.json)
    if options.csv:
        results.save_csv(options.csv)
    if options.plot:
        from ..benchmarks import plots

        plots.write(results, options.plot)
    wrong = [r for r in results.rows if r.status in ("wrong", "failed") and providers.is_ours(r.provider)]
    return status or (1 if wrong else 0)


def make_plan(options: Options) -> Plan:
    """What the command line asks for.

    Raises:
        ConfigError: for an unknown op, provider, dtype, pass, shape or device.
    """
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {device!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    threads = torch.get_num_threads() if options.threads is None else options.threads
    if threads < 1:
        raise ConfigError(f"threads is {threads}, expected at least 1")
    if threads > MAX_THREADS:
        raise ConfigError(f"threads is {shown(threads)}, expected at most {MAX_THREADS}")
    against = _names(options.against)
    if against:
        registry.known(against, providers.ALL, "provider")
        against.append("torch")  # the yardstick of errors and ratios
    cases = registry.select(
        options.op, device, _names(options.dtype), _names(options.shape), _names(options.passes), options.quick
    )
    allocators = _allocators(options) if kind == "cpu" else ("cuda",)
    seconds = options.seconds
    if seconds is None:
        seconds = QUICK_ROUND_SECONDS if options.quick else ROUND_SECONDS
    elif not 0 < seconds < float("inf"):
        raise ConfigError(f"seconds is {seconds}, expected a finite number above 0")
    scaling = kind == "cpu" and options.op == "all" and not options.quick
    return Plan(cases, device, threads, against, seconds, allocators, scaling)


def _allocators(options: Options) -> tuple[str, ...]:
    if options.allocator != "both":
        return (options.allocator,)
    if platform.libc_ver()[0] != "glibc":
        return ("default",)
    return ("kept",) if options.quick else ALLOCATORS


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@contextlib.contextmanager
def _progress(plan: Plan) -> Iterator[tuple[Callable[[Case, str], None], Callable[[Row], None]]]:
    """A bar with the time left on a terminal, a line a case with the time so far elsewhere; both on standard error."""
    if not sys.stderr.isatty():
        done, begun = 0, time.monotonic()

        def note(case: Case, allocator: str) -> None:
            nonlocal done
            done += 1
            elapsed = f"{time.monotonic() - begun:.0f} s"
            print(f"{done}/{plan.total} {elapsed} {case.describe()} ({allocator} memory)", file=sys.stderr, flush=True)

        yield note, lambda row: None
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
        task = bar.add_task("measuring the roof", total=plan.total)
        running = False

        def start(case: Case, allocator: str) -> None:
            nonlocal running
            bar.update(task, advance=1 if running else 0, description=f"{case.describe()} ({allocator} memory)")
            running = True

        yield start, lambda row: None
        bar.update(task, completed=plan.total)


def _print(results: Results) -> None:
    timed = [row for row in results.rows if row.status == "ok"]
    e = results.environment
    print(f"{e['cpu'] if e['device'] == 'cpu' else e['device']}, torch {e['packages'].get('torch')}, {e['date']}")
    for line in report.roof_lines(results):
        print(line)
    if timed:
        print_table(report.HEADERS, [report.cells(row) for row in timed], left=3)
    for line in report.absences(results.rows):
        print(f"not timed  {line}")


def _compare(options: CompareOptions) -> int:
    from ..benchmarks.compare import compare

    if options.threshold < 0:
        raise ConfigError(f"threshold is {options.threshold}, expected at least 0")
    changes, lost = compare(load(options.before), load(options.after), options.relative)
    moved = [c for c in changes if c.beyond_noise]
    rows = [
        (
            report.case_name(c.after), c.after.which, c.after.label, report.seconds(c.before.median),
            report.seconds(c.after.median), f"{c.factor:.2f}x",
            "regression" if c.is_regression(options.threshold) else "faster" if c.factor < 1 else "slower",
        )
        for c in moved
    ]  # fmt: skip
    if rows:
        print_table(("case", "pass", "provider", "before", "after", "time", ""), rows, left=3)
    print(f"{len(changes)} rows in both files, {len(moved)} moved beyond the noise")
    for row in lost:
        print(f"no longer timed: {report.case_name(row)} {row.which} {row.label}")
    gone = [row for row in lost if providers.is_ours(row.provider)]
    return 1 if gone or any(c.is_regression(options.threshold) for c in changes) else 0


def _report(options: ReportOptions) -> int:
    if not options.results:
        raise ConfigError("no results file is given; write one with fastlm bench --json FILE")
    files = [load(path) for path in options.results]
    names = report.write_readme(options.readme, files)
    print(f"{options.readme}: wrote {', '.join(names)}")
    if options.plot:
        from ..benchmarks import plots

        for path, results in zip(options.results, files, strict=True):
            plots.write(results, options.plot / path.stem)
    return 0


def _prepare(options: PrepareOptions) -> int:
    from ..benchmarks import prepare, prepare_report

    _check_prepare(options)
    pythons = {"datasets": options.datasets_python, "datatrove": options.datatrove_python}
    plan = prepare.Plan(
        options.text, options.megabytes, options.memory_megabytes, options.rounds, options.workers,
        registry.known(_names(options.parts), prepare.PARTS, "part"),
        registry.known(_names(options.peers), prepare.ALL_PEERS, "peer"),
        {name: python for name, python in pythons.items() if python},
        options.tokenizer, options.work,
    )  # fmt: skip
    results = Results(environment("cpu"))
    status = 0
    try:
        prepare.run(plan, results, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print("interrupted: what follows was measured before that", file=sys.stderr)
        status = 130
    print_table(prepare_report.HEADERS, prepare_report.cells(results.rows), left=prepare_report.LEFT)
    for said, met in prepare_report.goals(results.rows):
        print(f"{'reached' if met else 'missed':<8} {said}")
    if options.json:
        results.save(options.json)
    if options.report:
        prepare_report.write(options.report, results)
    wrong = [row for row in results.rows if row.status in ("wrong", "failed") and row.provider == "fastlm"]
    return status or (1 if wrong else 0)


def _check_prepare(options: PrepareOptions) -> None:
    for name in ("megabytes", "rounds", "workers"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} is {shown(getattr(options, name))}, expected at least 1")
    for size in options.memory_megabytes:
        if size < 1:
            raise ConfigError(f"memory_megabytes has {shown(size)}, expected at least 1")
    if not options.text:
        raise ConfigError("text is empty, expected files of real text")
    for path in (*options.text, *filter(None, [options.tokenizer, options.report])):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
    if options.work is not None and not options.work.is_dir():
        raise ConfigError(f"work is {options.work}, expected a folder that is there")
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"{options.json}: the folder {options.json.parent} is not there")
