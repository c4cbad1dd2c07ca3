"""The loop of `fastlm verify`: random calls of every op on every backend, until time is up."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

import fastlm
from fastlm._core import dispatch as _dispatch
from fastlm._core import registry

from ..errors import BackendError, ConfigError
from .checks import Errors, check, device_of, threads
from .op import FLOATS, Sample, Spec

SPECS: dict[str, Spec] = {spec.name: spec for spec in registry.found(__package__, Spec)}
BACKENDS = ("cpu", "triton", "cuda", "torch", "reference")
FOREIGN = ("torch",)  # backends whose kernels are somebody else's

Finding = tuple[str, str, str, str, str]


@dataclass
class Row:
    """One line of the error table: the errors of an op on a backend in one dtype."""

    samples: int = 0
    ulp: float = 0.0
    torch_ulp: float = 0.0
    squares: float = 0.0
    torch_squares: float = 0.0
    count: int = 0
    of_bound: float = 0.0

    def add(self, errors: Iterable[Errors]) -> None:
        self.samples += 1
        for e in errors:
            self.ulp, self.of_bound = max(self.ulp, e.ulp), max(self.of_bound, e.of_bound)
            self.squares, self.count = self.squares + e.squares, self.count + e.count
            if not math.isnan(e.torch_ulp):
                self.torch_ulp, self.torch_squares = (
                    max(self.torch_ulp, e.torch_ulp),
                    self.torch_squares + e.torch_squares,
                )

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def torch_rms(self) -> float:
        return math.sqrt(self.torch_squares / self.count) if self.count else 0.0


@dataclass
class Report:
    """What a run found.

    Attributes:
        failures: (op, backend, kind, message, command that reproduces it).
        foreign: the same of PyTorch's own operators, which are compared as well but are not ours to mend.
        table: (op, backend, dtype) -> errors.
        absent: (op, backend) -> why it was not run.
    """

    failures: list[Finding] = field(default_factory=list)
    foreign: list[Finding] = field(default_factory=list)
    table: dict[tuple[str, str, str], Row] = field(default_factory=dict)
    absent: dict[tuple[str, str], str] = field(default_factory=dict)
    samples: int = 0


def select(ops: list[str], backends: list[str]) -> tuple[list[tuple[Spec, str]], dict[tuple[str, str], str]]:
    """(op, backend) pairs that can run here, and why each other one cannot.

    Raises:
        ConfigError: for an unknown op or backend; the message lists those there are.
    """
    for given, known, what in ((ops, SPECS, "op"), (backends, BACKENDS, "backend")):
        for name in given:
            if name not in known:
                raise ConfigError(f"{what} is {name!r}, expected one of {', '.join(known)}")
    pairs, absent = [], {}
    for name, backend in itertools.product(ops or SPECS, backends or BACKENDS):
        reason = unavailable(SPECS[name], backend, SPECS[name].draw(random.Random(0), torch.float32, True))
        if reason is None:
            pairs.append((SPECS[name], backend))
        else:
            absent[name, backend] = reason
    return pairs, absent


def unavailable(spec: Spec, backend: str, sample: Sample) -> str | None:
    """Why a backend cannot serve a sample here, or None."""
    if spec.name not in _dispatch.ops():
        return f"{spec.name} has no entry in the table of backends"
    try:
        explanation = explained(spec, backend, sample)
    except BackendError as error:
        return str(error)
    return None if explanation.selected == backend else explanation.reasons[backend]


def explained(spec: Spec, backend: str, sample: Sample) -> _dispatch.Explanation:
    """What `explain` says of a sample with this backend forced."""
    tensors = {n: None if t is None else t.to(device_of(backend)) for n, t in sample.tensors.items()}
    with fastlm.backend(backend):
        return fastlm.explain(spec.call, tensors, sample)


def _start(spec: Spec, seed: int) -> tuple[random.Random, str]:
    """What draws the rest of a seed's sample, and its dtype."""
    generator = random.Random(f"{spec.name} {seed}")
    return generator, generator.choice(list(FLOATS))


def draw(spec: Spec, seed: int) -> tuple[Sample, int]:
    """The sample that a seed stands for, and the seed of its memory layout."""
    generator, dtype = _start(spec, seed)
    return spec.draw(generator, FLOATS[dtype], generator.random() < 0.15), generator.getrandbits(31)


def seeds_of(spec: Spec, dtype: str) -> Iterator[int]:
    """The seeds that stand for samples in this dtype."""
    return (seed for seed in itertools.count() if _start(spec, seed)[1] == dtype)


def command_of(spec: Spec, backend: str, seed: int) -> str:
    """What repeats the check of a seed's sample."""
    return f"fastlm verify --op {spec.name} --backend {backend} --seed {seed} --samples 1"


def run(
    pairs: list[tuple[Spec, str]],
    seed: int,
    seconds: float,
    samples: int | None = None,
    progress: Callable[[Report, str], None] = lambda report, command: None,
) -> Report:
    """Check random calls of each pair in turn, until `seconds` have passed or `samples` rounds are done.

    Args:
        seed: the first round's; each further round takes the next.
        progress: told the report so far and the command of the sample that comes next.
    """
    report = Report()
    end = time.monotonic() + seconds
    with threads(1):  # the comparisons are too small for more; the calls under test set their own
        for turn, (spec, backend) in _turns(pairs):
            if (samples is None and time.monotonic() >= end) or turn == samples:
                break
            command = command_of(spec, backend, seed + turn)
            progress(report, command)
            sample, layout_seed = draw(spec, seed + turn)
            if unavailable(spec, backend, sample) is not None:  # a backend may lack a feature, and say so
                continue
            outcome = check(spec, backend, sample, layout_seed)
            report.samples += 1
            dtype = str(sample.dtype)[6:]
            report.table.setdefault((spec.name, backend, dtype), Row()).add(outcome.errors)
            found = report.foreign if backend in FOREIGN else report.failures
            found += [
                (spec.name, backend, failure.kind, f"{failure.message} ({sample.describe()})", command)
                for failure in outcome.failures
            ]
    return report


def _turns(pairs: list[tuple[Spec, str]]) -> Iterator[tuple[int, tuple[Spec, str]]]:
    return ((turn, pair) for turn in itertools.count() for pair in pairs) if pairs else iter(())
