"""The checks on one random call: values, gradients, margins, repeatability, independence of batch and threads."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastlm

from .guards import Guards, guarded_allocations, to_bytes
from .op import Rounding, Sample, Spec, Tensors, integers, normal
from .tolerance import RATIO_TO_TORCH, magnitude, max_error, rounding

KERNELS = ("cpu", "triton", "cuda")  # backends that promise more than right values: the same bits
THREADS = (1, 2, 3)
KINDS = ("error", "value", "exact", "gradient", "unwritten", "guard", "repeat", "threads", "batch")

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Failure:
    """One thing that went wrong; `kind` is one of `KINDS`."""

    kind: str
    message: str


@dataclass
class Errors:
    """Errors of one result, for the table: in units in the last place, and relative root mean squares."""

    ulp: float
    torch_ulp: float
    squares: float
    torch_squares: float
    count: int
    of_bound: float


@dataclass
class Outcome:
    failures: list[Failure] = field(default_factory=list)
    errors: list[Errors] = field(default_factory=list)


@dataclass
class Truth:
    """What a sample should give: fp64 results, PyTorch's own in the sample's dtype, and what rounding may do."""

    grads: tuple[Tensor, ...]
    results: Results
    by_torch: Results
    rounding: dict[str, Rounding]


def check(spec: Spec, backend: str, sample: Sample, layout_seed: int) -> Outcome:
    """Run every check of `sample` on `backend`.

    Args:
        layout_seed: decides how the inputs lie in memory.
    """
    outcome = Outcome()
    truth = find_truth(spec, sample)
    for isa in instruction_sets(backend):
        with _instruction_set(isa):
            results = _guarded(spec, backend, sample, truth, layout_seed, outcome, isa)
            if results is not None:
                compare(truth, results, outcome, isa, exactly=sample.exact and backend in KERNELS)
    if backend in KERNELS and not outcome.failures:
        outcome.failures += _repeatable(spec, backend, sample, truth)
    return outcome


def instruction_sets(backend: str) -> tuple[str | None, ...]:
    """Those to loop over: all that the machine has, or the one that FASTLM_CPU_ISA asks for."""
    if backend != "cpu":
        return (None,)
    return (fastlm.cpu_isa(),) if os.environ.get("FASTLM_CPU_ISA") else fastlm.cpu_isas()


def device_of(backend: str) -> str:
    """Where a backend's tensors lie: GPU kernels run on the CPU only where Triton interprets them."""
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _instruction_set(name: str | None) -> Iterator[None]:
    before = fastlm.cpu_isa()
    if name is not None:
        fastlm.set_cpu_isa(name)
    try:
        yield
    finally:
        if before is not None:
            fastlm.set_cpu_isa(before)


def evaluate(spec_call, tensors: Tensors, sample: Sample, grads: tuple[Tensor, ...] | None) -> Results:
    """Outputs by the name "output 0", ..., and gradients by the name "d" + tensor, of one call.

    A gradient that was asked for and did not come is left out.
    """
    torch.manual_seed(sample.seed)
    leaves = {n: t for n in sample.differentiable if (t := tensors[n]) is not None}
    for leaf in leaves.values():
        leaf.requires_grad_()
    outputs = spec_call(tensors, sample)
    results = {f"output {i}": out.detach().cpu() for i, out in enumerate(outputs)}
    if grads is not None and outputs and leaves:
        pairs = [(out, g) for out, g in zip(outputs, grads, strict=True) if out.requires_grad]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs], inputs=list(leaves.values()))
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            results["d" + name] = leaf.grad.cpu()
    return results


def _copies(tensors: Tensors, dtype: torch.dtype | None = None, device: str = "cpu") -> Tensors:
    return {
        n: None if t is None else t.clone().to(device, dtype if dtype and t.is_floating_point() else t.dtype)
        for n, t in tensors.items()
    }


