"""Every benchmark by name; `fastlm bench` runs them in this order."""

from __future__ import annotations

import dataclasses

from fastlm._core import registry
from fastlm.errors import ConfigError

from .adamw import ADAMW
from .bert import BERT_BENCHMARK
from .case import DTYPES, PASSES, Benchmark, Case
from .generate import GENERATE
from .huggingface import HUGGING_FACE
from .kernel import KernelBenchmark
from .train import TRAIN

KERNELS: tuple[KernelBenchmark, ...] = tuple(registry.found(__package__, KernelBenchmark))
ENGINES: tuple[Benchmark, ...] = (ADAMW, TRAIN, BERT_BENCHMARK, GENERATE, HUGGING_FACE)
BENCHMARKS: dict[str, Benchmark] = {b.name: b for b in (*KERNELS, *ENGINES)}


def known(names: list[str], valid, what: str) -> list[str]:
    """`names`, or all that are valid if there are none.

    Raises:
        ConfigError: for a name that is not valid; the message lists those that are.
    """
    for name in names:
        if name not in valid:
            raise ConfigError(f"{what} is {name!r}, expected one of {', '.join(valid)}")
    return names or list(valid)


def select(
    op: str, device: str, dtypes: list[str], shapes: list[str], passes: list[str], quick: bool = False
) -> list[Case]:
    """The cases that a command line asks for.

    Args:
        op: names of benchmarks, separated by commas, or "all".
        dtypes, shapes, passes: restrict (dtypes, passes) or replace (shapes) those of the benchmark; empty keeps.

    Raises:
        ConfigError: for an unknown name, a shape that does not fit, or if no case is left.
    """
    names = known([name.strip() for name in op.split(",")], [*BENCHMARKS, "all"], "op")
    everything = "all" in names
    names = list(BENCHMARKS) if everything else names
    known(dtypes, DTYPES, "dtype")
    known(passes, PASSES, "pass")
    cases = [case for name in names for case in _cases(BENCHMARKS[name], device, dtypes, shapes, quick)]
    if everything:
        cases = [case for case in cases if not case.extra]
    if passes:
        # "full" replaces the passes of a case that has gradients at all; the others are taken where they exist.
        cases = [dataclasses.replace(case, passes=_passes(case, passes)) for case in cases]
        cases = [case for case in cases if case.passes]
    if not cases:
        raise ConfigError(f"{op} has no case of pass {', '.join(passes)} in {', '.join(dtypes)}")
    return cases


def _passes(case: Case, wanted: list[str]) -> tuple[str, ...]:
    possible = PASSES if case.passes not in (("fwd",), ("full",)) else case.passes
    return tuple(p for p in PASSES if p in wanted and p in possible)


def _cases(b: Benchmark, device: str, dtypes: list[str], shapes: list[str], quick: bool) -> list[Case]:
    cases = b.cases(device, quick)
    if shapes:
        first = cases[0]
        cases = [dataclasses.replace(first, shape=parse_shape(b, t), variant=b.variants[0], slow=True) for t in shapes]
        dtypes = dtypes or list(dict.fromkeys(case.dtype for case in b.cases(device, quick)))
    if not dtypes:
        return cases
    # A case may be slow in one of its dtypes only; it is one case all the same.
    slow: dict[Case, dict[str, bool]] = {}
    for case in cases:
        slow.setdefault(dataclasses.replace(case, dtype="", slow=False), {})[case.dtype] = case.slow
    return [
        dataclasses.replace(case, dtype=dtype, slow=known.get(dtype, any(known.values())))
        for case, known in slow.items()
        for dtype in dtypes
    ]


def parse_shape(b: Benchmark, text: str) -> tuple[int, ...]:
    """Extents from "4096x768".

    Raises:
        ConfigError: if they are not as many positive integers as the benchmark has dimensions.
    """
    parts = text.lower().split("x")
    if len(parts) != len(b.dims) or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ConfigError(f"shape is {text!r}, expected {'x'.join(b.dims)} for {b.name}, such as {_example(b)}")
    return tuple(int(p) for p in parts)


def _example(b: Benchmark) -> str:
    return "x".join(map(str, b.cases("cpu", True)[0].shape))
