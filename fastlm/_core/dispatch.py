"""The backend table: (op, device, dtype, features) -> the name of the backend that serves the call.

An op registers one `Backend` per implementation. `choose` returns the first in the op's order of
preference that supports the request; the order is by measurement, fastest first. An explicit choice
(`with fastlm.backend(...)`, FASTLM_BACKEND) is never replaced by another: it serves the call or raises.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import BackendError
from . import proofs
from .architecture import Architecture, architecture
from .torch_private import fake_mode, forward_mode, is_fake, runs_compiled, transforms_active, uncompiled

NAMES = ("cpu", "triton", "cuda", "torch", "reference")


class Request(NamedTuple):
    """What a call asks of a backend: all that the choice may depend on, and hashable.

    Attributes:
        gpu, size, grad: of calls on GPUs alone, where the choice goes by what was measured: the GPU's number, the
            bit lengths of the extents that tell how large the call is, and whether gradients are wanted.
    """

    device: str
    dtype: torch.dtype
    features: tuple = ()
    gpu: int = 0
    size: tuple[int, ...] = ()
    grad: bool = False


def request_of(x: torch.Tensor, features: tuple = (), extents: tuple[int, ...] = (), grad: bool | None = None) -> tuple:
    """The request of a call, as a plain tuple, which is cheaper to make.

    Args:
        x: the tensor that says device and dtype.
        extents: how large the call is; of rows, as most are, by default: x's elements and its last extent.
        grad: whether gradients are wanted; by default where x requires one.
    """
    if not x.is_cuda:
        return ("cpu" if x.is_cpu else x.device.type, x.dtype, features)
    if not extents:
        shape = x.shape
        extents = (x.numel(), shape[-1] if shape else 1)
    if grad is None:
        grad = x.requires_grad and torch.is_grad_enabled()
    return ("cuda", x.dtype, features, x.get_device(), tuple([n.bit_length() for n in extents]), grad)


class Backend(NamedTuple):
    """One implementation of an op.

    Attributes:
        name: one of `NAMES`.
        unsupported: maps a request to the reason it cannot be served, or None where it can.
        automatic: False for a backend that only an explicit choice may select; the reason is then
            what `explain` shows.
        why_not_automatic: that reason.
        needs_proof: for GPU kernels: on a GPU where nothing is proved of them (proofs.py) they are chosen automatically
            over the reference alone, never over PyTorch's operator; where something is, the fastest that is right.
        slower: maps a request that PyTorch's operator serves faster to the reason why automatic choice leaves it that
            request; None where it is never so.
        stands_in: for PyTorch's operator: maps a request to whether it serves where a forced backend of kernels cannot,
            as in layers, which models are made of; None where it never does.
    """

    name: str
    unsupported: Callable[[Request], str | None]
    automatic: bool = True
    why_not_automatic: str = ""
    needs_proof: bool = False
    slower: Callable[[Request], str | None] | None = None
    stands_in: Callable[[Request], bool] | None = None


_TABLE: dict[str, list[Backend]] = {}
_CACHE: dict[tuple, str] = {}
_OPAQUE: set[str] = set()


def register(op: str, *backends: Backend, opaque: bool = False) -> None:
    """Enter an op's backends, in order of preference.

    Args:
        opaque: whether torch.compile records the op as one operator, which chooses among them when it runs; else it
            traces plain torch operators.
    """
    _TABLE[op] = list(backends)
    if opaque:
        _OPAQUE.add(op)


def ops() -> list[str]:
    return sorted(_TABLE)


def backends(op: str) -> list[Backend]:
    return _TABLE[op]


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise BackendError(f"{source}: no backend is called {name!r}; choose from {', '.join(NAMES)}")
    return name


def _from_environment() -> str | None:
    name = os.environ.get("FASTLM_BACKEND") or None
    return name if name is None else _check_name(name, "FASTLM_BACKEND")


class _Explaining(NamedTuple):
    """In place of a forced backend's name while `explain` runs the op."""

    forced: str | None


# The forced backend's name, None under automatic choice. FASTLM_BACKEND is read once, at import.
_AT_IMPORT = _from_environment()
_mode: contextvars.ContextVar[str | _Explaining | None] = contextvars.ContextVar("fastlm_backend", default=_AT_IMPORT)


def forced_backend() -> str | None:
    """The explicitly chosen backend, or None under automatic choice."""
    mode = _mode.get()
    return mode.forced if isinstance(mode, _Explaining) else mode


mode = _mode.get
"""() -> None where the fastest backend is to serve: none is forced, and no call explained."""


class backend:
    """Force every fastlm op called inside onto one backend; None restores the automatic choice.

    One exception: where a backend of kernels has none for a layer's matmul, PyTorch's stands in; `explain` says so.

    A class, since a generator's context manager takes 1.1 us to enter and leave and this 0.4.

    Args:
        name: "cpu", "triton", "cuda", "torch", "reference" or None.

    Raises:
        BackendError: for an unknown name; and inside, by an op that the backend cannot serve.
    """

    __slots__ = ("_name", "_tokens")

    def __init__(self, name: str | None):
        if name is not None and name not in NAMES:
            _check_name(name, "backend")
        self._name = name
        self._tokens: list[contextvars.Token] = []  # one for each time that it is entered

    def __enter__(self) -> None:
        self._tokens.append(_mode.set(self._name))

    def __exit__(self, *raised: object) -> None:
        _mode.reset(self._tokens.pop())

    def __call__(self, function: Callable) -> Callable:
        """As a decorator."""

        @functools.wraps(function)
        def forced(*args: Any, **kwargs: Any) -> Any:
            with backend(self._name):
                return function(*args, **kwargs)

        return forced


def choose(op: str, request: tuple) -> str:
    """Name of the backend that serves `request`, remembered per (op, request, forced backend).

    Args:
        op: as registered.
        request: a `Request`, or a plain tuple of its fields, which is cheaper to make.

    Raises:
        BackendError: if the forced backend cannot serve the request; the message says why.
    """
    mode = _mode.get()
    key = (op, request, mode)
    name = _CACHE.get(key)
    if name is None:
        if isinstance(mode, _Explaining):
            raise _Explained(op, Request(*request))
        name = _CACHE[key] = _choose(op, Request(*request), mode)
    return name


def _stands_in(op: str, request: Request, forced: str | None) -> bool:
    """Whether PyTorch's operator takes a request that `forced` cannot serve."""
    if forced in (None, "torch", "reference"):
        return False
    return any(row.stands_in is not None and row.stands_in(request) for row in _TABLE[op])


def _choose(op: str, request: Request, forced: str | None) -> str:
    for row in _TABLE[op]:
        if forced is None and row.unsupported(request) is None and held_back(op, row, request) is None:
            return row.name
        if row.name == forced:
            reason = row.unsupported(request)
            if reason is None:
                return forced
            if _stands_in(op, request, forced):
                return "torch"
            raise BackendError(f"{op}: the {forced} backend was asked for, but {reason}")
    if _stands_in(op, request, forced):
        return "torch"
    if forced is not None:
        raise BackendError(f"{op}: the {forced} backend was asked for, but this op has none")
    raise BackendError(f"{op}: no backend serves {request}")


PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None))
_is_compiling = torch.compiler.is_compiling


def held_back(op: str, row: Backend, request: Request) -> str | None:
    """Why automatic choice passes over a backend that supports the request, or None where it does not."""
    if not row.automatic:
        return row.why_not_automatic
    stock = any(other.name == "torch" and other.unsupported(request) is None for other in _TABLE[op])
    if row.slower is not None and stock:
        return row.slower(request)
    if not row.needs_proof:
        return None
    if request.device != "cuda":
        return "interpreted kernels serve only an explicit choice"
    return _held_back_by_proof(op, row, request, stock)


def _held_back_by_proof(op: str, row: Backend, request: Request, stock: bool) -> str | None:
    """Why a kernel for GPUs is passed over; `stock` says whether PyTorch's operator serves the request too."""
    found = proofs.find(op, row.name, request)
    if found.verdict != "right":  # the reference is worse than what nobody has tried yet, but not than what is wrong
        return found.text if stock or found.verdict else None
    if found.ratio is None:
        return found.text if stock else None
    if found.ratio < 1:
        return f"slower here: {found.ratio:.2f}x {found.other} at {found.shape}"
    for rival in _TABLE[op]:
        if rival.needs_proof and rival.name != row.name and rival.unsupported(request) is None:
            theirs = proofs.find(op, rival.name, request)
            if theirs.ratio is not None and theirs.ratio > found.ratio:
                return f"slower here: {found.ratio / theirs.ratio:.2f}x {rival.name} at {theirs.shape}"
    return None


def must_trace(*tensors: torch.Tensor | None) -> bool:
    """True where a call has to be made of plain torch operators.

    That is under torch.compile and torch.export, inside torch.func transforms and forward-mode differentiation, for
    tensor subclasses, which have no memory for a kernel to point at, and in FakeTensorMode, where what is made is such
    a subclass.
    """
    if _is_compiling() or transforms_active() or forward_mode() or fake_mode() is not None:
        return True
    for t in tensors:
        if type(t) not in PLAIN_TENSORS:
            return True
    return False


