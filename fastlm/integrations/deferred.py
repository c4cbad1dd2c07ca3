"""Logits that are made when something reads them: cross-entropy on them runs with the output layer in one pass.

In training a language model's logits usually meet nothing but a loss. `DeferredLogits` stands for linear(hidden,
weight, bias), follows the reshapes and casts that lead to torch.nn.functional.cross_entropy, and hands that to
`fastlm.linear_cross_entropy`. Anything else that is asked of it makes the logits, with their gradient, and asks them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.dispatch import must_trace
from ..nn._plain import plain
from ..ops.linear_cross_entropy import linear_cross_entropy

SMALLEST = 4096  # classes; below, the logits are no burden
# The share of the logits that may be held at once. Holding less than all costs a fourth matrix product, which a CPU
# feels and memory seldom asks for: nothing but the logits themselves, instead of them and their gradient, is held.
HELD = {"cpu": 1.0}


class DeferredLogits(Tensor):
    """linear(hidden, weight, bias) that does not exist yet; `hidden` is (..., H), the logits (..., C)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    made: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> DeferredLogits:
        shape = (*hidden.shape[:-1], weight.shape[0])
        logits = Tensor._make_wrapper_subclass(
            DeferredLogits, shape, dtype=dtype, device=hidden.device, requires_grad=True
        )
        logits.hidden, logits.weight, logits.bias, logits.made = hidden, weight, bias, None
        return logits

    def make(self) -> Tensor:
        """The logits, made once."""
        if self.made is None:
            with torch.enable_grad():
                self.made = F.linear(self.hidden, self.weight, self.bias).to(self.dtype)
        return self.made

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _READ_ONLY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        follow = _FOLLOWED.get(func)
        result = follow(*args, **kwargs) if follow is not None and isinstance(args[0], DeferredLogits) else None
        if result is not None:
            return result
        args, kwargs = torch.utils._pytree.tree_map(_made, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        args, kwargs = torch.utils._pytree.tree_map(_made, (args, kwargs or {}))
        return func(*args, **kwargs)


def _made(x: Any) -> Any:
    return x.make() if isinstance(x, DeferredLogits) else x


def _view(logits: DeferredLogits, *shape: Any) -> DeferredLogits | None:
    """A reshape of the leading dimensions."""
    sizes = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], (int, torch.dtype)) else list(shape)
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    if sizes[-1] not in (-1, logits.shape[-1]) or (sizes[-1] == -1 and -1 in sizes[:-1]):
        return None
    if sizes[-1] == -1 and torch.Size(sizes[:-1]).numel() * logits.shape[-1] != logits.numel():
        return None
    hidden = logits.hidden.reshape(*sizes[:-1], logits.hidden.shape[-1])
    return DeferredLogits.of(hidden, logits.weight, logits.bias, logits.dtype)


def _to(logits: DeferredLogits, *args: Any, **kwargs: Any) -> DeferredLogits | None:
    """A cast to float32, or a move to where it is."""
    if kwargs or len(args) != 1:
        return None
    device = args[0] if isinstance(args[0], (torch.device, str)) else None
    dtype = args[0] if isinstance(args[0], torch.dtype) else logits.dtype
    if (device is None and not isinstance(args[0], torch.dtype)) or dtype not in (logits.dtype, torch.float32):
        return None
    if device is not None and torch.device(device) != logits.device:
        return None
    return DeferredLogits.of(logits.hidden, logits.weight, logits.bias, dtype)


def _slice(logits: DeferredLogits, index: Any) -> DeferredLogits | None:
    """logits[..., a:b, :] and the like, which keep every class."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is Ellipsis or isinstance(i, slice) for i in index) or logits.dim() < 2:
        return None
    covers_last = index.count(Ellipsis) == 1 or len(index) == logits.dim()
    last = index[-1] if covers_last and index[-1] is not Ellipsis else slice(None)
    if last != slice(None):
        return None
    return DeferredLogits.of(logits.hidden[index], logits.weight, logits.bias, logits.dtype)


def _cross_entropy(
    input: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    if input.made is not None or isinstance(target, DeferredLogits) or target.is_floating_point() or input.dim() > 2:
        return None
    if size_average is not None or reduce is not None:
        return None
    hidden = input.hidden
    # Logits that were cast to float32 give a float32 loss, which autocast to their own dtype does too.
    wide = input.dtype == torch.float32 and hidden.dtype in (torch.bfloat16, torch.float16)
    autocast = torch.is_autocast_enabled(hidden.device.type)
    with torch.autocast(hidden.device.type, hidden.dtype if wide else None, enabled=wide or autocast):
        return linear_cross_entropy(
            hidden, input.weight, target, input.bias, ignore_index, reduction, label_smoothing, weight,
            memory=HELD.get(hidden.device.type, 0.1),
        )  # fmt: skip


# torch's names of the functions that DeferredLogits follows; each gives None for a call that it does not.
_FOLLOWED: dict[Callable, Callable] = {
    Tensor.view: _view,
    Tensor.reshape: _view,
    Tensor.contiguous: lambda logits: logits,
    Tensor.float: lambda logits: _to(logits, torch.float32),
    Tensor.to: _to,
    Tensor.__getitem__: _slice,
    F.cross_entropy: _cross_entropy,
}
# What the stand-in knows itself.
_ATTRIBUTES = ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "layout", "is_cuda", "is_cpu")
_READ_ONLY: set[Any] = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES}
_READ_ONLY |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}


def deferred_forward(original: Any) -> Callable[..., Tensor]:
    """The forward of a model's output layer that defers its logits in training."""

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        if (
            not (self.training and torch.is_grad_enabled())
            or self.out_features < SMALLEST
            or must_trace(input, self.weight, self.bias)
            or not (input.requires_grad or self.weight.requires_grad)
            or not plain(self, type(self))
        ):
            return original.forward(self, input)
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        return DeferredLogits.of(input, self.weight, self.bias, dtype)

    return forward
