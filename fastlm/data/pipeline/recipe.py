"""Recipes: the steps of a pipeline as a list in TOML.

    [[step]]
    name = "whitespace"

    [[step]]
    name = "length"
    min_words = 50

    [[step]]
    name = "my_steps:shout"   # a function of the user's own: module:function, called with the options, gives a step
    enabled = false           # (the module is looked for beside the recipe first, then on Python's path)

Tables `[exact]`, `[near]` and `[lines]` ask for duplicates to be dropped; their keys are the attributes of
`fastlm.data.dedup.ExactOptions`, `NearOptions` and `LineOptions`. The step `contamination` drops documents that share
text with evaluation sets: `files`, read as the sources are, and the attributes of `ContaminationOptions`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError, ConfigFileError, DataError, shown
from ..clean import make_step
from ..dedup import Contamination, ContaminationOptions, ExactOptions, LineOptions, NearOptions
from ..document import Document, Step
from ..sources import SourceOptions, find, read_file
from .duplicates import NO_DUPLICATES, Duplicates

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same parser under its older name
    import tomli as tomllib

FOLDER = Path(__file__).parent / "recipes"
MOST_BYTES = 1 << 16
CONTAMINATION = "contamination"
DUPLICATES: dict[str, Any] = {"exact": ExactOptions, "near": NearOptions, "lines": LineOptions}


class StepSpec(NamedTuple):
    """A step by name, with its options. `folder` is where the module of one of the user's own is looked for first."""

    name: str
    options: dict[str, Any]
    folder: str = ""

    def make(self) -> Step:
        """The step.

        Raises:
            ConfigError: no step of this name, or an option that it does not take.
        """
        if ":" in self.name:
            return _own(*self)
        if self.name == CONTAMINATION:
            return _contamination(**self.options)
        return make_step(self.name, **self.options)


@dataclass(frozen=True)
class Recipe:
    """Steps in order. `name` is what the user gave."""

    name: str = ""
    steps: tuple[StepSpec, ...] = ()
    duplicates: Duplicates = NO_DUPLICATES

    def without(self, names: Iterable[str]) -> Recipe:
        """The recipe with all steps of these names left out; ConfigError for one that it does not have."""
        names = list(names)
        for name in names:
            if name not in [step.name for step in self.steps]:
                raise ConfigError(f"without is {name!r}, expected steps of the recipe: {_list(self.steps)}")
        kept = tuple(step for step in self.steps if step.name not in set(names))
        return Recipe(self.name, kept, self.duplicates)

    def check(self) -> None:
        """Make every step once; ConfigFileError names the recipe."""
        for number, step in enumerate(self.steps, start=1):
            try:
                step.make()
            except ConfigError as error:
                raise ConfigFileError(f"{self.name}: step {number}: {error}") from None

    def to_json(self) -> list[dict[str, Any]]:
        """For the manifest."""
        return [{"name": step.name, **step.options} for step in self.steps]


def recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """A recipe that comes with the package, by name, or one from a file.

    Raises:
        ConfigFileError: it is neither, is not TOML, or says what no recipe does.
    """
    path = FOLDER / f"{name}.toml" if name in recipes() else Path(name)
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigFileError(f"{name}: no such recipe; expected a file, or one of {', '.join(recipes())}") from None
    if len(data) > MOST_BYTES:
        raise ConfigFileError(f"{name}: has more than {MOST_BYTES} bytes, too many for a recipe")
    try:
        values = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigFileError(f"{name}: not valid TOML: {error}") from None
    kinds = {kind: _options(name, kind, values.pop(kind)) for kind in DUPLICATES if kind in values}
    return Recipe(name, tuple(_steps(name, values, str(path.parent.absolute()))), Duplicates(**kinds))


def _options(name: str, kind: str, table: Any) -> Any:
    if not isinstance(table, dict):
        raise ConfigFileError(f"{name}: {kind} is {shown(table)}, expected a table [{kind}]")
    known = [field.name for field in fields(DUPLICATES[kind])]
    for key in table:
        if key not in known:
            raise ConfigFileError(f"{name}: [{kind}]: unknown key {shown(key)}, expected one of {', '.join(known)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    try:
        return DUPLICATES[kind](**values)
    except (ValueError, TypeError) as error:
        raise ConfigFileError(f"{name}: [{kind}]: {error}") from None


def _steps(name: str, values: dict[str, Any], folder: str) -> Iterable[StepSpec]:
    for key in values:
        if key not in ("step", "description"):
            raise ConfigFileError(
                f"{name}: unknown key {shown(key)}, expected description, [[step]], [exact], [near] or [lines]"
            )
    tables = values.get("step", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigFileError(f"{name}: step is {shown(tables)}, expected [[step]] tables")
    for number, table in enumerate(tables, start=1):
        options = dict(table)
        step, enabled = options.pop("name", None), options.pop("enabled", True)
        if not isinstance(step, str):
            raise ConfigFileError(f"{name}: step {number}: name is {shown(step)}, expected the name of a step")
        if not isinstance(enabled, bool):
            raise ConfigFileError(f"{name}: step {number}: enabled is {shown(enabled)}, expected true or false")
        if enabled:
            yield StepSpec(step, options, folder if ":" in step else "")


def _contamination(
    files: Sequence[str] = (), text_column: str = SourceOptions.text_column, ngram: int = 13, shortest: int = 8
) -> Step:
    texts = []
    try:
        for file in find([Path(name) for name in files], ["*"]):
            for row in read_file(file, SourceOptions(text_column=text_column)):
                if not isinstance(row, Document):
                    raise DataError(str(row))
                texts.append((f"{row.source}:{row.row}", row.text))
        return Contamination(texts, ContaminationOptions(ngram, shortest))
    except ValueError as error:
        raise ConfigError(f"step {CONTAMINATION}: {error}") from None


def _own(name: str, options: dict[str, Any], folder: str) -> Step:
    module, _, function = name.partition(":")
    with _searched_first(folder):
        try:
            make = getattr(importlib.import_module(module), function)
            _check_origin(module.partition(".")[0], folder)
        except (Exception, SystemExit) as error:
            looked = f"; looked in {folder}, then on Python's path" if folder else ""
            raise ConfigError(f"name is {name!r}, expected module:function ({_reason(error)}{looked})") from None
        try:
            return make(**options)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{name}: {_reason(error)}") from None


@contextmanager
def _searched_first(folder: str) -> Iterator[None]:
    before = list(sys.path)
    if folder:
        sys.path.insert(0, folder)
        importlib.invalidate_caches()  # a module may be newer than what was seen of the folder
    try:
        yield
    finally:
        if folder:
            sys.path[:] = before


def _check_origin(module: str, folder: str) -> None:
    """Raise ImportError where an equally named module from elsewhere had been loaded before that of the folder."""
    wanted = PathFinder.find_spec(module, [folder]) if folder else None
    loaded = getattr(sys.modules[module], "__file__", None)
    if wanted and wanted.origin and not (loaded and os.path.samefile(loaded, wanted.origin)):
        raise ImportError(f"{wanted.origin} has the name of a module that is loaded already, {loaded or 'built in'}")


def _reason(error: BaseException) -> str:
    said = " ".join(str(error).split())
    if isinstance(error, (ImportError, AttributeError, TypeError, ValueError)):
        return said
    return f"{type(error).__name__}: {said}"


def _list(steps: Sequence[StepSpec]) -> str:
    return ", ".join(step.name for step in steps) or "none"
