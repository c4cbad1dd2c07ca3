"""The GPU kernels on this machine's GPU, as dated JSON files: `make gpu-check`.

Runs the tests that need a GPU, `fastlm tune`, the benchmark tables, and compute-sanitizer on small cases where it is
installed, each part in a process with a time limit of its own: what fails or hangs costs the others nothing. The proof
that tune writes, proof-*.json, goes into fastlm/proofs to serve others with such a machine.

Exit status: 0 if every part passed, 1 if one did not, 2 without a GPU. Files go to $OUT, or to benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import torch

import fastlm
from fastlm._core import proofs
from fastlm._core.registry import ops
from fastlm.benchmarks.kernel import KernelBenchmark
from fastlm.benchmarks.registry import KERNELS

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
REPEATED = TESTS / "backends" / "test_gpu.py"
SECONDS = 570.0  # for all parts together
GRACE_SECONDS = 10.0  # to write results in, after the interrupt that ends a part
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")
# Every kernel once on small shapes: what a sanitizer, some fifty times slower, can go through.
SMALL = (
    "test_triton and not Choice or test_parity and (37 or 133) or test_operator or test_cuda_hopper and of_lse"
    " or test_cuda_attention and everything_else or of_wide_rows"
)
TUNE_SECONDS = 150.0  # to begin proofs in; by itself the command proves the rest
TOOLS = {"memcheck": 150, "synccheck": 60, "racecheck": 60}  # racecheck knows no TMA: judge what it says of *_sm90


class Part(NamedTuple):
    """A command and the seconds it may take at most."""

    name: str
    command: list[str]
    seconds: float


def machine() -> dict:
    """The GPU and the versions that a result belongs to: the key of its proof, and more."""
    index = torch.cuda.current_device()
    key, properties = proofs.device_key(index), torch.cuda.get_device_properties(index)
    assert key is not None
    return {
        **key._asdict(),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "python": platform.python_version(),
        "fastlm": fastlm.__version__,
    }


def has_kernels(benchmark: KernelBenchmark) -> bool:
    """Whether one of the ops that it times has a kernel for GPUs."""
    return any(benchmark.times(op.name) and (op.backend("triton") or op.backend("cuda")) for op in ops())


def _bench(benchmark: KernelBenchmark, folder: Path, stamp: str) -> Part:
    name, against = benchmark.name, ",".join(benchmark.gpu_peers or ("torch",))
    command = [sys.executable, "-m", "fastlm.cli", "bench", name, "--device", "cuda", "--dtype", "bfloat16"]
    command += ["--against", against, "--json", str(folder / f"{name}-{stamp}.json")]
    return Part(f"bench {name}", command, 90 if name == "attention" else 40)


def parts(folder: Path, stamp: str) -> list[Part]:
    """What is run, in order of importance: a part may take its limit, the last ones what is left."""
    spread = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    found = [
        Part("parity", [*PYTEST, *spread, f"--ignore={REPEATED}", str(TESTS)], 240),
        Part("repeatability", [*PYTEST, str(REPEATED)], 120),
    ]
    tune = [sys.executable, "-m", "fastlm.cli", "tune", "--json", str(folder / f"proof-{stamp}.json")]
    found.append(Part("tune", [*tune, "--minutes", str(TUNE_SECONDS / 60)], TUNE_SECONDS + 30))
    benches = sorted((b for b in KERNELS if has_kernels(b)), key=lambda b: not b.gpu_peers)
    compared = sum(bool(b.gpu_peers) for b in benches)
    found += [_bench(b, folder, stamp) for b in benches[:compared]]
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool, seconds in TOOLS.items():
            prefix = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all"]
            found.append(Part(f"compute-sanitizer {tool}", [*prefix, *PYTEST, "-k", SMALL, str(TESTS)], seconds))
    return found + [_bench(b, folder, stamp) for b in benches[compared:]]


def _counts(report: Path) -> dict[str, int]:
    """Numbers of tests, failures, errors and skips of a JUnit file."""
    if not report.exists():
        return {}
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    return {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}


def _end(process: subprocess.Popen) -> None:
    """Interrupt a part with all its processes, so that it can write what it has; kill what is left of it."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def run_part(part: Part, scratch: Path, seconds: float) -> dict:
    """A part's exit status (124 where it ran out of time), seconds and test counts; its output goes to the terminal."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch's own products repeat their bits only with it
    report = scratch / f"{part.name.replace(' ', '-')}.xml"
    command = [*part.command, f"--junitxml={report}"] if "pytest" in part.command else part.command
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, and the part's too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    # in the folder of the tests, so that the installed package is what `import fastlm` finds
    process = subprocess.Popen(command, cwd=TESTS, env=env, start_new_session=True)
    try:
        status = process.wait(min(part.seconds, seconds))
    except subprocess.TimeoutExpired:
        status = 124
    _end(process)
    return {"part": part.name, "status": status, "seconds": round(time.monotonic() - start, 1), **_counts(report)}


def run_all(chosen: list[Part], seconds: float) -> list[dict]:
    """The results of the parts; one that there is no time for is not run and has status 124."""
    deadline = time.monotonic() + seconds
    done = []
    with tempfile.TemporaryDirectory() as scratch:
        for part in chosen:
            left = deadline - time.monotonic()
            print(f"== {part.name}, at most {max(0, min(part.seconds, left)):.0f} s", flush=True)
            done.append(
                run_part(part, Path(scratch), left) if left > 0 else {"part": part.name, "status": 124, "seconds": 0.0}
            )
    return done


def write_result(folder: Path, stamp: str, result: dict) -> Path:
    """The result under a name of its device and time, complete or not at all."""
    name = f"gpu-check-{stamp}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, suffix=".tmp") as file:
        file.write(json.dumps(result, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, folder / name)
    return folder / name


def _summary(result: dict) -> str:
    """A line a part."""
    lines = []
    for part in result["parts"]:
        outcome = {0: "passed", 124: "OUT OF TIME"}.get(part["status"], f"FAILED ({part['status']})")
        counts = ", ".join(f"{part[key]} {key}" for key in ("tests", "failures", "errors", "skipped") if key in part)
        lines.append(f"{part['part']:<22} {outcome:<14} {part['seconds']:>6.1f} s  {counts}".rstrip())
    return "\n".join(lines)


def main() -> int:
    default = os.environ.get("OUT") or ROOT / "benchmarks/results"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(default), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--only", default="", help="run the parts whose names contain this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device, and only a GPU can prove the GPU kernels", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    moment = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = machine()
    stamp = f"{about['architecture']}-{moment.replace(':', '')}"
    chosen = [part for part in parts(options.output.resolve(), stamp) if options.only in part.name]
    done = run_all(chosen, options.seconds)
    result = {"time": moment, **about, "parts": done, "passed": all(part["status"] == 0 for part in done)}
    path = write_result(options.output, stamp, result)
    print(f"{_summary(result)}\n{'passed' if result['passed'] else 'FAILED'}: {path}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
