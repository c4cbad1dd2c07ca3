"""`make`'s own environment: one line where something is missing, and a second try that works."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(tmp_path, python=sys.executable, **variables):
    command = ["make", "environment", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}"]
    env = {name: value for name, value in os.environ.items() if name not in ("CXX", "MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(command, cwd=ROOT, env=env | variables, capture_output=True, text=True, timeout=300)


def stub(tmp_path, name, body):
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def python_without(tmp_path, word, instead="exit 1"):
    """This Python, but for commands in which a word occurs."""
    return stub(tmp_path, "python3", f'case "$*" in *{word}*) {instead};; esac\nexec {sys.executable} "$@"')


def said(done):
    """What make said, without its own remark on the target that failed."""
    return [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]


def has_pip(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("version_info", "is too old, fastlm needs Python 3.10 or newer"),
        ("ensurepip", "can make no virtual environment: install its venv module (apt: python3-venv)"),
    ],
)
def test_what_python_lacks_is_said_in_a_line(word, message, tmp_path):
    done = make(tmp_path, python_without(tmp_path, word))
    assert done.returncode != 0
    (line,) = said(done)
    assert message in line
    assert not (tmp_path / "venv").exists()


def test_no_python_is_said_in_a_line(tmp_path):
    done = make(tmp_path, tmp_path / "nowhere" / "python3")
    assert done.returncode != 0
    (line,) = said(done)
    assert "is not there: install Python 3.10 or newer" in line


def test_a_failure_half_way_leaves_nothing_and_the_next_try_works(tmp_path):
    broken = f"{sys.executable} -m venv --without-pip {tmp_path / 'venv'}; exit 1"
    done = make(tmp_path, python_without(tmp_path, "--clear", broken))
    assert done.returncode != 0
    assert "failed, as said above" in said(done)[-1]
    assert not (tmp_path / "venv").exists()
    assert make(tmp_path).returncode == 0
    assert has_pip(tmp_path)


def test_an_environment_left_without_pip_is_made_anew_and_a_whole_one_is_kept(tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    assert not has_pip(tmp_path)
    assert make(tmp_path).returncode == 0
    assert has_pip(tmp_path)
    (tmp_path / "venv" / "mine").touch()
    assert make(tmp_path, python_without(tmp_path, "ensurepip")).returncode == 0
    assert (tmp_path / "venv" / "mine").exists()


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine").touch()
    done = make(tmp_path)
    assert done.returncode != 0
    assert "is there and no virtual environment: remove it" in said(done)[0]
    assert (tmp_path / "venv" / "mine").exists()


def test_a_full_disk_is_said_in_a_line(tmp_path):
    df = stub(tmp_path, "df", "echo Filesystem 1M-blocks Used Available Capacity Mounted; echo x 9000 8900 100 99% /")
    done = make(tmp_path, PATH=f"{df.parent}:{os.environ['PATH']}")
    assert done.returncode != 0
    (line,) = said(done)
    assert "100 MB of disk are free for" in line
    assert not (tmp_path / "venv").exists()


def test_without_compiler_or_headers_it_goes_on_and_says_so(tmp_path):
    for name in ("make", "sh", "df", "awk", "mkdir", "rm", "rmdir"):
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools" / name).symlink_to(shutil.which(name))
    done = make(tmp_path, python_without(tmp_path, "Python.h"), PATH=str(tmp_path / "tools"))
    assert done.returncode == 0, done.stderr
    compiler, headers = said(done)
    assert "no C++ compiler, so no CPU kernels: install one (apt: g++)" in compiler
    assert "no Python.h, so no CPU kernels: install Python's headers (apt: python3-dev)" in headers
    assert has_pip(tmp_path)
