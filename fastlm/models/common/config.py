"""What the models' configurations share: checks that name the field, and the way to and from a dictionary."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from ...errors import ConfigError, shown

LARGEST = 2**31 - 1  # of any size or number of layers


@dataclass(frozen=True)
class ModelConfig:
    """Base of the configurations; a subclass lists its fields and calls the checks in `__post_init__`."""

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
        unknown = sorted(settings.keys() - {field.name for field in fields})
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
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

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            self._refuse(name, " or ".join(choices))

    def _check_ids(self, vocab_size: int, *names: str) -> None:
        for name in names:
            token = getattr(self, name)
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                self._refuse(name, "an id of the vocabulary")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
