"""Everything of torch that fastlm uses and torch does not document, in one place: each name, and what it is for.

Tried with the versions of torch in `fastlm.runtime.TRIED`. Where a name changes, `tests/_core/test_torch_private.py`
says which; what to do about it is decided here. No other file may name what torch keeps private, but for the attributes
of `MODULE_ATTRIBUTES`, which are read where they are needed since a function to do so would cost more than the reading.
"""

from __future__ import annotations

import functools
import sys
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

transforms_active = torch._C._are_functorch_transforms_active
"""() -> whether a torch.func transform (vmap, grad, jvp) is under way: its tensors have no memory for a kernel."""

_forward_ad = torch.autograd.forward_ad


def forward_mode() -> bool:
    """Whether torch.autograd.forward_ad.dual_level() is on: its tensors carry tangents, which no kernel moves along."""
    return _forward_ad._current_level >= 0


_FAKE = torch._C._TorchDispatchModeKey.FAKE
_mode_of = torch._C._get_dispatch_mode


def fake_mode() -> Any:
    """The FakeTensorMode that is on, or None: what is made there has no numbers for a kernel to write."""
    return _mode_of(_FAKE)


is_legacy_batch = torch._C._functorch.is_legacy_batchedtensor
"""(tensor) -> whether it stands for a batch of gradients, as in torch.autograd.grad(..., is_grads_batched=True)."""

version_of = Tensor._version.__get__  # type: ignore[attr-defined]
"""(tensor) -> how often it was edited in place: whether a copy made of it is still good."""

current_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""(device index) -> the address of its current CUDA stream; torch.cuda.current_stream() makes an object of it first.

None where torch is built without CUDA, as is `current_device`.
"""

current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
"""() -> the index of the current CUDA device, without the check that CUDA is initialised."""

module_hooks = torch.nn.modules.module
"""Holds the dictionaries of hooks that watch every module: the names of `GLOBAL_HOOKS`."""

WeightedLoss = torch.nn.modules.loss._WeightedLoss
"""The base of torch's losses with class weights: holds `reduction`, and `weight` as a buffer."""

GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)

MODULE_ATTRIBUTES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Dictionaries in the __dict__ of every module: nn.Module's __getattr__ takes 0.4 us for each parameter."""


@functools.cache
def has_pointwise_linear() -> bool:
    """Whether oneDNN multiplies in bf16 on this CPU, and this torch has `pointwise_linear`."""
    mkldnn = torch.ops.mkldnn
    return hasattr(mkldnn, "_linear_pointwise") and bool(mkldnn._is_mkldnn_bf16_supported())


def pointwise_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by oneDNN with the bias added inside the product, which F.linear does in a pass of its own in bf16."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def keep_compiled_buffers() -> None:
    """Let the backward pass of a function that is compiled from now on run more than once (retain_graph=True)."""
    import torch._functorch.config as config

    settings: Any = config
    settings.donated_buffer = False


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, functions and modules that torch.compile made run as they were written; nothing is compiled."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and to import it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def runs_compiled(traceback: TracebackType | None) -> bool:
    """Whether the calls that a traceback went through are compiled outside `uncompiled`."""
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals["__name__"] == "torch._dynamo.eval_frame":
            return True
        traceback = traceback.tb_next
    return False


def is_fake(tensor: Tensor | None) -> bool:
    """Whether it has no numbers, as in FakeTensorMode and while torch.export traces."""
    from torch._subclasses.fake_tensor import FakeTensor

    return type(tensor) is FakeTensor
