"""Files that are replaced whole or not at all, and locks that the system frees when their owner dies."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows
    fcntl = None  # type: ignore[assignment]

# What `replacing` and `staging` write to until it is complete: .NAME.PROCESS.RANDOM
TEMPORARY = re.compile(r"\.(.+)\.\d+\.[0-9a-f]{8}")
LOCK_POLL_SECONDS = 0.02


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], keep: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Yield a temporary file in `path`'s folder and move it onto `path` when the block succeeds.

    The content is on the disk before the move, so a crash at any time leaves either the old file or the
    new one. When the block fails the temporary file is removed and `path` is untouched. What a killed
    process left of an earlier attempt is removed first.

    Args:
        path: the file; its permissions are those that the user's umask gives a new one.
        keep: where an earlier `path` goes, instead of being lost. A crash between the two moves leaves `path`
            absent and `keep` whole.

    Raises:
        OSError: with a file's name, which a full disk's error does not carry by itself.
    """
    path = Path(path)
    remove_leftovers(path.parent, path.name)
    temporary, descriptor = _create(path)
    try:
        with naming(path):
            yield temporary
            os.fsync(descriptor)
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    _sync_folder(path.parent)


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    replace_bytes(path, text.encode())


def replace_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def staging(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `path`, whose files the block may move out; it is gone afterwards.

    What a killed process left of an earlier attempt is removed first.
    """
    path = Path(path)
    remove_leftovers(path.parent, path.name)
    temporary, descriptor = _create(path, folder=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left half-written in `folder`: for the file `name`, or for all.

    A writer locks its file, so one that lives is left alone, on whatever machine or in whatever container it
    runs. Where the file system knows no locks, nothing is removed.
    """
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        match = TEMPORARY.fullmatch(path.name)
        if match and name in (None, match[1]):
            with contextlib.suppress(OSError):  # a writer that has just finished, or another user's file
                _remove_unlocked(path)


def was_interrupted(path: str | os.PathLike[str]) -> bool:
    """Whether a process that wrote to `path`, by `replacing` or `staging`, left something half-written beside it."""
    path = Path(path)
    matches = (TEMPORARY.fullmatch(other.name) for other in path.parent.iterdir())
    return any(match and match[1] == path.name for match in matches)


def _remove_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        if try_lock(descriptor):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed or the process ends: False if another has it, None without locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES) else None
    return True


def open_lock(path: Path) -> tuple[int, bool | None]:
    """A lock file's descriptor, and what `try_lock` says of it; whoever holds it removes the file before closing it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        lock = try_lock(descriptor)
        if lock is False or still_at(descriptor, path):
            return descriptor, lock
        os.close(descriptor)  # the owner before us has just removed it


@contextlib.contextmanager
def held(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path` against every other process, after those that hold it now.

    Where the file system knows no locks there is none. A killed process leaves none.

    Args:
        waiting: called once if another process has it.
    """
    descriptor, lock = open_lock(path)
    if lock is False:
        waiting()
    while lock is False:
        os.close(descriptor)
        time.sleep(LOCK_POLL_SECONDS)
        descriptor, lock = open_lock(path)
    try:
        yield
    finally:
        if still_at(descriptor, path):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def still_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that `path` names: its owner may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def sync(file) -> None:
    """Flush a file to the disk, so that a rename never puts an empty file in place of a good one."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give an OSError the name of the file it is about: a full disk's does not carry one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _create(path: Path, folder: bool = False) -> tuple[Path, int]:
    """A new, locked file or folder beside `path`, and its descriptor."""
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        if folder:
            temporary.mkdir()
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        # Between the two calls another process may have taken it for a leftover.
        if try_lock(descriptor) is not False and still_at(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Put the move itself on the disk, where the system allows a folder to be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse; the file is in place by then.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
