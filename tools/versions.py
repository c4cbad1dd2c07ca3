"""The tests with other versions of torch, each in an environment of its own: `make test-versions`.

    python tools/versions.py [2.10.0 2.15.0 ...]

For each version, or each that fastlm.runtime.TRIED names, `make test` in a temporary folder, which is removed before
the next: torch as asked, triton as that torch asks for it, the others as tests/constraints.txt pins them. With CUDA's
libraries, which come with torch on Linux, it takes up to 9 GB of disk (TMPDIR says where) and as much from the network.

Exit status: 0 where all tests passed with every version, 1 where not, 2 for a wrong version.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "tests" / "constraints.txt"
DISK_MB = 9000
COUNTS = re.compile(r"\b\d+ (?:passed|failed|skipped|errors?)\b")
INSTALLED = "import importlib.metadata as m; print(*(f'{name} {m.version(name)}' for name in ('torch', 'triton')))"


def constraints(torch: str) -> str:
    """The pins of tests/constraints.txt, with this version of torch and any of triton."""
    lines = PINS.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(("torch==", "triton=="))]
    return "\n".join([*kept, f"torch=={torch}", ""])


def tested(torch: str) -> tuple[bool, str]:
    """Run the tests with a version of torch: whether all passed, and a line that says so."""
    with tempfile.TemporaryDirectory(prefix=f"torch-{torch}-") as folder:
        place = Path(folder)
        (place / "constraints.txt").write_text(constraints(torch), encoding="utf-8")
        settings = {"VENV": place / "venv", "CONSTRAINTS": place / "constraints.txt", "DISK_MB": DISK_MB}
        command = ["make", "test", *(f"{name}={value}" for name, value in settings.items())]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        counted = ""
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None  # for the type checker
            for line in process.stdout:
                print(line, end="", flush=True)
                counted = ", ".join(COUNTS.findall(line)) or counted  # pytest's last line counts
        if not counted:
            return False, f"torch {torch}: no test ran, as said above"
        asked = [str(place / "venv" / "bin" / "python"), "-c", INSTALLED]
        installed = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or f"torch {torch}"
        return process.returncode == 0, f"{installed}: {counted}"


def main(versions: list[str]) -> int:
    for version in versions:
        if not re.fullmatch(r"\d+\.\d+\.\d+\w*", version):
            print(f"versions: {version!r} is no version of torch, expected one such as 2.13.0", file=sys.stderr)
            return 2
    if not versions:
        from fastlm.runtime import TRIED  # not above: it needs torch, and what is named by hand does not

        versions = [*TRIED["torch"]]
    results = [tested(version) for version in versions]
    print(*(line for _, line in results), sep="\n")
    return 0 if all(passed for passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
