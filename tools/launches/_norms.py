"""Widths at which the norms' kernels take another tile."""

from __future__ import annotations

from collections.abc import Iterator

from fastlm.kernels import _common, _norm


def _widths(*tables: _common.Table) -> list[int]:
    """The widest row of each tile of the tables."""
    return sorted({tile.block for table in tables for tile in _common.tiles(table, _common.ASSUMED_ARCHITECTURE)})


def sizes() -> Iterator[tuple[int, bool]]:
    """(width, whether with every optional tensor)."""
    widths = _widths(_norm.FORWARD, _norm.BACKWARD)
    for full in (False, True):
        for N in (64, *widths, 65536) if full else (1024, _norm.ONE_BLOCK_BACKWARD, 65536):
            yield N, full
