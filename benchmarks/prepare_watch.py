"""A command's wall clock, processor time and peak memory, those of all processes below it included."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

INTERVAL = 0.05  # seconds between two looks


@dataclass(frozen=True)
class Measured:
    """What a command took.

    Attributes:
        output: what it wrote to standard output.
        seconds: from its start to its end, imports included.
        cpu_seconds: of all its processes.
        peak_bytes: the most that the proportional set sizes (PSS) of all of them were together.
    """

    output: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


class CommandError(Exception):
    """A command ended with a status other than 0; the message is the last line of its standard error."""


def measured(command: Sequence[str], env: Mapping[str, str] | None = None) -> Measured:
    """Run a command to its end.

    Raises:
        CommandError: if it fails or cannot be started.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out, tempfile.TemporaryFile("w+b") as err:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        except OSError as error:
            raise CommandError(f"it did not start: {error.strerror}") from error
        watch = Watch(process.pid)
        watch.start()
        try:
            status = process.wait()
        finally:
            if process.returncode is None:  # interrupted
                process.kill()
                process.wait()
            seconds = time.perf_counter() - start
            watch.ended.set()
            watch.join()
        if status:
            err.seek(0)
            lines = err.read().decode(errors="replace").strip().splitlines()
            raise CommandError(lines[-1] if lines else f"it ended with status {status}")
        out.seek(0)
        return Measured(out.read(), seconds, sum(watch.cpu_seconds.values()), watch.peak)


class Watch(threading.Thread):
    """Samples a process and all below it, since a parent is not told of what its grandchildren used."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.ended = pid, 0, threading.Event()
        self.cpu_seconds: dict[int, float] = {}

    def run(self) -> None:
        while not self.ended.wait(INTERVAL):
            total = 0
            for process in self._processes():
                with contextlib.suppress(psutil.Error):  # ended meanwhile
                    times = process.cpu_times()
                    self.cpu_seconds[process.pid] = times.user + times.system
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total)

    def _processes(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []
