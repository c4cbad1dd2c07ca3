"""What there is to prove: every kernel in every dtype, for each class of features that the choice of backends sees."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

import fastlm
from fastlm._core import proofs, registry
from fastlm.benchmarks.case import Case
from fastlm.benchmarks.kernel import KernelBenchmark
from fastlm.benchmarks.registry import KERNELS

from ..errors import BackendError, ConfigError
from ..verify.fuzz import SPECS
from .devices import Device

TILES = proofs.TILES
ANY = "any"  # in place of a class of features: calls of all
FEW = 3  # a group of heads that share a key
SEEDS = 120  # random calls that show which classes of features an op has


@dataclass(frozen=True)
class Job:
    """One entry of a proof to be made.

    Attributes:
        features: a class of features, as `proofs.feature_class` names them.
        cases: what to time.
    """

    op: str
    backend: str
    dtype: str
    features: str
    cases: tuple[Case, ...] = ()

    @property
    def name(self) -> tuple[str, str, str, str]:
        return self.op, self.backend, self.dtype, self.features

    def describe(self) -> str:
        features = "" if self.features == "plain" else f", {self.features}"
        return f"{self.op} on {self.backend}, {self.dtype}{features}"

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Job:
        cases = tuple(
            Case(**{**case, "shape": tuple(case["shape"]), "passes": tuple(case["passes"])}) for case in given["cases"]
        )
        return cls(**{**given, "cases": cases})


def kernels(names: list[str], backends: Iterable[str]) -> list[tuple[str, str]]:
    """(op, backend) of the kernels for GPUs of these ops, or of all.

    Raises:
        ConfigError: for an unknown op, or one without such a kernel.
    """
    found = [(op.name, backend) for op in registry.ops() for backend in backends if op.backend(backend)]
    known = list(dict.fromkeys(op for op, _ in found))
    for name in names:
        if name not in known:
            raise ConfigError(f"ops is {name!r}, expected some of {', '.join(known)}")
    return [(op, backend) for op, backend in found if not names or op in names]


def plan(names: list[str], device: Device) -> list[Job]:
    """The jobs of these ops, or of all: plain calls before those with features, the commonest dtype first."""
    found = []
    classes: dict[str, tuple[str, ...]] = {}
    timed = timed_cases(device)
    pairs = [pair for pair in kernels(names, device.backends) if absent(*pair, device) is None]
    for op, backend in pairs:
        if op not in classes:
            classes[op] = feature_classes(op)
        for dtype in device.dtypes:
            for features in classes[op]:
                cases = tuple(dataclasses.replace(case, dtype=dtype) for case in timed.get((op, features), ()))
                found.append(Job(op, backend, dtype, features, cases))
    found += [_search(op, device, timed) for op, backend in pairs if backend == "triton"]
    order = {dtype: number for number, dtype in enumerate(device.dtypes)}
    found = [job for job in found if job.features != TILES or job.cases]
    return sorted(found, key=lambda job: (_turn(job.features), order[job.dtype], job.features == "several"))


def absent(op: str, backend: str, device: Device) -> str | None:
    """Why a kernel cannot run on a device at all, such as an extension that is not built; None where it can."""
    if device.torch_device != "cuda":
        return None
    known = registry.get(op)
    row = known.backend(backend)
    assert row is not None
    request = fastlm.explain(known.function, **known.samples("meta", torch.float16)[0]).request
    return row.unsupported(request._replace(device="cuda", gpu=device.index))


def _turn(features: str) -> int:
    return {"plain": 0, TILES: 2}.get(features, 1)


def _search(op: str, device: Device, timed: dict[tuple[str, str], list[Case]]) -> Job:
    """The search for an op's tiles, at one case of each form and width."""
    cases: dict[tuple, Case] = {}
    for case in timed.get((op, "plain"), []):
        cases.setdefault((case.variant, case.shape[-1]), dataclasses.replace(case, dtype=device.dtypes[0]))
    return Job(op, "triton", device.dtypes[0], TILES, tuple(cases.values()))


def feature_classes(op: str) -> tuple[str, ...]:
    """Those of an op's random calls that kernels serve, the plain one first."""
    spec, seen = SPECS[op], {"plain"}
    for seed in range(SEEDS):
        sample = spec.draw(random.Random(seed), torch.float32, False)
        request = fastlm.explain(spec.call, sample.tensors, sample).request
        if not request.features:
            break
        seen.add(proofs.feature_class(request.features))
    return tuple(sorted(seen, key=lambda name: (name != "plain", name == "several", name)))


def timed_cases(device: Device) -> dict[tuple[str, str], list[Case]]:
    """(op, class of features) -> the shapes to time, without dtype."""
    found: dict[tuple[str, str], list[Case]] = {}
    for benchmark in KERNELS:
        for case in distinct(benchmark.cases("cuda", False), device.largest):
            reached = reached_by(benchmark, case)
            if reached is not None:
                found.setdefault(reached, []).append(case)
    return found


def distinct(cases: list[Case], largest: int | None) -> list[Case]:
    """The cases without dtypes and headlines, their extents cut, each once."""
    plain = [
        dataclasses.replace(case, shape=_cut(case.shape, largest), dtype="float32", headline=False, slow=False)
        for case in cases
    ]
    return list(dict.fromkeys(plain))


def _cut(shape: tuple[int, ...], largest: int | None) -> tuple[int, ...]:
    """A shape with extents up to `largest`; of sequences and heads, which come first of four, a few."""
    if largest is None:
        return shape
    first, rest = (shape[:2], shape[2:]) if len(shape) == 4 else ((), shape)
    return (*(min(n, FEW) for n in first), *(min(n, largest) for n in rest))


def reached_by(benchmark: KernelBenchmark, case: Case) -> tuple[str, str] | None:
    """(op, class of features) that a case calls; None where it reaches no op of kernels."""
    try:
        with torch.no_grad():
            told = fastlm.explain(benchmark.ours(case), *benchmark.inputs(case, "meta").tensors)
    except BackendError:
        return None
    return told.op, proofs.feature_class(told.request.features)
