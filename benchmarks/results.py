"""The results file: JSON, versioned, one row a (benchmark, variant, pass, provider, dtype, shape, allocator).

    {"format": "fastlm-bench", "version": 1,
     "environment": {...},   what was measured on: see `environment`
     "roofs": {allocator: {"copy_gbps", "read_gbps", "gemm_tflops": {dtype: rate}}},
     "rows": [...]}          see `Row`; one a line, and what is as its default says is left out

Times are seconds, sizes bytes, rates 1e9 bytes or 1e12 operations a second. A reader refuses a version that it
does not know; a change of meaning raises it.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastlm
from fastlm import runtime
from fastlm.errors import DataError

FORMAT, VERSION = "fastlm-bench", 1


@dataclass
class Row:
    """One provider on one pass of one case.

    Attributes:
        op, variant, which, dtype, shape, provider: what ran; `which` is the pass, `shape` like "4096x768".
        label: the provider in full, such as "fastlm cpu (avx512)".
        status: "ok", "wrong", "unsupported", "out of memory", "failed", or "checked" for a right result that is
            not to be timed; only "ok" has times.
        reason: why the status is not "ok".
        allocator: "kept" if glibc keeps freed memory, "default" as it comes, "cuda" on a GPU.
        threads, isa: torch's threads and the kernels' instruction set.
        rounds, median, p10, p90: samples, and seconds a call.
        bytes, flops: strict counts of the pass.
        gbps, tflops: those over the median.
        bound, roof_fraction: what limits the pass ("memory" or "compute"), and the least time there over the
            median; above 1 if the data fit in a cache that the roof's arrays do not fit in.
        max_error, rms_error: against fp64, over outputs (and gradients unless the pass is "fwd"), as fractions
            of each tensor's largest magnitude and root mean square; the worst tensor counts.
        ratio_to_torch: the median of PyTorch eager over this one: above 1 is faster than PyTorch.
        peak_bytes: memory that the pass adds at its peak, outputs included.
        work: what a call does, if it has a unit of its own ({"tokens": 1024}).
    """

    op: str
    variant: str
    which: str
    dtype: str
    shape: str
    provider: str
    label: str = ""
    status: str = "ok"
    reason: str = ""
    allocator: str = ""
    threads: int = 0
    isa: str | None = None
    rounds: int = 0
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    bytes: int = 0
    flops: int = 0
    gbps: float | None = None
    tflops: float | None = None
    bound: str = ""
    roof_fraction: float | None = None
    max_error: float | None = None
    rms_error: float | None = None
    ratio_to_torch: float | None = None
    peak_bytes: int | None = None
    work: dict[str, float] = field(default_factory=dict)

    @property
    def case(self) -> tuple[str, ...]:
        """What rows of different providers share."""
        return self.op, self.variant, self.which, self.dtype, self.shape, self.allocator, str(self.threads)

    @property
    def key(self) -> tuple[str, ...]:
        """What rows of different files share."""
        return (*self.case, self.provider)


@dataclass
class Results:
    environment: dict[str, Any]
    roofs: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        document = {"format": FORMAT, "version": VERSION, "environment": self.environment, "roofs": self.roofs}
        rows = ",\n".join(json.dumps(_told(row)) for row in self.rows)
        write_text(path, json.dumps(document, indent=1).removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n')

    def save_csv(self, path: str | Path) -> None:
        """One line a row, with what is the same for all rows repeated in each."""
        names = [f.name for f in dataclasses.fields(Row)]
        shared = {k: v for k, v in self.environment.items() if isinstance(v, (str, int, float, type(None)))}
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow([*names, *shared])
        for row in self.rows:
            cells = dataclasses.asdict(row) | {"work": json.dumps(row.work)}
            writer.writerow([*(cells[n] for n in names), *shared.values()])
        write_text(path, text.getvalue())


def _told(row: Row) -> dict[str, Any]:
    """A row as JSON has it: most of a run on a CPU are peers that it cannot run."""
    usual: dict[str, Any] = {f.name: {} if f.name == "work" else f.default for f in dataclasses.fields(Row)}
    return {name: value for name, value in dataclasses.asdict(row).items() if value != usual[name]}


def load(path: str | Path) -> Results:
    """Read a results file.

    Raises:
        DataError: if the file is not one, or of another version.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, too many digits, or nested too deeply
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{path}: not a results file of fastlm bench (its format is not {FORMAT!r})")
    if document.get("version") != VERSION:
        raise DataError(f"{path}: results of version {document.get('version')}, this fastlm reads {VERSION}")
    try:
        rows = [Row(**row) for row in document["rows"]]
        return Results(document["environment"], document["roofs"], rows)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged results: {error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Replace a file in one step, so that none is ever left half written."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions that results depend on."""
    gpu = torch.cuda.get_device_properties(device) if device.startswith("cuda") else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": gpu.name if gpu else "cpu",
        "driver": runtime.driver_version(),
        "cpu": runtime.cpu_model(),
        "cores": os.cpu_count(),
        "platform": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "python": platform.python_version(),
        "fastlm": fastlm.__version__,
        "revision": revision(),
        "packages": {name: v for name in runtime.PACKAGES + runtime.PEERS if (v := runtime.version(name))},
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "settings": runtime.settings(),
    }


def revision() -> str | None:
    """The commit of the checkout that fastlm runs from, with "+" for changes; None outside of one."""
    root = Path(fastlm.__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=30, check=True
        )
        status = subprocess.run(
            ["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")
