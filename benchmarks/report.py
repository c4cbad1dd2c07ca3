"""Tables of results: for a terminal, and for the README between `<!-- bench:NAME -->` and `<!-- /bench -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fastlm.errors import DataError

from . import goals
from .results import Results, Row, write_text

HEADERS = ("case", "pass", "provider", "time", "p10-p90", "GB/s", "TFLOP/s", "of roof", "rms error", "peak", "x torch")
MARKER = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n.*?<!-- /bench -->", re.DOTALL)


def seconds(value: float | None) -> str:
    """A time with three digits and a fitting unit."""
    if value is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale or unit == "us":
            return f"{value / scale:.3g} {unit}"
    raise AssertionError


def size(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**20:.1f} MiB" if value < 2**30 else f"{value / 2**30:.2f} GiB"


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def case_name(row: Row) -> str:
    parts = [row.op, row.variant, row.shape, row.dtype]
    conditions = [" (default malloc)"] * (row.allocator == "default") + [" (1 thread)"] * (row.threads == 1)
    return " ".join(part for part in parts if part) + "".join(conditions)


def cells(row: Row) -> tuple[str, ...]:
    """One line of the terminal's table; a row without a time says why instead."""
    name = (case_name(row), row.which, row.label or row.provider)
    if row.status != "ok":
        return (*name, row.status, "", "", "", "", _number(row.rms_error, ".1e"), "", "")
    spread = f"{seconds(row.p10)} - {seconds(row.p90)}"
    return (
        *name, seconds(row.median), spread, _number(row.gbps), _number(row.tflops),
        f"{100 * (row.roof_fraction or 0):.0f} %", _number(row.rms_error, ".1e"), size(row.peak_bytes),
        _number(row.ratio_to_torch, ".2f"),
    )  # fmt: skip


def absences(rows: Iterable[Row]) -> list[str]:
    """One line for each provider and reason why something was not timed, with how many cases it concerns."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        if row.status != "ok":
            reason = re.sub(r"^\w+ has no", "the op has no", row.reason)
            found.setdefault((row.provider, row.status, reason), set()).add(f"{case_name(row)} {row.which}")
    lines = []
    for (provider, status, reason), where in found.items():
        place = next(iter(where)) if len(where) == 1 else f"{len(where)} cases"
        lines.append(f"{provider}: {status}: {reason} ({place})")
    return sorted(lines)


def roof_lines(results: Results) -> list[str]:
    return [
        f"roof ({allocator} memory): copy {roof['copy_gbps']:.1f} GB/s, read {roof['read_gbps']:.1f} GB/s, GEMM "
        + ", ".join(f"{rate:.3g} TFLOP/s {dtype}" for dtype, rate in roof["gemm_tflops"].items())
        for allocator, roof in results.roofs.items()
    ]


def write_readme(path: str | Path, files: list[Results]) -> list[str]:
    """Fill the tables of a text file; returns the names of those written.

    Raises:
        DataError: if the file has no marker, a marker names nothing that was measured, or one is not closed.
    """
    text = Path(path).read_text(encoding="utf-8")
    names: list[str] = []

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        names.append(name)
        return f"<!-- bench:{name} -->\n{_table(name, files, path)}\n<!-- /bench -->"

    filled = MARKER.sub(fill, text)
    opened = len(re.findall(r"<!-- bench:[\w-]+ -->", text))
    if not opened:
        raise DataError(f"{path}: no line <!-- bench:NAME --> says where a table goes")
    if opened != len(names):
        raise DataError(f"{path}: a <!-- bench:NAME --> has no <!-- /bench --> after it")
    write_text(path, filled)
    return names


def _table(name: str, files: list[Results], path: str | Path) -> str:
    if name == "goals":
        return goals.table(files)
    measured = sorted({row.op for results in files for row in results.rows})
    if name not in (*measured, "all"):
        raise DataError(f"{path}: bench:{name} was not measured; the files hold {', '.join(measured)}, all, goals")
    return "\n\n".join(
        _markdown(results, [row for row in results.rows if name in (row.op, "all")])
        for results in files
        if any(name in (row.op, "all") for row in results.rows)
    )


def _markdown(results: Results, rows: list[Row]) -> str:
    """Cases down, providers across: the median, and in brackets how many times PyTorch's speed that is."""
    timed = [row for row in rows if row.status == "ok"]
    columns = list(dict.fromkeys(row.label for row in sorted(timed, key=_ours_first)))
    lines = ["| case | pass | " + " | ".join(columns) + " | of roof |", "|---|---|" + "--:|" * (len(columns) + 1)]
    by_case: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in timed:
        by_case.setdefault(row.case, {})[row.label] = row
    for found in by_case.values():
        first = next(iter(found.values()))
        best = min(found.values(), key=_ours_first)
        entries = [_entry(found.get(column)) for column in columns]
        roof = f"{100 * (best.roof_fraction or 0):.0f} %"
        lines.append(f"| {case_name(first)} | {first.which} | " + " | ".join(entries) + f" | {roof} |")
    e = results.environment
    threads = sorted({row.threads for row in timed})
    settings = e.get("settings", {})
    held = "".join(f" with {name}={settings[name]}" for name in goals.HOLDS_TORCH if name in settings)
    machine = e["cpu"] if e["device"] == "cpu" else f"{e['device']}, driver {e['driver']}"
    lines.append(
        f"\nMedians; in brackets the speed relative to PyTorch eager. {machine}, "
        f"{', '.join(map(str, threads))} threads, torch {e['packages'].get('torch')}{held}, fastlm {e['fastlm']}, "
        f"{e['date'][:10]}. {_sentence('. '.join(roof_lines(results)))}."
    )
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _ours_first(row: Row) -> tuple[bool, bool]:
    return not row.provider.startswith("fastlm"), row.provider == "fastlm-reference"


def _entry(row: Row | None) -> str:
    if row is None:
        return ""
    ratio = f" ({row.ratio_to_torch:.2f}x)" if row.ratio_to_torch and row.provider != "torch" else ""
    tokens = row.work.get("tokens")
    rate = f", {tokens / row.median:.0f} tokens/s" if tokens and row.median else ""
    return seconds(row.median) + rate + ratio
