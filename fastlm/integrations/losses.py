"""transformers' losses of language models on `fastlm.cross_entropy`, where nothing else can see what it works on.

In 16 bits these losses copy the logits to fp32 first. The copy is theirs alone: whatever a script does to the logits
afterwards, in place or by hooks, meets the logits and not what the backward pass reads. In fp32 there is no copy, and
PyTorch's own operator, which keeps its softmax instead of the logits, stays.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .._core.dispatch import must_trace
from ..ops.cross_entropy import cross_entropy

try:
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
except ImportError:  # an older transformers, whose models hold their losses themselves
    KNOWN: tuple[Any, ...] = ()
else:
    KNOWN = (ForCausalLMLoss, ForMaskedLMLoss)

_OWN = "_loss_function"  # of a model: where transformers keeps a loss that was set
_ARGUMENTS = {"ignore_index", "reduction", "label_smoothing", "weight"}


class _OnCopies(TorchFunctionMode):
    """Serves F.cross_entropy of anything that does not share the logits' memory by `fastlm.cross_entropy`."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and len(args) == 2 and kwargs.keys() <= _ARGUMENTS and self._is_copy(args[0]):
            return cross_entropy(*args, **kwargs)
        return func(*args, **kwargs)

    def _is_copy(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() != self.logits.untyped_storage().data_ptr()


def language_model_loss(original: Callable[..., Tensor], logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`original(logits, ...)`, one of `KNOWN`, with its cross-entropy on `fastlm.cross_entropy`."""
    if must_trace(logits):
        return original(logits, *args, **kwargs)
    with _OnCopies(logits):
        return original(logits, *args, **kwargs)


def switch(model: PreTrainedModel) -> bool:
    """Give `model` that loss, if it has one of `KNOWN` of its class and its forward asks for it."""
    if _OWN in model.__dict__ or not isinstance(getattr(type(model), "loss_function", None), property):
        return False
    forward = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if forward is None or "loss_function" not in forward.co_names or model.loss_function not in KNOWN:
        return False
    model.loss_function = functools.partial(language_model_loss, model.loss_function)
    return True


def restore(model: PreTrainedModel) -> None:
    """Undo `switch`; a loss that was set since then stays."""
    if getattr(model.__dict__.get(_OWN), "func", None) is language_model_loss:
        del model.__dict__[_OWN]
