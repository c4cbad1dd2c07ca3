"""The child process of `fastlm.data.pipeline.local`: units in at standard input, results out at standard output."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from typing import Any

from ...errors import FastlmError
from .stage import run_unit


def main(parent: int) -> None:
    """Do units until the input ends, or the process `parent` is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent ends us
    incoming, outgoing = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not an answer
    threading.Thread(target=_follow_parent, args=(parent,), daemon=True).start()
    try:
        job = pickle.load(incoming)
        while True:
            unit = pickle.load(incoming)
            pickle.dump(_answer(job, unit), outgoing, pickle.HIGHEST_PROTOCOL)
            outgoing.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # at once: no library's threads are waited for


def _answer(job: Any, unit: Any) -> tuple[bool, Any]:
    try:
        return True, run_unit(job, unit)
    except (FastlmError, OSError, MemoryError) as error:
        return False, error
    except Exception as error:
        traceback.print_exc()
        return False, RuntimeError(f"{type(error).__name__}: {error}")


def _follow_parent(parent: int) -> None:
    """End with the parent, also in the middle of a unit: its temporary file is removed by the next run."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
