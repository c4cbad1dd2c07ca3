"""The benchmark of an op that is a function of tensors; one file an op fills in the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import providers
from .case import Built, Case, Counts

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Inputs:
    """Arguments in order; those of `differentiable` get gradients."""

    tensors: tuple[Tensor | None, ...]
    differentiable: tuple[int, ...]


@dataclass(frozen=True)
class KernelBenchmark:
    """An op.

    Attributes:
        name: as `fastlm bench` and the results call it.
        dims: names of the shape's extents.
        variants: forms of the op, the default first.
        table: (quick, device) -> cases without dtype.
        inputs: (case, device) -> the arguments, in the case's dtype.
        ours, stock: case -> the public function and PyTorch's, of these arguments.
        counts: (case, pass) -> bytes and FLOPs.
        peers: provider -> (case, device) -> its function; it raises Unavailable where it has none.
        terms: case -> terms in the longest sum.
        ops: those that its variants time, as the table of backends calls them; the one of its name if empty.
        gpu_peers: who `make gpu-check` compares it with, beside PyTorch's operator.
    """

    name: str
    dims: tuple[str, ...]
    variants: tuple[str, ...]
    table: Callable[[bool, str], list[Case]]
    inputs: Callable[[Case, str], Inputs]
    ours: Callable[[Case], Function]
    stock: Callable[[Case], Function]
    counts: Callable[[Case, str], Counts]
    terms: Callable[[Case], int]
    peers: Mapping[str, Callable[[Case, str], Function]] = field(default_factory=dict)
    ops: tuple[str, ...] = ()
    gpu_peers: tuple[str, ...] = ()

    def times(self, op: str) -> bool:
        return op in (self.ops or (self.name,))

    def cases(self, device: str, quick: bool) -> list[Case]:
        return self.table(quick, device)

    def providers(self) -> tuple[str, ...]:
        return (*providers.OURS, *providers.STOCK, *self.peers)

    def session(self, case: Case, device: str) -> KernelSession:
        return KernelSession(self, case, device)


class KernelSession:
    """A case's inputs, output gradients and truth: PyTorch's operator in fp64 on the same rounded values."""

    counts_state = False

    def __init__(self, op: KernelBenchmark, case: Case, device: str):
        self.op, self.case, self.device = op, case, device
        self.terms = op.terms(case)
        self.gradients = case.passes != ("fwd",)
        torch.manual_seed(0)
        given = op.inputs(case, device)
        self.differentiable = given.differentiable if self.gradients else ()
        self.tensors = _leaves(given.tensors, self.differentiable)
        doubled = tuple(t.double() if t is not None and t.is_floating_point() else t for t in given.tensors)
        doubled = _leaves(doubled, self.differentiable)
        outputs = _tuple(op.stock(without_dropout(case))(*doubled))
        self.grads = tuple(torch.randn_like(out).to(case.torch_dtype) for out in outputs)
        self.truth = self._named(outputs, doubled)

    def _named(self, outputs: tuple[Tensor, ...], tensors: tuple[Tensor | None, ...] | None) -> dict[str, Tensor]:
        """Outputs, and gradients of `tensors` if these are given, by name."""
        results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        if self.gradients and tensors is not None:
            leaves = self._leaves_of(tensors)
            grads = [g.to(out.dtype) for g, out in zip(self.grads, outputs, strict=True)]
            found = torch.autograd.grad(outputs, leaves, grads)
            results |= {f"gradient {i}": g for i, g in zip(self.differentiable, found, strict=True)}
        return results

    def _leaves_of(self, tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
        return [t for i in self.differentiable if (t := tensors[i]) is not None]

    def providers(self) -> Iterable[str]:
        return self.op.providers()

    def counts(self, which: str) -> Counts:
        return self.op.counts(self.case, which)

    def build(self, provider: str) -> Built:
        """Make a provider ready and run it once, with dropout off: masks differ from library to library."""
        providers.require(provider)
        function = self._function(provider, self.case)
        plain = without_dropout(self.case)
        checked = function if plain == self.case else self._function(provider, plain)
        forward_only = getattr(function, "forward_only", False)
        results = self._named(_tuple(checked(*self.tensors)), None if forward_only else self.tensors)
        timed = not (provider == "liger" and self.device == "cpu")
        return Built(self._runs(function, forward_only), results, providers.label(provider, self.device), timed)

    def _function(self, provider: str, case: Case) -> Function:
        if providers.is_ours(provider):
            return providers.on_backend(provider, self.op.ours(case), self.tensors)
        if provider == "torch":
            return self.op.stock(case)
        if provider == "compile":
            return providers.compiled(self.op.stock(case))
        return self.op.peers[provider](case, self.device)

    def _runs(self, function: Function, forward_only: bool) -> dict[str, Callable[[], object]]:
        runs: dict[str, Callable[[], object]] = {}
        if "fwd" in self.case.passes:
            runs["fwd"] = lambda: _without_gradients(function, self.tensors)
        if not self.gradients or forward_only:
            return runs
        leaves = self._leaves_of(self.tensors)
        if "bwd" in self.case.passes:
            outputs = _tuple(function(*self.tensors))
            runs["bwd"] = lambda: torch.autograd.grad(outputs, leaves, self.grads, retain_graph=True)
        if "full" in self.case.passes:
            runs["full"] = lambda: torch.autograd.grad(_tuple(function(*self.tensors)), leaves, self.grads)
        return runs


def without_dropout(case: Case) -> Case:
    variant = "causal" if case.variant == "dropout" else case.variant.removesuffix("+dropout")
    return dataclasses.replace(case, variant=variant)


def _without_gradients(function: Function, tensors: tuple[Tensor | None, ...]) -> object:
    with torch.no_grad():
        return function(*tensors)


def _leaves(tensors: tuple[Tensor | None, ...], differentiable: tuple[int, ...]) -> tuple[Tensor | None, ...]:
    return tuple(
        t.detach().requires_grad_(i in differentiable) if t is not None and t.is_floating_point() else t
        for i, t in enumerate(tensors)
    )


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def each_dtype(cases: list[Case], dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> list[Case]:
    """The cases in every dtype, those of one shape side by side."""
    return [dataclasses.replace(c, dtype=dtype) for c in cases for dtype in dtypes]


def slow_in_16_bits(cases: list[Case], chosen: Callable[[Case], bool]) -> list[Case]:
    """The cases, those in bfloat16 that are `chosen` marked slow: one dtype tells what compiling is worth."""
    return [dataclasses.replace(c, slow=c.dtype == "bfloat16" and chosen(c)) for c in cases]
