"""What the models' configurations share: checks that name the field, and the way to and from a dictionary."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

from typing_extensions import Self

from ...errors import ConfigError, shown

LARGEST = 2**31 - 1  # of any size or number of layers


@dataclass(frozen=True)
class ModelConfig:
    """Base of the configurations; a subclass lists its fields and calls the checks in `__post_init__`.

    Attributes:
        families: the names, in Hugging Face's terms, of the relatives that have configurations of this class.
        family: the one that this is of, which files name; None where nobody has said. It says nothing that the other
            fields do not, so that configurations of two relatives may be equal.
    """

    families: ClassVar[tuple[str, ...]]

    family: str | None = field(default=None, kw_only=True, compare=False)

    def __post_init__(self) -> None:
        if self.family is None and len(self.families) == 1:
            object.__setattr__(self, "family", self.families[0])
        self._check_choice("family", (None, *self.families))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: for an unknown or missing name, or a value that the constructor refuses.
        """
        fields = dataclasses.fields(cls)
        if not isinstance(settings, dict):
            raise ConfigError(f"{cls.__name__}: is {settings!r:.80}, expected names with values")
        unknown = sorted(settings.keys() - {each.name for each in fields})
        required = {each.name for each in fields if each.default is dataclasses.MISSING}
        missing = sorted(required - settings.keys())
        if unknown or missing:
            text = ", ".join([f"unknown {name}" for name in unknown] + [f"missing {name}" for name in missing])
            raise ConfigError(f"{cls.__name__}: {text}")
        return cls(**settings)

    def _refuse(self, name: str, wanted: str) -> None:
        raise ConfigError(f"{type(self).__name__}: {name} is {shown(getattr(self, name))}, expected {wanted}")

    def _check_sizes(self, *names: str, low: int = 1) -> None:
        for name in names:
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < low:
                self._refuse(name, f"an integer of at least {low}")
            if size > LARGEST:
                self._refuse(name, f"an integer of at most {LARGEST}")

    def _check_multiple(self, name: str, of: str) -> None:
        if getattr(self, name) % getattr(self, of):
            self._refuse(name, f"a multiple of {of} {getattr(self, of)}")

    def _check_rates(self, *names: str) -> None:
        for name in names:
            rate = getattr(self, name)
            if not _is_number(rate) or not 0 <= rate < 1:
                self._refuse(name, "a number in [0, 1)")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            number = getattr(self, name)
            if not _is_number(number) or not 0 < number <= sys.float_info.max:
                self._refuse(name, "a number above 0")

    def _check_flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "true or false")

    def _check_choice(self, name: str, choices: tuple[str | None, ...]) -> None:
        if getattr(self, name) not in choices:
            self._refuse(name, " or ".join(map(str, choices)))

    def _check_numbers(self, name: str, count: int) -> None:
        """Numbers above 0, `count` of them, which become a tuple."""
        values = getattr(self, name)
        fits = isinstance(values, (list, tuple)) and len(values) == count
        if not fits or not all(_is_number(value) and 0 < value <= sys.float_info.max for value in values):
            self._refuse(name, f"{count} numbers above 0")
        object.__setattr__(self, name, tuple(values))

    def _check_ids(self, vocab_size: int, *names: str) -> None:
        for name in names:
            token = getattr(self, name)
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                self._refuse(name, "an id of the vocabulary")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
