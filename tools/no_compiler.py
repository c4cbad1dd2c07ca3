"""Every verb in an environment that fastlm was installed into without a compiler, and without Python's headers.

    python tools/no_compiler.py

It borrows the packages of the Python that runs it, downloads nothing but the demo's corpus, and takes a minute or two.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOUD = "fastlm: WITHOUT ITS CPU KERNELS, so slow: "
NO_HEADERS = """#!/bin/sh
echo "csrc/bindings/bindings_cpu.cpp:1:10: fatal error: Python.h: No such file or directory" >&2
exit 1
"""
TEXT = "It was the best of times, it was the worst of times.\n" * 400


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="no-compiler-") as folder:
        place = Path(folder)
        source = copy_source(place / "source")
        python = environment(place / "venv")
        reason = install(source, python, place, compiler=None)
        assert "there was no C++ compiler" in reason, reason
        run_verbs(python, place, reason)
        reason = install(source, python, place, compiler=NO_HEADERS)
        assert "Python's headers (Python.h) were not there" in reason, reason
        reason = install(source, python, place, compiler=None, FASTLM_CPU="0")
        assert "FASTLM_CPU=0" in reason, reason
        reason = install(source, python, place, compiler=None, editable=True)
        assert "there was no C++ compiler" in reason, reason
    print("every verb runs without the CPU extension")


def copy_source(to: Path) -> Path:
    """What an installation reads, without anything built."""
    to.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, to / name)
    for name in ("fastlm", "kernels", "benchmarks", "csrc"):
        shutil.copytree(
            ROOT / name, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_cpu_missing.txt")
        )
    return to


def environment(folder: Path) -> Path:
    """An environment whose other packages are those of this one; its Python."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Folders only: the borrowed environment's .pth files, which make its own fastlm importable, are not read.
    borrowed = [path for path in sys.path if path.endswith("-packages") and Path(path).is_dir()]
    (packages / "borrowed.pth").write_text("\n".join([*borrowed, *site.getsitepackages()]) + "\n")
    return folder / "bin" / "python"


def install(
    source: Path, python: Path, place: Path, compiler: str | None, editable: bool = False, **variables: str
) -> str:
    """Install with this script in the compiler's place, or with none; the reason that `fastlm doctor` gives."""
    tools = Path(tempfile.mkdtemp(dir=place))
    for name in ("cc", "c++", "gcc", "g++") if compiler else ():
        (tools / name).write_text(compiler or "")
        (tools / name).chmod(0o755)
    shell = [str(Path(shutil.which("sh") or "/bin/sh").parent)] if compiler else []
    path = os.pathsep.join([str(tools), *shell])
    shutil.rmtree(source / "build", ignore_errors=True)
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "FASTLM_CPU")}
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--force-reinstall"]
    command += ["--no-build-isolation", *(["--editable"] if editable else []), source]
    done = run(command, place, env | {"PATH": path, "FASTLM_CUDA": "0"} | variables)
    assert "Traceback" not in done.stderr, done.stderr
    report = json.loads(run([python, "-m", "fastlm.cli", "doctor", "--json"], place).stdout)
    assert report["cpu"]["isas"] == [], "the CPU extension is there"
    return report["cpu"]["extension"]


def run_verbs(python: Path, place: Path, reason: str) -> None:
    (place / "a.txt").write_text(TEXT)
    small = "--n-layer 1 --n-head 2 --n-embd 32 --context-length 16 --batch-size 2 --max-steps 3 --eval-interval 3"
    verbs = [
        "doctor",
        "prepare a.txt --out data --vocab-size 300",
        f"train data --out float32 {small} --dtype float32",
        f"train data --out bfloat16 {small} --dtype bfloat16",
        f"train data --out accumulated {small} --dtype bfloat16 --gradient-accumulation 2",
        "train --out bfloat16 --resume --max-steps 5",
        "generate bfloat16 --prompt It --max-new-tokens 4",
        "demo --steps 2 --minutes 0.2 --sample-tokens 4",
        "verify --seconds 3",
        "bench layer_norm --quick --device cpu",
    ]
    for verb in verbs:
        done = run([python, "-m", "fastlm.cli", *verb.split()], place)
        loud = [line for line in done.stderr.splitlines() if line.startswith(LOUD)]
        assert len(loud) == 1, (verb, done.stderr)
        assert reason in loud[0], (reason, loud)
        print(f"ok   fastlm {verb}", flush=True)


def run(command: list, place: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in command]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


if __name__ == "__main__":
    main()