def find_truth(spec: Spec, sample: Sample) -> Truth:
    generator = random.Random(sample.seed)
    truth_call = spec.truth or spec.stock
    doubles = _copies(sample.tensors, torch.float64)
    with torch.no_grad():
        torch.manual_seed(sample.seed)
        shapes = [out.shape for out in truth_call(doubles, sample)]
    draw = (lambda *shape: integers(generator, -2, 2, *shape)) if sample.exact else lambda *s: normal(generator, *s)
    grads = tuple(draw(*shape).to(sample.dtype) for shape in shapes)
    wide = tuple(g.double() for g in grads)
    results = evaluate(truth_call, doubles, sample, wide)
    by_torch = {} if sample.exact else evaluate(spec.stock, _copies(sample.tensors), sample, grads)
    torch.manual_seed(sample.seed)
    return Truth(grads, results, by_torch, spec.rounding(sample, _copies(sample.tensors, torch.float64), wide))


def _guarded(
    spec: Spec, backend: str, sample: Sample, truth: Truth, layout_seed: int, outcome: Outcome, isa: str | None
) -> Results | None:
    """The results of a call between margins; None where it raised."""
    guards = Guards()
    layout = None if sample.seed % 4 == 0 else random.Random(layout_seed)
    device = device_of(backend)
    placed = {n: None if t is None else guards.place(n, t.to(device), layout) for n, t in sample.tensors.items()}
    grads = tuple(guards.place(f"the gradient of output {i}", g.to(device), layout) for i, g in enumerate(truth.grads))
    try:
        with fastlm.backend(backend), threads(THREADS[sample.seed % len(THREADS)]), guarded_allocations(guards):
            results = evaluate(spec.call, placed, sample, grads)
    except Exception as error:  # whatever an op raises on valid input is a finding
        outcome.failures.append(Failure("error", f"{_on(isa)}{type(error).__name__}: {str(error).splitlines()[0]}"))
        return None
    outcome.failures += [Failure("guard", _on(isa) + text) for text in guards.violations()]
    return results


def _on(isa: str | None) -> str:
    return f"[{isa}] " if isa else ""


def compare(truth: Truth, results: Results, outcome: Outcome, isa: str | None, exactly: bool) -> None:
    """Every output and gradient against the truth, by the tolerance rule or exactly."""
    for name, expected in truth.results.items():
        failure = _compare_one(truth, results, outcome, name, expected, exactly)
        if failure:
            outcome.failures.append(Failure(failure.kind, f"{_on(isa)}{name}: {failure.message}"))


def _compare_one(
    truth: Truth, results: Results, outcome: Outcome, name: str, expected: Tensor, exactly: bool
) -> Failure | None:
    kind = "gradient" if name.startswith("d") else "value"
    actual = results.get(name)
    if actual is None:  # to an empty tensor no gradient is as good as an empty one
        return Failure(kind, "there is none") if expected.numel() else None
    if exactly and actual.shape == expected.shape:
        wrong = int((actual.double() != expected.to(actual.dtype).double()).sum())
        return Failure("exact", f"{wrong} of {actual.numel()} elements are not exact") if wrong else None
    try:
        error = max_error(actual, expected)
    except AssertionError as problem:
        return Failure("unwritten" if "NaN" in str(problem) else kind, str(problem))
    theirs = truth.by_torch.get(name)
    if theirs is not None and not theirs.isfinite().all() and not _same_values(theirs, actual):
        theirs = None  # where PyTorch overflows, its error allows nothing
    extra = truth.rounding.get(name, Rounding())
    bound = tolerance(actual.dtype, expected, theirs, extra)
    # Units and relative errors mean nothing where all digits cancel, as in softmax over a single key.
    cancelled = magnitude(expected) <= extra.summed * torch.finfo(actual.dtype).eps
    if actual.numel() and expected.isfinite().all() and actual.isfinite().all() and not cancelled:
        outcome.errors.append(measure(actual, expected, theirs, error / bound if bound else float(error > 0)))
    if error <= bound:
        return None
    return Failure(kind, f"error {error:.3e} > {bound:.3e}")


