"""Keeping time: interleaved rounds, so that a machine that speeds up or slows down does so for everyone.

On a CPU: the monotonic clock around as many calls as fill `SAMPLE_SECONDS`. On a GPU: CUDA events around one
call, after a write that evicts the L2 cache; a call too short for its launches is captured in a CUDA graph and
replayed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SAMPLE_SECONDS = 1e-3  # the clock resolves 50 ns, and a call costs 100 ns: 0.01 % of this
GRAPH_SECONDS = 2e-4  # below it, launches of a few us each would be a part of the time
WARM_UP_CALLS = 2
WARM_UP_SECONDS = 0.5  # after a call of this length a second one would only cost time
LONG_SECONDS = 2.0  # a call of this length has been run for its peak memory, and needs no more before it is timed
MIN_ROUNDS, MAX_ROUNDS = 5, 50
L2_FLUSH_BYTES = 512 * 2**20  # an H200's L2 is 50 MiB, a B200's 126 MiB


@dataclass(frozen=True)
class Timing:
    """Seconds a call over the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, fraction: float) -> float:
        """Nearest-rank quantile, so that few rounds do not extrapolate."""
        ordered = sorted(self.samples)
        return ordered[min(round(fraction * (len(ordered) - 1)), len(ordered) - 1)]


class Clock(Protocol):
    def prepare(self, run: Callable[[], Any], known: float = 0.0) -> Callable[[], float]:
        """Warm `run` up and return a function that takes one sample: seconds a call.

        Args:
            known: what a call took that has been made before, in seconds.
        """
        ...


class CpuClock:
    def prepare(self, run: Callable[[], Any], known: float = 0.0) -> Callable[[], float]:
        if known > LONG_SECONDS:
            return lambda: _seconds(run, 1)
        estimate = _seconds(run, 1)
        if estimate < WARM_UP_SECONDS:
            estimate = _seconds(run, 1)
        calls = max(1, int(SAMPLE_SECONDS / max(estimate, 1e-9)))
        return lambda: _seconds(run, calls) / calls


def _seconds(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


class CudaClock:
    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def prepare(self, run: Callable[[], Any], known: float = 0.0) -> Callable[[], float]:
        for _ in range(WARM_UP_CALLS):
            estimate = self._sample(run)
        if estimate < GRAPH_SECONDS:
            run = self._graph(run)
            self._sample(run)
        return lambda: self._sample(run)

    def _sample(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3

    def _graph(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A replay of `run`, or `run` itself where it cannot be captured (it synchronizes, say)."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return run
        return graph.replay


def clock(device: str) -> Clock:
    return CudaClock(torch.device(device)) if device.startswith("cuda") else CpuClock()


def interleave(samplers: dict[str, Callable[[], float]], seconds: float) -> dict[str, Timing]:
    """Sample every provider in turn, each round starting with another one.

    Args:
        samplers: provider -> function that takes one sample.
        seconds: stop after the round in which this has passed; never before `MIN_ROUNDS`, except that the
            minimum is 3 where a round alone takes longer than this.

    Returns:
        provider -> its timing.
    """
    names = list(samplers)
    taken: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(MAX_ROUNDS if names else 0):
        elapsed = time.perf_counter() - start
        least = 3 if turn and elapsed / turn > seconds else MIN_ROUNDS
        if turn >= least and elapsed >= seconds:
            break
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            taken[name].append(samplers[name]())
    return {name: Timing(tuple(samples)) for name, samples in taken.items()}