def as_operator(*tensors: torch.Tensor | None) -> bool:
    """Whether an op that is registered with torch has to be called as such, so that it is recorded or seen whole."""
    if _is_compiling():
        return True
    if fake_mode() is None or transforms_active():
        return False
    return all(type(t) in PLAIN_TENSORS or is_fake(t) for t in tensors)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of an autocast region on this type of device, None outside one; the meta device knows none."""
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def without_autocast(device: str) -> AbstractContextManager:
    """No autocast inside, on this type of device."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


@functools.cache
def oldest_architecture() -> Architecture:
    """The oldest among the visible GPUs, so that one answer serves them all."""
    return min(architecture(index) for index in range(torch.cuda.device_count()))


class LazyModule:
    """A module that is imported when an attribute is first asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


def always(request: Request) -> None:
    """For a backend that serves everything."""


def clear_cache() -> None:
    """Forget remembered choices, after something that they depend on has changed, and read proofs anew."""
    _CACHE.clear()
    proofs.forget()


class _Explained(BaseException):
    """Carries the request out of the op that `explain` called, before any kernel runs."""

    def __init__(self, op: str, request: Request):
        self.op, self.request = op, request


@dataclass(frozen=True)
class Explanation:
    """Which backend would serve a call, and why each other one would not; `compiled`, by torch.compile.

    `proof` is what was measured of the one that is selected, where it is a GPU kernel.
    """

    op: str
    request: Request
    selected: str | None
    reasons: dict[str, str] = field(default_factory=dict)
    compiled: bool = False
    proof: str = ""

    def __str__(self) -> str:
        features = "".join(f", {name}={value}" for name, value in self.request.features)
        under = ", under torch.compile" if self.compiled else ""
        lines = [f"{self.op} on {self.request.device}, {str(self.request.dtype)[6:]}{features}{under}"]
        proof = {self.selected: f": {self.proof}" if self.proof else ""}
        lines += [f"  {name:<10} {reason}{proof.get(name, '')}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(fn: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend `fn(*args, **kwargs)` would run on, without running it.

    Args:
        fn: a public op, such as `fastlm.layer_norm`, a module, or any function that calls one; the first op that is
            reached is explained. What torch.compile made of these is run as it was written, and not compiled.

    Returns:
        An `Explanation`; its `reasons` maps every backend name to "selected" or why it is not, and
        printing it gives a table.

    Raises:
        BackendError: if `fn` returns without reaching a fastlm op.
    """
    token = _mode.set(_Explaining(forced_backend()))
    try:
        with uncompiled():
            fn(*args, **kwargs)
    except _Explained as found:
        op, request, compiled = found.op, found.request, runs_compiled(found.__traceback__)
    else:
        raise BackendError(f"explain: {getattr(fn, '__name__', fn)} reached no fastlm op")
    finally:
        _mode.reset(token)
    if compiled and op not in _OPAQUE:
        selected, reasons = _traced(op)
    else:
        selected, reasons = _reasons(op, request, forced_backend())
    for name in NAMES:
        reasons.setdefault(name, f"{op} has no {name} backend")
    needs_proof = any(row.needs_proof for row in _TABLE[op] if row.name == selected)
    proof = proofs.find(op, str(selected), request).text if needs_proof and request.device == "cuda" else ""
    return Explanation(op, request, selected, reasons, compiled, proof)


def _reasons(op: str, request: Request, forced: str | None) -> tuple[str | None, dict[str, str]]:
    """The backend that serves a request, and for each of the op's why it does or does not."""
    instead = _stands_in(op, request, forced)
    selected: str | None = None
    reasons: dict[str, str] = {}
    for row in _TABLE[op]:
        reason = row.unsupported(request)
        if reason is None and forced not in (None, row.name) and not (instead and row.stands_in is not None):
            reason = f"not asked for: {forced} is forced"
        if reason is None and forced is None:
            reason = held_back(op, row, request)
        if reason is None and selected is not None:
            reason = f"supported, but {selected} comes first"
        if reason is None:
            selected, reason = row.name, "selected"
        reasons[row.name] = reason
    return selected, reasons


def _traced(op: str) -> tuple[str | None, dict[str, str]]:
    """The same under torch.compile, for an op that is traced as plain torch operators, whatever is forced."""
    names = [row.name for row in _TABLE[op]]
    selected = "torch" if "torch" in names else "reference"
    traced = f"torch.compile traces {op} as PyTorch's own operators"
    return selected, {name: "selected" if name == selected else traced for name in names}
