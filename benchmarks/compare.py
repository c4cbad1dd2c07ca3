"""What moved between two results files, beyond the noise of both."""

from __future__ import annotations

from dataclasses import dataclass

from fastlm.errors import DataError

from .results import Results, Row


@dataclass(frozen=True)
class Change:
    """A row that both files have.

    Attributes:
        before, after: its two states.
        factor: time after over time before; above 1 is slower.
        beyond_noise: whether the two p10 - p90 ranges are apart.
    """

    before: Row
    after: Row
    factor: float
    beyond_noise: bool

    def is_regression(self, threshold: float) -> bool:
        ours = self.after.provider.startswith("fastlm")
        return ours and self.beyond_noise and self.factor > 1 + threshold


def compare(before: Results, after: Results, relative: bool = False) -> tuple[list[Change], list[Row]]:
    """Pair up the timed rows of two files.

    Args:
        relative: compare times as fractions of PyTorch's in the same run: for files from different machines, or
            from one whose speed changes.

    Returns:
        The changes, largest slow-down first; and rows that were timed before and are not any more.

    Raises:
        DataError: if the files share no timed row.
    """
    old = _by_key(before, relative)
    new = _by_key(after, relative)
    shared = [key for key in old if key in new]
    if not shared:
        raise DataError("the two files have no timed row in common (op, pass, provider, dtype, shape, threads)")
    changes = []
    for key in shared:
        a, b = _range(old[key], relative), _range(new[key], relative)
        apart = a[2] < b[0] or b[2] < a[0]
        changes.append(Change(old[key], new[key], b[1] / a[1], apart))
    changes.sort(key=lambda change: -change.factor)
    measured = {row.key for row in after.rows}
    lost = [row for key, row in old.items() if key not in new and key in measured]
    return changes, lost


def _by_key(results: Results, relative: bool) -> dict[tuple[str, ...], Row]:
    return {row.key: row for row in results.rows if row.median and (row.ratio_to_torch or not relative)}


def _range(row: Row, relative: bool) -> tuple[float, float, float]:
    """(p10, median, p90), in seconds or in units of PyTorch's median."""
    assert row.median and row.p10 and row.p90  # noqa: PT018  (selected for it)
    unit = row.median * row.ratio_to_torch if relative and row.ratio_to_torch else 1.0
    return row.p10 / unit, row.median / unit, row.p90 / unit
