"""Better tiles for the Triton kernels: neighbours of the rows of their tables, by successive halving in bounded time.

A candidate is timed only where its results are right, and chosen only where it is faster by `GAIN` and random calls in
every dtype are right with it too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from fastlm.benchmarks.case import Case
from fastlm.benchmarks.harness import clock, interleave
from fastlm.benchmarks.registry import KERNELS
from fastlm.benchmarks.worker import judge
from fastlm.kernels import _tuned
from fastlm.kernels._common import Tile
from fastlm.kernels._tuned import Row
from fastlm.kernels.attention.tables import Blocks

OURS = "fastlm-triton"
GAIN = 0.03  # what a candidate has to be faster by: more than the medians of a busy GPU differ
FINAL_SECONDS = 0.3  # for the winner and the shipped row
MOST_WARPS, LEAST_EXTENT = 16, 16  # a block has up to 1024 threads, dots take extents from 16 on


def candidates(tile: tuple, names: tuple[str, ...]) -> list[tuple]:
    """Rows beside one of a table, from the nearest on.

    Args:
        names: of its numbers: those of `_common.Tile` or of attention's `Blocks`.
    """
    given = dict(zip(names, tile, strict=True))
    found: list[dict[str, int]] = []
    for warps in (given["warps"], given["warps"] // 2, given["warps"] * 2):
        for change in _changes(given):
            each = given | {"warps": warps} | change
            if 1 <= warps <= MOST_WARPS and _possible(each) and each not in found and each != given:
                found.append(each)
    return [tuple(each.values()) for each in found]


def _changes(given: dict[str, int]) -> list[dict[str, int]]:
    stages = [{"stages": given["stages"] + 1}, {"stages": given["stages"] - 1}]
    if "elements" in given:
        more = [{"elements": given["elements"] * 2}, {"elements": given["elements"] // 2}]
        # only kernels of persistent programs read the other two
        persistent = given["stages"] > 1 or given["programs"] > 1
        programs = [{"programs": given["programs"] * 2}, {"programs": given["programs"] // 2}]
        return [{}, *more, *(programs + stages if persistent else [])]
    halves = [{"M": given["M"] // 2}, {"N": given["N"] // 2}, {"M": given["M"] // 2, "N": given["N"] // 2}]
    return [{}, *halves, *stages]  # the shipped tiles are the largest that do not spill


def _possible(tile: dict[str, int]) -> bool:
    small = min(tile.get("M", LEAST_EXTENT), tile.get("N", LEAST_EXTENT)) < LEAST_EXTENT
    narrow = tile.get("elements", 0) < tile.get("block", 0)
    return not (small or narrow) and tile["stages"] >= 1 and tile.get("programs", 1) >= 1


def halve(
    run: dict[Any, Callable[[], float]], kept: Any, end: float, final_seconds: float = FINAL_SECONDS
) -> tuple[Any, float]:
    """(the fastest, the time of `kept` over its own) among samplers of seconds a call.

    Each round times all in turn, and the slower half leaves; `kept` stays to the last.

    Args:
        end: by time.monotonic(); after it the best of the last round wins.
    """
    left = dict(run)
    while len(left) > 2 and time.monotonic() < end:
        medians = {name: timing.median for name, timing in interleave(left, 0.0).items()}
        order = sorted((name for name in left if name != kept), key=medians.__getitem__)
        left = {name: left[name] for name in (kept, *order[: max(1, len(order) // 2)])}
    medians = {name: timing.median for name, timing in interleave(left, final_seconds).items()}
    best = min(medians, key=medians.__getitem__)
    return best, medians[kept] / medians[best]


class Timed:
    """A case whose passes are timed with one tile or another.

    Attributes:
        rows: those of the kernels' tables that it looks up.
    """

    def __init__(self, case: Case, device: str):
        self.session = next(b for b in KERNELS if b.name == case.op).session(case, device)
        self.clock = clock(device)
        self._yardstick: dict[str, float] = {}
        self._scales: dict[str, tuple[float, float]] = {}
        judge(self.session, "torch", self.session.build("torch"), self._yardstick, self._scales)
        with _tuned.seen() as self.rows:
            for call in self.session.build(OURS).run.values():
                call()

    def sampler(self, row: Row, tile: tuple) -> Callable[[], float]:
        """Takes seconds of both passes with this tile, whose results are right.

        Raises:
            ValueError: if they are not.
        """
        with _tuned.trying(row, tile):
            made = self.session.build(OURS)
            _, wrong = judge(self.session, OURS, made, self._yardstick, self._scales)
        if wrong:
            raise ValueError(wrong)
        passes = [made.run[which] for which in ("fwd", "bwd") if which in made.run] or list(made.run.values())

        def run() -> None:
            with _tuned.trying(row, tile):
                for call in passes:
                    call()

        return self.clock.prepare(run)


def search(
    cases: list[Case], device: str, right: Callable[[Row], bool], seconds: float, step: Callable[[str], None]
) -> Iterator[tuple[str, tuple]]:
    """(a row's name, a better row) for each that the cases look up and there is a better one for.

    Args:
        cases: what is timed; each row at the first case that looks it up.
        right: whether random calls of all that look a row up are right with what is set in its place meanwhile.
        seconds: for all of it.
        step: told what is tried before it is.
    """
    end, done = time.monotonic() + seconds, set[Row]()
    for number, case in enumerate(cases):
        if time.monotonic() > end:
            return
        timed = Timed(case, device)
        for row in sorted(timed.rows - done):
            done.add(row)
            share = (end - time.monotonic()) / (len(cases) - number) / len(timed.rows)
            tile = _better(timed, row, share, right, step)
            if tile is not None:
                yield str(row), tile


def _better(
    timed: Timed, row: Row, seconds: float, right: Callable[[Row], bool], step: Callable[[str], None]
) -> tuple | None:
    begun = time.monotonic()
    run = {row.tile: timed.sampler(row, row.tile)}
    for tile in candidates(row.tile, _fields(row.tile)):
        if time.monotonic() > begun + seconds / 2:
            break
        step(f"{timed.session.case.describe()} with {row} as {','.join(map(str, tile))}")
        with contextlib.suppress(Exception):  # wrong, or more than the device has: it is no candidate
            run[tile] = timed.sampler(row, tile)
    best, gain = halve(run, row.tile, begun + seconds)
    if best == row.tile or gain < 1 + GAIN:
        return None
    with _tuned.trying(row, best):
        return best if right(row) else None


def _fields(tile: tuple) -> tuple[str, ...]:
    return Tile._fields if len(tile) == len(Tile._fields) else Blocks._fields
