"""The projection of linear_cross_entropy, made and differentiated in windows of classes.

Each window is (rows, classes), so that the weight's gradient is one product a window, complete and rounded once. A
first sweep folds the windows into every row's maximum and sum; a second one turns each into its gradient and multiplies
it out. Between the sweeps logits wait in the memory of the weight's gradient, which is written at the end only:
of M rows of width H it has room for H / M of them. Those that find room neither there nor in a spare window are made
again, so the cost is about 4 - H / M products of rows x classes x width, at least 3, where holding all logits costs 3.
Where no gradient of the weight is made in the same call, only the last window is still there.

1024 x 768 x 50257 in bf16: products of 1024 rows of tokens by windows of classes run at the rate of large ones, while
rows of tokens in chunks, with the weight's gradient added up over them, took twice the time: each chunk reads and
writes that gradient whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import cpu as _native
from . import _thresholds
from ._gemm import add_product, leads, multiply
from .cross_entropy import Options, Scalar


class Grads(NamedTuple):
    """Gradients of hidden, weight and bias; None where one is not wanted."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class Projection:
    """The projection of counted rows onto the classes, window by window.

    Args:
        kernels: the backend's cross_entropy functions.
        tensors: (hidden, weight, bias, target, class_weight), contiguous.
        memory: share of the full logits to hold beside the outputs.
        hold: whether `gradients`, for the weight's too, will follow `loss`: logits then wait in its memory.
    """

    def __init__(self, kernels, tensors, options: Options, memory: float, hold: bool = False):
        hidden, weight, bias, target, class_weight = tensors
        self.kernels, self.options = kernels, options
        self.weight, self.bias, self.class_weight = weight, bias, class_weight
        self.M, self.C = hidden.shape[0], weight.shape[0]
        self.count = kernels.cross_entropy_targets(target, class_weight, self.C, options.ignore_index)
        self.kept = self._counted(target)
        self.hidden, self.target = self._gather(hidden), self._gather(target)
        self.rows = self.hidden.shape[0]
        allowed = self._allowed(memory, hold)
        size = self._window_size(allowed) if hold else allowed
        self.windows = self._windows(size)
        self.scratch = hidden.new_empty(self.rows * max(n for _, n in self.windows))
        self.dweight = torch.empty_like(weight) if hold else None
        # First class of a window -> where its logits wait for the second sweep; and those that do so now.
        last = self.windows[-1]
        self.places = {last[0]: self._scratch(last[1])} if self.dweight is None else self._places(allowed - size)
        self.waiting: set[int] = set()

    def _counted(self, target: Tensor) -> Tensor | None:
        """The counted rows where gathering them pays for the copies; a GPU would have to be waited for."""
        if isinstance(self.count, Tensor):
            return None
        kept = (target != self.options.ignore_index).nonzero().squeeze(1)
        return kept if kept.numel() < (1 - _thresholds.IGNORED_SHARE) * self.M else None

    def _allowed(self, memory: float, hold: bool) -> int:
        """Blocks of classes whose logits fit within `memory` times the full logits' size; at least one.

        Where the gradient of hidden is summed in a wider dtype, that sum counts too, and unless our products add to it
        one of its size.
        """
        block, size = self.kernels.CROSS_ENTROPY_BLOCK, self.hidden.element_size()
        wide = _native.compute_dtype(self.hidden.dtype).itemsize
        ours = self.hidden.is_cpu and leads(self.hidden.dtype)
        summed = self.hidden.numel() * (wide + (0 if ours else size)) / size if hold and wide > size else 0.0
        share = min((memory * self.M * self.C - summed) / max(self.rows * self.C, 1), 1.0)
        return -(-self.C // block) if share == 1 else max(1, int(share * self.C) // block)

    def _window_size(self, allowed: int) -> int:
        """Blocks to a window where logits wait: products run at full rate, the rest of the memory is for waiting."""
        full_rate = _thresholds.FULL_RATE // max(self.rows * self.kernels.CROSS_ENTROPY_BLOCK, 1)
        return max(1, min(full_rate, -(-allowed // 3)))

    def _windows(self, size: int) -> list[tuple[int, int]]:
        """(first class, number): `size` whole blocks of the kernels each.

        The first window is the short one, since the last one may not be made twice.
        """
        block = self.kernels.CROSS_ENTROPY_BLOCK
        blocks = -(-self.C // block)
        starts = sorted(max(0, b) * block for b in range(blocks - size, -size, -size))
        return [(a, b - a) for a, b in zip(starts, [*starts[1:], self.C], strict=True)]

    def _places(self, spare_blocks: int) -> dict[int, Tensor]:
        """Room for windows: in the weight's gradient while it lasts, then in a spare buffer.

        In the former, a window begins behind the gradients of all earlier classes, so each of these may be written as
        soon as its own window has been read.
        """
        assert self.dweight is not None
        store, stride = self.dweight.view(-1), max(self.rows, self.weight.shape[1])
        spare = self.hidden.new_empty(self.rows * spare_blocks * self.kernels.CROSS_ENTROPY_BLOCK)
        places, taken = {}, 0
        for first, n in self.windows:
            start, size = stride * first, self.rows * n
            if start + size <= store.numel():
                places[first] = store[start : start + size].view(self.rows, n)
            elif taken + size <= spare.numel():
                places[first] = spare[taken : taken + size].view(self.rows, n)
                taken += size
        return places

    def _scratch(self, n: int) -> Tensor:
        return self.scratch[: self.rows * n].view(self.rows, n)

    def _logits(self, first: int, n: int) -> Tensor:
        """(rows, n): the window that begins at class `first`, from where it waits, or made."""
        out = self.places.get(first)
        if out is None or first not in self.waiting:
            out = self._scratch(n) if out is None else out
            window = slice(first, first + n)
            bias = None if self.bias is None else self.bias[window]
            multiply(self.hidden, self.weight[window].t(), bias, out)
        return out

    def loss(self) -> tuple[Tensor, Tensor]:
        """(loss (M,), stats (M, 3)), zeros where ignored."""
        smoothing = self.options.label_smoothing
        compute = _native.compute_dtype(self.hidden.dtype)
        states = self.hidden.new_empty(self.rows, 5, dtype=compute)
        for first, n in self.windows:
            self.kernels.cross_entropy_update(
                self._logits(first, n), self.target, self.class_weight, states, first, self.C,
                self.options.ignore_index, smoothing,
            )  # fmt: skip
        self.waiting = set(self.places)
        loss, stats = self.kernels.cross_entropy_finish(
            states, self.target, self.class_weight, self.C, self.options.ignore_index, smoothing
        )
        return self._spread(loss), self._spread(stats)

    def gradients(self, stats: Tensor, scale: Scalar, wanted: Sequence[bool]) -> Grads:
        """Gradients of the inputs where row i of the loss receives `scale`, or scale[i]."""
        stats = self._gather(stats)
        scale = self._gather(scale) if isinstance(scale, Tensor) else scale
        dhidden = torch.zeros_like(self.hidden, dtype=stats.dtype) if wanted[0] else None
        dweight = self.dweight
        if dweight is None and wanted[1]:
            dweight = torch.empty_like(self.weight)
        dbias = torch.empty_like(self.bias) if wanted[2] and self.bias is not None else None
        # Upwards where earlier windows must make room for gradients; else the last one first, which is still there.
        for first, n in self.windows if self.dweight is not None else reversed(self.windows):
            logits, d = self._logits(first, n), self._scratch(n)
            self.waiting.discard(first)
            self.kernels.cross_entropy_bwd(
                logits, self.target, self.class_weight, stats, scale,
                self.options.ignore_index, self.options.label_smoothing, d, first, self.C,
            )  # fmt: skip
            window = slice(first, first + n)
            if dhidden is not None:
                add_product(dhidden, d, self.weight[window])
            if dweight is not None:
                multiply(d.t(), self.hidden, out=dweight[window])
            if dbias is not None:
                torch.sum(d, 0, out=dbias[window])
        return Grads(None if dhidden is None else self._spread(dhidden.to(self.hidden.dtype)), dweight, dbias)

    def _gather(self, rows: Tensor) -> Tensor:
        return rows if self.kept is None else rows.index_select(0, self.kept)

    def _spread(self, rows: Tensor) -> Tensor:
        """Rows that are held -> all M, zeros where ignored."""
        if self.kept is None:
            return rows
        return rows.new_zeros(self.M, *rows.shape[1:]).index_copy_(0, self.kept, rows)
