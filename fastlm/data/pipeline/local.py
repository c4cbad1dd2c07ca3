"""Units of work on processes of this machine.

A worker is a fresh interpreter, neither forked nor told of the caller's main module, so that scripts need no guard. It
holds no state between units: one that the system kills is replaced, and its unit done again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..sources import Unit
from .stage import Job, run_unit

Done = Callable[[Unit, "dict[str, Any]"], None]
# The package's own first module imports torch, for 190 MB and a second that no worker needs: here it is run when a step
# of the user's asks for what is in it.
_CHILD = """
import sys, types
sys.path[:] = {path!r}

class Package(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__") or not self.__dict__.pop("_waiting", False):
            raise AttributeError(name)
        with open({folder!r} + "/__init__.py", encoding="utf-8") as file:
            exec(compile(file.read(), file.name, "exec"), self.__dict__)
        return getattr(self, name)

package = sys.modules["fastlm"] = Package("fastlm")
package.__path__, package.__package__, package._waiting = [{folder!r}], "fastlm", True
from fastlm.data.pipeline import worker
worker.main({parent})
"""


class LocalExecutor:
    """Runs units in `workers` processes; in this one where that is 1.

    An error ends all: no new unit begins, those before the one that failed are still done, and of several errors the
    one of the first unit is raised, so that it does not depend on who was faster.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __call__(self, job: Job, units: Iterator[Unit], done: Done) -> None:
        if self.workers == 1:
            for unit in units:
                done(unit, run_unit(job, unit))
            return
        _Run(job, units, done).run(self.workers)


class _Run:
    def __init__(self, job: Job, units: Iterator[Unit], done: Done) -> None:
        self.job, self.units, self.done = job, units, done
        self.lock = threading.Lock()
        self.errors: list[tuple[int, BaseException]] = []
        self.workers: list[Worker] = []
        self.stopped = False

    def run(self, count: int) -> None:
        threads = [threading.Thread(target=self.work, daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # a join without a time cannot be interrupted everywhere
                    thread.join(0.5)
        finally:
            self.stopped = True
            for worker in self.workers:
                worker.kill()
        if self.errors:
            raise min(self.errors, key=lambda pair: pair[0])[1]

    def work(self) -> None:
        worker = Worker(self.job)
        self.workers.append(worker)
        number = sys.maxsize
        try:
            while True:
                with self.lock:
                    unit = None if self.errors or self.stopped else next(self.units, None)
                if unit is None:
                    return
                number = unit.number
                record = self.result(worker, unit)
                with self.lock:
                    self.done(unit, record)
        except BaseException as error:
            self.errors.append((number, error))
        finally:
            worker.close()

    def result(self, worker: Worker, unit: Unit) -> dict[str, Any]:
        for last in (False, True):
            try:
                return worker.call(unit)
            except WorkerLost as error:
                if self.stopped or last:
                    raise DataError(
                        f"a worker was lost twice ({error}) at {unit.place}; where memory is short, give fewer workers"
                    ) from None
        raise AssertionError


class WorkerLost(Exception):
    """A worker ended without an answer."""


class Worker:
    """A child process that does one unit at a time; started when it is first needed."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, unit: Unit) -> dict[str, Any]:
        """What `run_unit` returns, or raises."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(unit, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            ok, value = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            self.close()
            raise WorkerLost(_ending(process.wait())) from None
        if ok:
            return value
        raise value

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Let it end: its input is over."""
        process, self._process = self._process, None
        if process is not None:
            for stream in (process.stdin, process.stdout):
                if stream:
                    with contextlib.suppress(OSError):  # what was not sent to one that is gone
                        stream.close()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        child = _CHILD.format(path=sys.path, folder=str(Path(__file__).parents[2]), parent=os.getpid())
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-c", child],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdin
        pickle.dump(self._job, self._process.stdin, pickle.HIGHEST_PROTOCOL)
        return self._process


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def cores() -> int:
    """How many workers there are by default: one a core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
