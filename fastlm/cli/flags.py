"""Command lines to dataclasses, the same way for every verb: tyro, with two of its habits changed.

A flag that takes several values may be given several times, and every value counts; tyro keeps the last time only.
A text or a path is what was typed, `None` too; tyro reads that word as no value at all.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")
COMMAS = ",..."  # how the metavar of a flag ends that takes values with commas between them


def parse(kind: type[T], prog: str, argv: Sequence[str], **options: Any) -> T:
    """An instance of the dataclass `kind` from a command line; `options` go to `tyro.cli`."""
    with _verbatim():
        return tyro.cli(kind, prog=prog, args=gather(argv, repeatable(kind)), **options)


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """What is given for a flag, before the rest is parsed, in either spelling; the last one, as to tyro."""
    value = None
    for i, text in enumerate(argv):
        if text.startswith(flag + "="):
            value = text[len(flag) + 1 :]
        elif text == flag:
            value = "".join(argv[i + 1 : i + 2])
    return value


def repeatable(kind: type) -> dict[str, str]:
    """The flags of a dataclass that take several values, and what stands between these: a blank or a comma."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for field in dataclasses.fields(kind):
        plain, notes = _unwrapped(hints[field.name])
        settings = [note for note in notes if hasattr(note, "metavar")]
        name = next((note.name for note in settings if note.name), field.name)
        separator = _separator(plain, next((note.metavar for note in settings if note.metavar), ""))
        if separator:
            found["--" + name.replace("_", "-")] = separator
    return found


def gather(argv: Sequence[str], flags: dict[str, str]) -> list[str]:
    """The command line with all values of each flag of `flags` behind one flag, where it was given several times."""
    end = argv.index("--") if "--" in argv else len(argv)
    kept, values, times = [], dict[str, list[str]](), dict[str, int]()
    index = 0
    while index < end:
        flag, equals, value = argv[index].partition("=")
        name = "--" + flag[2:].replace("_", "-")
        index += 1
        if not flag.startswith("--") or name not in flags:
            kept.append(argv[index - 1])
            continue
        given = [value] if equals else []
        while not equals and index < end and not argv[index].startswith("-") and (flags[name] == " " or not given):
            given.append(argv[index])
            index += 1
        values.setdefault(name, []).extend(given)
        times[name] = times.get(name, 0) + 1
    if all(count == 1 for count in times.values()):
        return list(argv)
    for name, given in values.items():
        kept += [name, *([",".join(given)] if flags[name] == "," else given)]
    return kept + list(argv[end:])


def _unwrapped(hint: Any) -> tuple[Any, list[Any]]:
    """A type without `Annotated`, and what that said."""
    notes: list[Any] = []
    while get_origin(hint) is Annotated:
        notes += hint.__metadata__
        hint = hint.__origin__
    return hint, notes


def _separator(plain: Any, metavar: str) -> str | None:
    if plain is str and metavar.endswith(COMMAS):
        return ","
    origin = get_origin(plain)
    several = origin in (list, set, frozenset, Sequence) or (origin is tuple and get_args(plain)[-1:] == (Ellipsis,))
    return " " if several else None


def _verbatim() -> ConstructorRegistry:
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if get_origin(info.type) not in (Union, types.UnionType):
            return None
        kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
        if len(kinds) != 1 or kinds[0] not in (str, Path):
            return None
        make = kinds[0]
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="TEXT" if make is str else "PATH",
            instance_from_str=lambda args: make(args[0]),
            is_instance=lambda value: value is None or isinstance(value, make),
            str_from_instance=lambda value: ["None" if value is None else str(value)],
        )

    return registry
