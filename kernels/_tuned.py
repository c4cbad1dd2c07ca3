"""Rows of the kernels' tables that `fastlm tune` exchanged for better ones on a GPU of this machine.

A table's lookup ends in `tuned`, whose result the launchers keep. `trying` and `seen` are for the search.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch

from fastlm._core import proofs

R = TypeVar("R", bound=tuple)


class Row(NamedTuple):
    """A row of a table, as it is shipped; `table` is its name, such as "gelu.FORWARD"."""

    table: str
    tile: tuple

    def __str__(self) -> str:
        return f"{self.table} {','.join(map(str, self.tile))}"

    @classmethod
    def named(cls, text: str) -> Row:
        table, _, numbers = text.partition(" ")
        return cls(table, tuple(int(n) for n in numbers.split(",")))


_TRIED: dict[Row, tuple] = {}
_SEEN: list[set[Row]] = []


def tuned(table: dict, arch: Any, row: R) -> R:
    """The row that serves in place of a table's `row` on GPUs of this architecture."""
    if not (_TRIED or _SEEN or _proved(arch)):
        return row
    name = _names().get(id(table))
    if name is None:
        return row
    asked = Row(name, tuple(row))
    for found in _SEEN:
        found.add(asked)
    instead = _TRIED.get(asked) or _proved(arch).get(asked)
    return row if instead is None else type(row)(*instead)


@functools.cache
def _names() -> dict[int, str]:
    """The name of each table of the kernels by its id."""
    package = __name__.rpartition(".")[0]
    found: dict[int, str] = {}
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.isupper() and isinstance(value, dict):
                found.setdefault(id(value), f"{module.name.removeprefix(package + '.')}.{name}")
    return found


@functools.cache
def _proved(arch: Any) -> dict[Row, tuple]:
    """What the proofs of the GPUs of this architecture say."""
    from ._common import architecture

    found: dict[Row, tuple] = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if architecture(torch.device("cuda", index)) == arch:
            for entry in proofs.state(index).entries.values():
                found |= {Row.named(name): tile for name, tile in entry.tiles.items()}
    return found


@functools.cache
def _caches() -> list[Any]:
    """What of the kernels keeps results."""
    _names()  # imports them
    package = __name__.rpartition(".")[0]
    modules = [module for name, module in sys.modules.items() if name.startswith(package)]
    values = [value for module in modules for value in vars(module).values() if hasattr(value, "cache_clear")]
    return [value for value in values if value not in (_names, _caches)]


def forget() -> None:
    """Look everything up anew: the launchers keep what they once found."""
    for cached in _caches():
        cached.cache_clear()


@contextlib.contextmanager
def trying(row: Row, tile: tuple) -> Iterator[None]:
    """Inside, another row serves in place of `row`."""
    _TRIED[row] = tile
    forget()
    try:
        yield
    finally:
        del _TRIED[row]
        forget()


@contextlib.contextmanager
def seen() -> Iterator[set[Row]]:
    """The rows that are looked up inside."""
    found: set[Row] = set()
    _SEEN.append(found)
    forget()
    try:
        yield found
    finally:
        _SEEN.remove(found)
        forget()
