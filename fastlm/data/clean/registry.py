"""Steps of cleaning by name: what a recipe may list, with options that are checked before any document is read."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from ...errors import ConfigError, shown
from ..document import Document, Dropped, Step

F = TypeVar("F", bound=Callable[..., "Document | Dropped"])


class Range(NamedTuple):
    """In an option's annotation: the least and the most that it may be."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}" if self.high < math.inf else f"of at least {self.low:g}"


Count = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Option:
    """An option of a step: its type as annotated, and what it is unless given."""

    kind: Any
    default: Any

    @property
    def wanted(self) -> str:
        """What it may be, for an error message and for a list of steps."""
        kind, limits = _limits(self.kind)
        if get_origin(kind) is Literal:
            return f"one of {', '.join(map(str, get_args(kind)))}"
        if get_origin(kind) is tuple:
            return f"a list of {_PLURALS[get_args(kind)[0]]}"
        return f"{_WORDS[kind]} {limits}" if limits else _WORDS[kind]

    def read(self, value: Any) -> Any:
        """`value` as the function takes it, or ValueError; what TOML writes as a list comes as a tuple."""
        kind, limits = _limits(self.kind)
        if get_origin(kind) is Literal:
            fits = isinstance(value, str) and value in get_args(kind)
        elif get_origin(kind) is tuple:
            fits = isinstance(value, (list, tuple)) and all(type(item) is get_args(kind)[0] for item in value)
            value = tuple(value) if fits else value
        else:
            fits = type(value) is kind or (kind is float and type(value) is int)
            value = kind(value) if fits else value
        if not fits or (limits and not limits.low <= value <= limits.high):
            raise ValueError
        return value


_WORDS: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_PLURALS: dict[Any, str] = {str: "strings", int: "integers"}


def _limits(kind: Any) -> tuple[Any, Range | None]:
    if get_origin(kind) is Annotated:
        kind, limits = get_args(kind)
        return kind, limits
    return kind, None


@dataclass(frozen=True)
class StepInfo:
    """What is known of a step.

    Attributes:
        name: as a recipe names it.
        function: (document, **options) -> what becomes of it; pure.
        reasons: why it drops documents; empty if it drops none.
        needs: packages that it imports, by the name of their module; one that only a value of an option needs is
            mapped to (option, the value, or one of a list's).
        check: raises ValueError where options contradict each other, saying how.
    """

    name: str
    function: Callable[..., Document | Dropped]
    reasons: tuple[str, ...]
    needs: Mapping[str, tuple[str, Any] | None] = field(default_factory=dict)
    check: Callable[..., None] | None = None

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return inspect.getdoc(self.function).partition("\n")[0]  # type: ignore[union-attr]

    @functools.cached_property
    def options(self) -> Mapping[str, Option]:
        """Its options, in the order of the signature."""
        kinds = get_type_hints(self.function, include_extras=True)
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        return {p.name: Option(kinds[p.name], p.default) for p in parameters}


_STEPS: dict[str, StepInfo] = {}


def step(
    *reasons: str,
    needs: Mapping[str, tuple[str, Any] | None] | tuple[str, ...] = (),
    check: Callable[..., None] | None = None,
) -> Callable[[F], F]:
    """Decorates a step's function, which stays as it is and whose name is the step's, with the rest of its `StepInfo`.

    Options are keyword-only parameters with defaults, annotated as bool, int, float, str, tuple[str, ...], Literal, or
    Annotated with a `Range`.
    """

    def enter(function: F) -> F:
        packages = needs if isinstance(needs, Mapping) else dict.fromkeys(needs)
        _STEPS[function.__name__] = StepInfo(function.__name__, function, reasons, packages, check)
        return function

    return enter


def steps() -> list[StepInfo]:
    """All steps, in the order of their names."""
    return sorted(_STEPS.values(), key=lambda info: info.name)


def make_step(name: str, **options: Any) -> Step:
    """The step of that name with these options, the others at their defaults; it can be pickled.

    Raises:
        ConfigError: no such step or option, a value that the option does not take, or a package that is missing.
    """
    info = _STEPS.get(name)
    if info is None:
        raise ConfigError(f"step {shown(name)} is unknown, expected one of {', '.join(sorted(_STEPS))}")
    values = {}
    for key, value in options.items():
        if key not in info.options:
            known = ", ".join(info.options) or "none"
            raise ConfigError(f"step {name}: option {shown(key)} is unknown, expected one of {known}")
        try:
            values[key] = info.options[key].read(value)
        except ValueError:
            wanted = info.options[key].wanted
            raise ConfigError(f"step {name}: {key} is {shown(value)}, expected {wanted}") from None
    every = {key: option.default for key, option in info.options.items()} | values
    _find_packages(info, every)
    if info.check:
        try:
            info.check(**every)
        except ValueError as error:
            raise ConfigError(f"step {name}: {error}") from None
    return functools.partial(info.function, **every)


def _find_packages(info: StepInfo, options: Mapping[str, Any]) -> None:
    for package, condition in info.needs.items():
        if condition is not None and not _asks(options[condition[0]], condition[1]):
            continue
        if importlib.util.find_spec(package) is None:
            why = f"{condition[0]}={condition[1]}: " if condition else ""
            raise ConfigError(
                f"step {info.name}: {why}the package {package} is missing, expected it installed:"
                " pip install '.[data]'  in the folder of fastlm's source"
            )


def _asks(given: Any, value: Any) -> bool:
    return value in given if isinstance(given, tuple) else given == value
