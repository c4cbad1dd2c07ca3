"""The objectives that settings can name: each file beside this one registers its own.

@objective("masked", summary="hidden tokens from those around them", models=("bert",), settings=MaskedSettings)
def masked(setup: Setup) -> Task: ...
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from ..errors import ConfigError, nearest, shown

if TYPE_CHECKING:
    from .common.setup import Setup
    from .common.task import Task

SEAM = ("base", "registry")  # the files beside this one that register nothing


@dataclass(frozen=True)
class Settings:
    """An objective's own settings: `--NAME.FIELD` on the command line, a table called NAME in TOML.

    Fields are int, float, bool, str or a `Literal` of texts, each with a comment behind it, which `--help` shows.
    """

    def check(self) -> None:
        """Raise ConfigError for a value out of range; its message names the field alone."""

    def require(self, name: str, ok: bool, wanted: str) -> None:
        """Raise ConfigError unless `ok`."""
        if not ok:
            raise ConfigError(f"{name} is {shown(getattr(self, name))}, expected {wanted}")


@dataclass(frozen=True)
class Registered:
    """An objective as settings name it.

    Attributes:
        name: in settings.
        summary: what a model is trained for, in a line for `--help`.
        models: the names of those that can be, the default first; see `common.models`.
        settings: its own.
        task: makes what is trained, on what and for what.
        table: whether it is trained on tables; else on folders that `fastlm prepare` wrote.
    """

    name: str
    summary: str
    models: tuple[str, ...]
    settings: type[Settings]
    task: Callable[[Setup], Task]
    table: bool


_REGISTERED: dict[str, Registered] = {}


def objective(
    name: str, *, summary: str, models: tuple[str, ...], settings: type[Settings] = Settings, table: bool = False
) -> Callable[[Callable[[Setup], Task]], Callable[[Setup], Task]]:
    """Register the function that makes an objective's `Task`; see `Registered` for the arguments."""

    def register(task: Callable[[Setup], Task]) -> Callable[[Setup], Task]:
        if name in _REGISTERED:
            raise ValueError(f"objective {name!r} is registered twice")
        _REGISTERED[name] = Registered(name, summary, models, settings, task, table)
        return task

    return register


@functools.cache
def objectives() -> dict[str, Registered]:
    """Every objective by its name, in alphabetical order."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not module.ispkg and module.name not in SEAM:
            importlib.import_module(f"{package}.{module.name}")
    return dict(sorted(_REGISTERED.items()))


def registered(name: Any) -> Registered:
    """The objective of that name.

    Raises:
        ConfigError: if there is none.
    """
    known = objectives()
    if not isinstance(name, str) or name not in known:
        hint = nearest(name, list(known)) if isinstance(name, str) else ""
        raise ConfigError(f"objective is {shown(name)}, expected one of {', '.join(known)}{hint}")
    return known[name]


def settings_of(name: str, given: Any) -> Settings:
    """An objective's settings from a mapping, its defaults from None.

    Raises:
        ConfigError: naming the field, as `masked.probability`, that is unknown, of a wrong type or out of range.
    """
    kind = registered(name).settings
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        if type(given) is not kind:
            if given != type(given)():  # of another objective, and somebody chose them
                raise ConfigError(f"options are {type(given).__name__}, expected {kind.__name__} for {name}")
            given = None
        else:
            given = _plain(given)
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"{name} is {shown(given)} ({type(given).__name__}), expected a table of settings")
    hints = get_type_hints(kind)
    for field in given or {}:
        if field not in hints:
            raise ConfigError(f"unknown key {shown(f'{name}.{field}')}{nearest(str(field), list(hints))}")
    made = kind(**{field: checked(f"{name}.{field}", value, hints[field]) for field, value in (given or {}).items()})
    try:
        made.check()
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from None
    return made


def _plain(settings: Any) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def checked(name: str, value: Any, kind: Any) -> Any:
    """A value of a setting of that type; a whole number may stand for a float.

    Raises:
        ConfigError: for another type, an integer of more than 64 bits, a text that is not UTF-8 or holds NUL.
    """
    if get_origin(kind) is Literal:
        choices = list(get_args(kind))
        if value not in choices:
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise ConfigError(f"{name} is {shown(value)}, expected one of {', '.join(choices)}{hint}")
        return value
    # A bool is an int to Python, never to a user.
    if type(value) is int and kind in (int, float):
        if value.bit_length() > 64 or (value.bit_length() == 64 and name != "seed"):
            raise ConfigError(f"{name} is {shown(value)}, expected an integer of 64 bits")
        return kind(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} is {shown(value)} ({type(value).__name__}), expected {kind.__name__}")
    if kind is str and ("\0" in value or not _is_unicode(value)):
        raise ConfigError(f"{name} is {shown(value)}, expected text in UTF-8 without NUL")
    if kind is float and not value - value == 0:
        raise ConfigError(f"{name} is {value!r}, expected a finite number")
    return value


def _is_unicode(text: str) -> bool:
    """Whether no byte of a command line or file name was put in as a lone surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
