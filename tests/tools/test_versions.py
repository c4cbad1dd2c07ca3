"""tools/versions.py: what it lets `make test` install, and what it makes of the outcome."""

import shutil
import subprocess
import sys

import pytest

import versions

# In make's place: says what it was given, and counts as pytest does.
MAKE = """#!/bin/sh
for word in "$@"; do
  case $word in VENV=*) venv=${word#VENV=};; CONSTRAINTS=*) pins=${word#CONSTRAINTS=};; esac
done
mkdir -p "$venv/bin"
printf '#!/bin/sh\\necho torch %s triton 1.2.3\\n' "$(sed -n s/^torch==//p "$pins")" > "$venv/bin/python"
chmod +x "$venv/bin/python"
echo "make $1 in $venv"
case $(sed -n s/^torch==//p "$pins") in
  2.1.*) echo "make: no room" >&2; exit 2;;
  2.2.*) echo "FAILED test_a.py::test_b - assert 1 failed"; echo "== 2 failed, 7 passed, 1 skipped in 3.2s =="; exit 2;;
  *) echo "== 9 passed, 1 skipped in 3.2s ==";;
esac
"""


def ran(*asked):
    return subprocess.run([sys.executable, versions.__file__, *asked], capture_output=True, text=True, timeout=300)


@pytest.fixture
def make(tmp_path, monkeypatch):
    tools, environments = tmp_path / "tools", tmp_path / "environments"
    tools.mkdir()
    environments.mkdir()
    (tools / "make").write_text(MAKE)
    (tools / "make").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setenv("TMPDIR", str(environments))
    return environments


def test_every_pin_but_those_of_torch_and_triton_stays():
    pins = versions.PINS.read_text().split("\n")
    made = versions.constraints("2.15.0").split("\n")
    changed = {line for line in pins if line.startswith(("torch==", "triton=="))}
    assert set(pins) - set(made) == changed
    assert set(made) - set(pins) == {"torch==2.15.0"}


def test_each_version_gets_a_line_and_no_folder_stays(make):
    done = ran("2.3.0", "2.4.1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(" in ")[0] for line in lines if line.startswith("make")] == ["make test"] * 2
    assert lines[-2:] == [f"torch {version} triton 1.2.3: 9 passed, 1 skipped" for version in ("2.3.0", "2.4.1")]
    assert not any(make.iterdir())


def test_one_that_fails_hides_no_other(make):
    done = ran("2.1.0", "2.2.0", "2.3.0")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-3:] == [
        "torch 2.1.0: no test ran, as said above",
        "torch 2.2.0 triton 1.2.3: 2 failed, 7 passed, 1 skipped",
        "torch 2.3.0 triton 1.2.3: 9 passed, 1 skipped",
    ]
    assert "make: no room" in done.stderr


@pytest.mark.parametrize("word", ["latest", "torch==2.13.0", "2.13", "--help", ""])
def test_what_is_no_version_is_said_before_anything_runs(word, make):
    done = ran("2.3.0", word)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"versions: {word!r} is no version of torch, expected one such as 2.13.0\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_by_the_constraints_that_it_is_given(tmp_path):
    command = ["make", "--dry-run", "test", f"VENV={tmp_path}", f"CONSTRAINTS={tmp_path}/pins"]
    said = subprocess.run(command, cwd=versions.ROOT, capture_output=True, text=True, timeout=60).stdout
    (install,) = [line for line in said.splitlines() if "pip install" in line and ".[test]" in line]
    assert f"-c {tmp_path}/pins" in install
