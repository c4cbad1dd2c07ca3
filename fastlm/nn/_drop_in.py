"""Classes that other libraries' tables of classes take for the ones that they stand in for."""

from __future__ import annotations

from typing import Any

_STANDS_FOR = "_fastlm_stands_for"


class DropIn(type):
    """Metaclass of a class that equals, and hashes as, the class it stands in for.

    What maps classes to something, as `torch.ao.quantization` maps nn.Linear to its quantized layers, thereby finds
    ours. A class derived from a drop-in is a class of its own, as it is not torch's either.

        class Linear(torch.nn.Linear, metaclass=DropIn, stands_for=torch.nn.Linear): ...
    """

    def __new__(mcs, name: str, bases: tuple[type, ...], names: dict[str, Any], stands_for: type | None = None) -> Any:
        return super().__new__(mcs, name, bases, names)

    def __init__(cls, name: str, bases: tuple[type, ...], names: dict[str, Any], stands_for: type | None = None):
        super().__init__(name, bases, names)
        if stands_for is not None:
            setattr(cls, _STANDS_FOR, _original(stands_for))

    def __eq__(cls, other: object) -> bool:
        return _original(cls) is _original(other)

    def __hash__(cls) -> int:
        return type.__hash__(_original(cls))


def _original(cls: Any) -> Any:
    return cls.__dict__.get(_STANDS_FOR, cls) if isinstance(cls, DropIn) else cls


def stand_in(original: Any, names: dict[str, Any]) -> Any:
    """A drop-in for `original` that is derived from it, with these attributes."""
    metaclass: Any = DropIn
    if not issubclass(DropIn, type(original)):  # it has a metaclass of its own, as an abstract class has
        metaclass = type("DropIn", (DropIn, type(original)), {})
    return metaclass(original.__name__, (original,), names, stands_for=original)
