"""Starts a worker for each job, follows it, survives its death, and keeps the proof after each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from .._core import proofs
from .._core.files import held
from .._core.proofs import Entry, Proof, Timing
from ..errors import ConfigError, DataError
from .devices import Device
from .jobs import Job

HANG_SECONDS = 180.0  # without a sign of life: the slowest step compiles some ten kernels
START_SECONDS = 600.0  # to import torch and to begin, on a busy machine too
JOB_SECONDS = 120.0  # for the checks and timings of a job


@dataclass
class Limits:
    """Seconds: until when jobs are begun (by time.monotonic), for one job, and without a sign of life of it."""

    deadline: float = float("inf")
    job: float = JOB_SECONDS
    hang: float = HANG_SECONDS


@dataclass
class Result:
    """What a run did.

    Attributes:
        proof: all that is known of the device now, from earlier runs too.
        fresh: the entries that this run made.
        skipped: jobs without an entry, and cases that could not be checked or timed, and why.
        left: jobs that there was no time for.
        unwritten: why nothing could be kept, or "".
        begun: whether any job's process has started.
    """

    proof: Proof
    fresh: list[Entry] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    left: int = 0
    unwritten: str = ""
    begun: bool = False

    @property
    def wrong(self) -> list[Entry]:
        return [entry for entry in self.proof.entries.values() if entry.refuses]


def tune(
    jobs: list[Job],
    device: Device,
    limits: Limits,
    result: Result,
    started: Callable[[Job, str], None] = lambda job, note: None,
    finished: Callable[[Job], None] = lambda job: None,
) -> None:
    """Prove each job that has no entry yet, filling `result` as they come, so that an interrupt loses nothing.

    Several processes may do so at once: each takes its turn on the device, and does what the others have not done.

    Args:
        started: told each job, and again with what it waits for.
        finished: told each job, also one that is proved already.

    Raises:
        ConfigError: if a worker cannot start.
    """
    for number, job in enumerate(jobs):
        if time.monotonic() >= limits.deadline:
            result.left = len(jobs) - number
            return
        started(job, "")
        waiting = functools.partial(started, job, "waits for another fastlm tune on this device")
        with turn(result, waiting):
            if job.name not in result.proof.entries:
                entry = run_job(job, device, limits, result)
                if entry is not None:
                    keep(result, entry)
        finished(job)


@contextlib.contextmanager
def turn(result: Result, waiting: Callable[[], None]) -> Iterator[None]:
    """Alone among the processes that tune this device, and with what they have found."""
    if result.unwritten:
        yield
        return
    path = proofs.folder() / result.proof.key.file_name
    with held(path.with_suffix(".busy"), waiting):
        with contextlib.suppress(DataError, OSError):
            result.proof.entries |= {n: e for n, e in proofs.load(path).entries.items() if n not in _names(result)}
        yield


def _names(result: Result) -> set:
    return {entry.name for entry in result.fresh}


def keep(result: Result, entry: Entry) -> None:
    result.fresh.append(entry)
    result.proof.entries[entry.name] = entry
    if not result.unwritten:
        try:
            proofs.add(result.proof.key, [entry])
        except OSError as error:
            result.unwritten = str(error)


def begin(device: Device, afresh: bool) -> Result:
    """A run's result before its first job, with what is proved already unless it begins afresh."""
    result = Result(Proof(device.key))
    try:
        path = proofs.folder() / device.key.file_name
        if afresh:
            proofs.add(device.key, [], afresh=True)
        elif path.exists():
            result.proof = proofs.load(path)
        proofs.add(device.key, [])  # now, rather than after the first job
    except DataError:
        proofs.add(device.key, [])  # in place of a damaged one
    except OSError as error:
        result.unwritten = str(error)
    return result


def run_job(job: Job, device: Device, limits: Limits, result: Result) -> Entry | None:
    """The entry of one job, from a worker of its own; None where there was nothing to check."""
    order = {"job": dataclasses.asdict(job), "device": device.to_dict(), "seconds": limits.job}
    entry = Entry(*job.name, "right", datetime.now(timezone.utc).date().isoformat())
    step, begun = "", False
    timings, skipped, tiles = list[Timing](), list[str](), dict[str, tuple[int, ...]]()
    with Worker(order, device.environment) as worker:
        for kind, payload in worker.events(limits.hang):
            if kind == "started":
                begun = True
            elif kind == "step":
                step = payload
            elif kind == "checked":
                entry = dataclasses.replace(entry, samples=payload)
            elif kind == "timing":
                timings.append(Timing(**payload | {"shape": tuple(payload["shape"]), "size": tuple(payload["size"])}))
            elif kind == "skipped":
                skipped.append(payload)
            elif kind == "tile":
                tiles[payload[0]] = tuple(payload[1])
            elif kind == "wrong":
                entry = dataclasses.replace(entry, verdict="wrong", reason=payload[0], command=payload[1])
            elif kind == "hung":
                reason = f"no sign of life for {limits.hang:.0f} s"
                entry = dataclasses.replace(entry, verdict="hung", reason=reason, command=step)
            elif kind == "died":
                entry = dataclasses.replace(entry, verdict="crashed", reason=_death(payload, worker), command=step)
    if not begun:  # no fault of the kernel
        why = f"its process did not start: {entry.reason}"
        if not result.begun:
            raise ConfigError(f"{job.describe()}: {why}")
        result.skipped.append(f"{job.describe()}: {why}")
        return None
    result.begun = True
    entry = dataclasses.replace(entry, timings=tuple(timings), skipped=tuple(skipped), tiles=tiles)
    result.skipped += [f"{job.describe()}: {text}" for text in skipped]
    if entry.verdict == "right" and not entry.samples and job.features != proofs.TILES:
        result.skipped.append(f"{job.describe()}: no random call reaches it here")
        return None
    return entry


def _death(status: int, worker: Worker) -> str:
    """Why a process ended that should not have."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"{name}, as of a system out of memory" if -status == signal.SIGKILL else name
    return f"exit status {status}: {worker.said()}"


class Worker:
    """A process that runs one job, with a group of its own; nothing of it is left when the block ends."""

    def __init__(self, order: dict[str, Any], environment: dict[str, str]):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastlm.proving.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, "FASTLM_BACKEND": "", **environment}, start_new_session=True,
        )  # fmt: skip
        self._order = json.dumps(order)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *raised: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def events(self, hang: float) -> Iterator[tuple[str, Any]]:
        """The worker's events, and last, where it did not come to its end, ("hung", None) or ("died", status).

        Args:
            hang: seconds without an event that make it hung, once there was a first one.
        """
        wait = START_SECONDS
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=wait)
            except queue.Empty:
                yield "hung", None
                return
            if not line:
                yield "died", self._process.wait()
                return
            kind, payload = json.loads(line)
            if kind == "done":
                return
            yield kind, payload
            wait = hang

    def _read(self, lines: queue.Queue[str]) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018 (for the type checker)
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(self._order)
            self._process.stdin.close()
            for line in self._process.stdout:
                lines.put(line)
        lines.put("")

    def said(self) -> str:
        """The last line that it wrote to its standard error."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"
