"""The names of settings in a message, spelled as the flags that give them."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from tyro.conf import Positional

POSITIONAL = Positional[int].__metadata__[0]  # type: ignore[attr-defined]
# A word of plain English is a setting only where its value follows: "device is 'gpu'", "seed=5".
VALUE_FOLLOWS = r"(?=\s?=| is (?:[-\d'\"\[]|nan|inf|an integer of)| and --)"
# Part of a path, of something quoted or of a longer name it is none.
ALONE = r"(?<![\w/.'\"\-])", r"(?![\w/'\"\-]|\.\w)"


def spelled(message: str, options: type) -> str:
    """`message` with every setting of a verb's `options` as its flag: "n_head is 7" becomes "--n-head is 7"."""
    flags = flag_names(options)
    for name in sorted(flags, key=_is_unlike_english, reverse=True):
        follows = "" if _is_unlike_english(name) else VALUE_FOLLOWS
        message = re.sub(ALONE[0] + re.escape(name) + ALONE[1] + follows, flags[name], message)
    return message


def _is_unlike_english(name: str) -> bool:
    return "_" in name or "." in name


def flag_names(options: type) -> dict[str, str]:
    """The flag of each setting of a dataclass that tyro reads; a positional argument has none."""
    hints: dict[str, Any] = get_type_hints(options, include_extras=True)
    flags: dict[str, str] = {}
    for field in fields(options):
        if is_dataclass(kind := hints[field.name]):
            inner = flag_names(kind)  # type: ignore[arg-type]
            flags |= {f"{field.name}.{name}": f"--{field.name}.{flag[2:]}" for name, flag in inner.items()}
            continue
        marks = getattr(hints[field.name], "__metadata__", ())
        if POSITIONAL in marks:
            continue
        names = [mark.name for mark in marks if getattr(mark, "name", None)]
        flags[field.name] = "--" + (names[0] if names else field.name).replace("_", "-")
    return flags
