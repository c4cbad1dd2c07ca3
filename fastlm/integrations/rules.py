"""Which modules `accelerate` swaps, and for what.

torch.nn's classes are known by name. Others are known by what they do: a normalization or activation by its values
on a few numbers, a block with dropout inside by its forward's instructions, which must be those of a template.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import nn as ours
from ..nn._drop_in import stand_in
from ..nn._plain import redirected
from . import blocks

CLASSES: dict[type, type] = {
    getattr(nn, name): getattr(ours, name)
    for name in (
        "LayerNorm", "RMSNorm", "GELU", "MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer",
        "TransformerEncoder", "TransformerDecoder", "CrossEntropyLoss", "LinearCrossEntropyLoss",
    )
    if hasattr(nn, name)
}  # fmt: skip


class Found(NamedTuple):
    """The class to give a module, and what to call it in a report."""

    cls: type
    label: str


def replacement(module: nn.Module, unpad: bool) -> Found | str | None:
    """What to swap `module` for, why it is left alone, or None for one of no interest.

    Args:
        unpad: whether BERT-type encoders are of interest.
    """
    cls: Any = type(module)
    if is_replacement(cls):
        return None
    found = _torch_class(cls) or _by_values(module) or _by_code(module, unpad)
    if isinstance(found, Found):
        return _obstacle(module) or found
    return found


def _obstacle(module: nn.Module) -> str | None:
    if redirected(module):
        return "its forward was replaced on the instance"
    if hasattr(module, "parametrizations"):
        return "it is parametrized; its class is the parametrization's"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    return None


def _torch_class(cls: Any) -> Found | str | None:
    known: Any
    if cls is nn.Linear:  # not its subclasses: other code may test for their type
        return Found(ours.Linear, "fastlm.nn.Linear")
    for known, fast in CLASSES.items():
        if cls is known:
            return Found(fast, f"fastlm.nn.{fast.__name__}")
        if issubclass(cls, known):
            if cls.forward is not known.forward:
                return f"its forward is not torch.nn.{known.__name__}'s"
            return Found(derived(cls, known.__name__), f"fastlm.nn.{fast.__name__}'s forward")
    return None


def _by_values(module: nn.Module) -> Found | str | None:
    """RMSNorm and GELU classes of other libraries."""
    cls: Any = type(module)
    name = cls.__name__
    if "RMSNorm" in name or name == "T5LayerNorm":
        for form in ("rms_norm", "rms_norm_offset"):
            if _same_values(module, form):
                return Found(derived(cls, form), "fastlm.rms_norm")
        return "it does not compute what fastlm.rms_norm does"
    if "GELU" in name:
        for form in ("gelu_none", "gelu_tanh"):
            if _same_values(module, form):
                return Found(derived(cls, form), "fastlm.gelu")
        return "it does not compute either form of GELU"
    return None


def _same_values(module: nn.Module, form: str) -> bool:
    """Whether a module with one 1-D weight or none gives `form`'s values in fp32, for numbers small and large."""
    weight = getattr(module, "weight", None)
    parameters = dict(module.named_parameters())
    if list(parameters) not in ([], ["weight"]) or (weight is not None and (weight.dim() != 1 or weight.is_meta)):
        return False
    if form.startswith("rms_norm") and (weight is None or blocks.eps_of(module) is None):
        return False
    twin = module.__new__(type(module))  # the module's twin in fp32, without its hooks
    twin.__dict__.update(module.__dict__)
    twin._parameters = {name: nn.Parameter(p.detach().float()) for name, p in parameters.items()}
    device = None if weight is None else weight.device
    x = torch.linspace(-8, 8, 3 * 64 if weight is None else 3 * weight.shape[0], device=device).reshape(3, -1)
    x = x * torch.tensor([[1.0], [1e-3], [0.3]], device=device)  # in the second row a norm's eps matters
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        try:
            expected = type(module).forward(twin, x)
        except Exception:  # another library's code, called on a guess
            return False
        actual = blocks.FORWARDS[form](type(module))(twin, x)
    return isinstance(expected, Tensor) and torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def _by_code(module: nn.Module, unpad: bool) -> Found | str | None:
    cls: Any = type(module)
    for block in blocks.BLOCKS:
        if _same_code(cls.forward, block.template) and block.fits(module):
            return Found(derived(cls, block.kind), block.label)
    if unpad and cls.__name__ in blocks.ENCODERS:
        return Found(derived(cls, "unpadded"), "the same without its padding")
    return None


@functools.cache
def _instructions(function: Callable) -> tuple:
    """A function's instructions without the names of its variables."""
    import dis

    found = []
    for step in dis.get_instructions(function):
        by_index = step.opcode in dis.haslocal
        found.append((step.opname, step.arg if by_index else step.argrepr))
    return tuple(found)


def _same_code(function: Any, template: Callable) -> bool:
    return hasattr(function, "__code__") and _instructions(function) == _instructions(template)


_DERIVED: dict[tuple[int, str], Any] = {}  # by identity: a drop-in and the class it stands in for are equal


def derived(original: Any, kind: str) -> Any:
    """The subclass of `original` with the forward `kind`; it looks like `original`, and pickles through it."""
    key = id(original), kind
    if key not in _DERIVED:
        _DERIVED[key] = _derive(original, kind)
    return _DERIVED[key]


def _derive(original: Any, kind: str) -> Any:
    known: Any = CLASSES_BY_NAME.get(kind)
    forward = blocks.FORWARDS[kind](original) if known is None else known.forward
    names = {
        "forward": forward, "__reduce_ex__": _reduce, "_fastlm_kind": kind,
        "__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__,
    }  # fmt: skip
    return stand_in(original, names)


CLASSES_BY_NAME = {known.__name__: fast for known, fast in CLASSES.items()}


def is_replacement(cls: type) -> bool:
    return "_fastlm_kind" in cls.__dict__ or any(cls is fast for fast in (*CLASSES.values(), ours.Linear))


def _reduce(self: Any, protocol: int) -> tuple:
    """As object's own, but made anew through `derived`: pickle would not find the class by its name."""
    reduced: Any = object.__reduce_ex__(self, max(protocol, 2))
    return _rebuild, (type(self).__mro__[1], self._fastlm_kind), *reduced[2:]


def _rebuild(original: Any, kind: str) -> nn.Module:
    known = kind in CLASSES_BY_NAME or kind in blocks.FORWARDS
    cls = derived(original, kind) if known else original  # a forward that an earlier version had
    return cls.__new__(cls)
