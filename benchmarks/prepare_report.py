"""What `fastlm bench prepare` found: a table for the terminal and for a guide, and which goals are reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fastlm.errors import DataError

from .report import MARKER, seconds
from .results import Results, Row, write_text

# How many times a peer's speed fastlm is to have.
SPEEDS = {("tokens", "datasets"): 1.8, ("tokens", "tokenizers"): 1.6, ("documents", "datatrove"): 3.0}
PEAK = 10**9  # bytes that `fastlm prepare` is to stay below, whatever the size of the corpus
GROWTH = 1.1  # times the peak on the smallest corpus that the peak on the largest may have
RECALL = "recall of near pairs"
HEADERS = ("part", "corpus", "provider", "time", "p10 - p90", "MB/s", "CPU time", "peak", "fastlm's speed", "found")
LEFT = 3


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line for each row, HEADERS across; a row without a time says why instead."""
    lines = []
    for row in rows:
        name = (row.variant, row.shape, row.label)
        if row.median is None:
            lines.append((*name, row.status, *[""] * 5, row.reason))
            continue
        ratio = ratio_to(rows, row)
        spread = f"{seconds(row.p10)} - {seconds(row.p90)}" if row.rounds > 1 else ""
        lines.append(
            (
                *name, seconds(row.median), spread, f"{row.bytes / row.median / 1e6:.1f}",
                seconds(row.work["cpu_seconds"]), f"{(row.peak_bytes or 0) / 1e6:.0f} MB",
                "" if ratio is None else f"{ratio:.2f}x", _found(row),
            )
        )  # fmt: skip
    return lines


def ratio_to(rows: Sequence[Row], row: Row) -> float | None:
    """How many times the speed of `row`'s provider fastlm had on the same bytes."""
    if row.provider == "fastlm":
        return None
    ours = next((r for r in rows if r.provider == "fastlm" and (r.variant, r.shape) == (row.variant, row.shape)), None)
    return row.median / ours.median if ours and ours.median and row.median else None


def _found(row: Row) -> str:
    if row.variant == "documents":
        return f"{100 * row.work[RECALL]:.1f} % of near pairs, {100 * row.work['recall of equal ones']:.1f} % of equal"
    return f"{row.work['tokens']:,.0f} tokens"


def goals(rows: Sequence[Row]) -> Iterator[tuple[str, bool]]:
    """(what was wanted and what is, whether that is reached), of what was measured."""
    for row in rows:
        ratio, wanted = ratio_to(rows, row), SPEEDS.get((row.variant, row.provider))
        if ratio is not None and wanted is not None:
            yield f"{row.variant}: {ratio:.2f} times the speed of {row.provider}, wanted {wanted}", ratio >= wanted
        if ratio is not None and row.variant == "documents":
            [ours] = (r for r in rows if r.variant == "documents" and r.provider == "fastlm")
            found, theirs = ours.work[RECALL], row.work[RECALL]
            yield f"documents: recall {found:.3f}, {row.provider}'s {theirs:.3f}, wanted no lower", found >= theirs
    peaks = [row.peak_bytes for row in rows if row.variant == "memory" and row.peak_bytes]
    if peaks:
        yield f"memory: at most {max(peaks) / 1e6:.0f} MB, wanted {PEAK / 1e6:.0f}", max(peaks) <= PEAK
    if len(peaks) > 1:
        growth = peaks[-1] / peaks[0]
        yield f"memory: {growth:.2f} times as much on the largest corpus, wanted {GROWTH}", growth <= GROWTH


def markdown(results: Results) -> str:
    """The table of a guide, with what was measured on and which goals are reached."""
    lines = [f"| {' | '.join(HEADERS)} |", "|" + "---|" * LEFT + "--:|" * (len(HEADERS) - LEFT - 1) + "---|"]
    lines += [f"| {' | '.join(line)} |" for line in cells(results.rows)]
    lines.append("")
    lines += [f"- {said}: {'reached' if met else 'missed'}" for said, met in goals(results.rows)]
    e = results.environment
    rounds = max((row.rounds for row in results.rows), default=0)
    threads = max((row.threads for row in results.rows), default=0)
    lines.append(
        f"\nMedians of {rounds} rounds in turns (`memory`: one). Peaks are of all processes' proportional set sizes. "
        f"{e['cpu']}, {threads} processes or threads, Python {e['python']}, fastlm {e['fastlm']}, {e['date'][:10]}."
    )
    return "\n".join(lines)


def write(path: str | Path, results: Results) -> None:
    """Fill the table between <!-- bench:prepare --> and <!-- /bench --> of a text.

    Raises:
        DataError: if the text has no such place.
    """
    text = Path(path).read_text(encoding="utf-8")
    filled = MARKER.sub(
        lambda m: f"<!-- bench:prepare -->\n{markdown(results)}\n<!-- /bench -->" if m["name"] == "prepare" else m[0],
        text,
    )
    if not any(match["name"] == "prepare" for match in MARKER.finditer(text)):
        raise DataError(
            f"{path}: no line <!-- bench:prepare --> with a <!-- /bench --> after it says where the table goes"
        )
    write_text(path, filled)
