"""What a benchmark is: cases, passes, providers, and what one provider built for one case."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

PASSES = ("fwd", "bwd", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Unavailable(Exception):
    """A provider cannot run a case; the message says why."""


@dataclass(frozen=True)
class Case:
    """One op at one shape, in one dtype.

    Attributes:
        op: name of the benchmark.
        shape: extents in the order of the benchmark's dimensions.
        variant: which form of the op, such as "tanh" or "causal".
        passes: what is timed: "fwd" without gradients, "bwd" alone, "full" for both.
        headline: whether it is measured with every allocator.
        slow: whether the providers that take long to build or to run, such as torch.compile, run it too.
        extra: whether it runs only if its benchmark is asked for by name, not under "all".
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    variant: str = ""
    passes: tuple[str, ...] = PASSES
    headline: bool = False
    slow: bool = False
    extra: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def describe(self) -> str:
        return " ".join(filter(None, (self.op, self.variant, "x".join(map(str, self.shape)), self.dtype)))


class Counts(NamedTuple):
    """Strict work of one pass: each input read once, each output written once; useful FLOPs only.

    Attributes:
        bytes: what has to cross the memory bus at least.
        flops: multiplications and additions of the definition; a causal mask counts its half only.
        gemm_dtype: the dtype of the matrix products, whose rate is the roof; None where there are none.
        reads_only: whether next to nothing is written, so that the rate of reading is the roof.
    """

    bytes: int
    flops: int
    gemm_dtype: str | None = None
    reads_only: bool = False

    @classmethod
    def of(cls, which: str, forward: Counts, backward: Counts) -> Counts:
        """Those of the pass "fwd" or "bwd", or of "full", which is both."""
        if which == "full":
            return cls(forward.bytes + backward.bytes, forward.flops + backward.flops, forward.gemm_dtype)
        return forward if which == "fwd" else backward


@dataclass
class Built:
    """A case made ready by one provider.

    Attributes:
        run: pass -> the callable to time.
        results: outputs and gradients by name, to be compared with the truth; empty if there is no telling.
        label: what served the call, such as a backend and an instruction set.
        timed: False for a provider that is only checked (a GPU kernel under an interpreter).
    """

    run: dict[str, Callable[[], Any]]
    results: dict[str, Tensor] = field(default_factory=dict)
    label: str = ""
    timed: bool = True


class Session(Protocol):
    """One case with its inputs and its truth, from which providers are built."""

    case: Case
    truth: dict[str, Tensor]
    counts_state: bool
    """whether peak memory includes what building a provider allocates (a model and its optimizer)"""
    terms: int
    """terms in the longest sum behind an element of a result"""

    def providers(self) -> Iterable[str]: ...

    def build(self, provider: str) -> Built: ...

    def counts(self, which: str) -> Counts: ...


class Benchmark(Protocol):
    """An op or a part of the engine that can be timed."""

    @property
    def name(self) -> str: ...

    @property
    def dims(self) -> tuple[str, ...]: ...

    @property
    def variants(self) -> tuple[str, ...]: ...

    def cases(self, device: str, quick: bool) -> list[Case]: ...

    def session(self, case: Case, device: str) -> Session: ...

    def providers(self) -> tuple[str, ...]: ...