def _same_values(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=0.5), b.nan_to_num(nan=0.5))


def tolerance(dtype: torch.dtype, truth: Tensor, by_torch: Tensor | None, extra: Rounding) -> float:
    """The largest error allowed: the rule of `tolerance.py`, with what rounds on the way."""
    top = magnitude(truth)
    try:
        theirs = 0.0 if by_torch is None else max_error(by_torch, truth)
    except AssertionError:  # PyTorch gives NaN where every key is masked
        theirs = 0.0
    return RATIO_TO_TORCH * theirs + rounding(dtype, max(top, extra.stored), max(top, extra.summed), extra.size)


def measure(actual: Tensor, truth: Tensor, by_torch: Tensor | None, of_bound: float) -> Errors:
    """Errors in units in the last place, and squares of errors relative to the truth's root mean square.

    The unit is the dtype's spacing at the true value, but no finer than at the root mean square of all: below
    that, cancellation decides how many digits there are, not the kernel.
    """
    rms = float(truth.square().mean().sqrt())
    floor = max(rms, torch.finfo(actual.dtype).tiny)
    unit = torch.exp2((torch.frexp(truth.abs().clamp(min=floor)).exponent - 1).double()) * torch.finfo(actual.dtype).eps

    def both(result: Tensor | None) -> tuple[float, float]:
        if result is None or not result.isfinite().all():
            return float("nan"), float("nan")
        difference = result.double() - truth
        return float((difference.abs() / unit).max()), float((difference / floor).square().sum())

    (ulp, squares), (torch_ulp, torch_squares) = both(actual), both(by_torch)
    return Errors(ulp, torch_ulp, squares, torch_squares, actual.numel(), of_bound)


def same_bits(a: Results, b: Results) -> str | None:
    """The first name whose bits differ."""
    for name in a:
        if a[name].shape != b[name].shape or not torch.equal(to_bytes(a[name]), to_bytes(b[name])):
            return name
    return None


def _repeatable(spec: Spec, backend: str, sample: Sample, truth: Truth) -> Iterator[Failure]:
    def run(tensors: Tensors, grads: tuple[Tensor, ...]) -> Results:
        with fastlm.backend(backend):
            copies = _copies(tensors, device=device_of(backend))
            return evaluate(spec.call, copies, sample, tuple(g.to(device_of(backend)) for g in grads))

    first = run(sample.tensors, truth.grads)
    if name := same_bits(first, run(sample.tensors, truth.grads)):
        yield Failure("repeat", f"{name}: two runs differ in their bits")
    if not spec.invariant:
        return
    if backend == "cpu":
        yield from _thread_counts(first, lambda: run(sample.tensors, truth.grads))
    rows = [name for name in sample.rows if sample.tensors.get(name) is not None]
    if rows and len(sample.tensors[rows[0]]) > 1:
        yield from _single_row(sample, rows, truth, first, run)


def _thread_counts(first: Results, run) -> Iterator[Failure]:
    before = torch.get_num_threads()
    for count in THREADS:
        with threads(count):
            again = run()
        if name := same_bits(first, again):
            yield Failure("threads", f"{name}: other bits with {count} threads than with {before}")


def _single_row(sample: Sample, rows: list[str], truth: Truth, first: Results, run) -> Iterator[Failure]:
    """One element of the batch alone has to give the bits that it gives among the others."""
    index = sample.seed % len(sample.tensors[rows[0]])
    part = slice(index, index + 1)
    tensors = {n: t[part] if t is not None and n in rows else t for n, t in sample.tensors.items()}
    alone = run(tensors, tuple(g[part] for g in truth.grads))
    names = [name for name in first if name.startswith("output") or name[1:] in rows]
    if name := same_bits({n: first[n][part] for n in names}, {n: alone[n] for n in names}):
        yield Failure("batch", f"{name}: row {index} has other bits alone than among the others")
