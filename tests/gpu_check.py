"""The proof of the GPU kernels on this machine's GPU, as a dated JSON file: `make gpu-check`.

Runs the tests that need a GPU, and compute-sanitizer on the small ones where it is installed. An architecture enters
an op's PROVED set when such a file, without failures, and the benchmark tables beside it are in benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import torch

import fastlm

HERE = Path(__file__).resolve().parent
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")
# Every kernel once on small shapes: what a sanitizer, some fifty times slower, can go through.
SMALL = "test_triton and not Choice or test_parity and (37 or 133)"


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split("\n")[0] or None


def machine() -> dict:
    """The GPU and the versions that a result belongs to."""
    import triton

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "fastlm": fastlm.__version__,
    }


def _counts(report: Path) -> dict[str, int]:
    """Numbers of tests, failures, errors and skips of a JUnit file."""
    if not report.exists():
        return {}
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    return {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}


def run_step(name: str, command: list[str], report: Path, timeout: float) -> dict:
    """One step of the check: its exit status, seconds and test counts; its output goes to the terminal."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch's own products repeat their bits only with it
    start = time.monotonic()
    try:
        # in the folder of the tests, so that the installed package is what `import fastlm` finds
        status = subprocess.run([*command, f"--junitxml={report}"], cwd=HERE, env=env, timeout=timeout).returncode
    except subprocess.TimeoutExpired:
        status = 124
    return {"step": name, "status": status, "seconds": round(time.monotonic() - start, 1), **_counts(report)}


def steps() -> dict[str, list[str]]:
    """The commands of the check by name."""
    found = {"tests": [*PYTEST, str(HERE)]}
    if sanitizer := shutil.which("compute-sanitizer"):
        prefix = [sanitizer, "--error-exitcode", "99", "--target-processes", "all"]
        found["compute-sanitizer"] = [*prefix, *PYTEST, "-k", SMALL, str(HERE)]
    return found


def write_result(folder: Path, result: dict) -> Path:
    """The result under a name of its device and time, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"gpu-check-{result['architecture']}-{result['time'].replace(':', '')}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, suffix=".tmp") as file:
        file.write(json.dumps(result, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, folder / name)
    return folder / name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE.parent / "benchmarks/results", help="folder of the result")
    parser.add_argument("--timeout", type=float, default=540.0, help="seconds for all steps together")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch finds no CUDA device, and only a GPU can prove the GPU kernels")
    deadline = time.monotonic() + options.timeout
    done = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, command in steps().items():
            left = max(1.0, deadline - time.monotonic())
            done.append(run_step(name, command, Path(scratch) / f"{name}.xml", left))
    moment = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    result = {"time": moment, **machine(), "steps": done, "passed": all(step["status"] == 0 for step in done)}
    print(f"{'passed' if result['passed'] else 'FAILED'}: {write_result(options.output, result)}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
