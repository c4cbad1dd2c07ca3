"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from .._core.files import naming, open_lock, still_at
from ..errors import ConfigError

LOCK = ".lock"


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[str]:
    """Hold a run folder, which is made if need be, against every other process; yields a warning or nothing.

    The lock is the system's own on the file `.lock`, so that a killed process leaves none; the file names the owner.
    Where the file system knows no locks there is none, and the warning says so.

    Raises:
        ConfigError: if another process holds it, naming that one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor, held = open_lock(path)
    try:
        if held is False:
            raise ConfigError(
                f"{folder}: in use by another run ({_owner(path)}); stop that one, or give another folder"
            )
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            with naming(path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(owner).encode())
            yield "" if held else f"{folder}: its file system knows no locks, so nothing keeps a second run out of it"
        finally:
            if still_at(descriptor, path):
                path.unlink()
    finally:
        os.close(descriptor)


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        return f"process {owner['pid']} on {owner['host']}, since {owner['started']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written its name yet
        return "a process that has just started"
