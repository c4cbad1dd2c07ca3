"""Whether a submodule may be fused with its neighbours instead of being called."""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

from torch import nn

from .._core.dispatch import PLAIN_TENSORS
from .._core.torch_private import module_hooks as _hooks

Module = TypeVar("Module", bound=nn.Module)


def plain(module: Any, *types: type[Module]) -> TypeGuard[Module]:
    """Whether reading `module`'s parameters instead of calling it makes no difference that anybody could see.

    The one place that decides. False for

    - another class than one of `types`: a subclass, and what replaces a class, as parametrizations, FSDP, LoRA
      wrappers and quantized layers do;
    - hooks of any kind, the module's own or global;
    - a call that was redirected on the instance, as Accelerate's offloading, kernels of Hugging Face's hub and
      `module.compile()` do;
    - parameters of a tensor subclass: quantized, sharded, fake.

    A call takes 0.5 us.
    """
    cls = type(module)
    for known in types:
        if cls is known:
            break
    else:
        return False
    own = module.__dict__  # nn.Module's __getattr__ makes each attribute cost three times as much
    if (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or _hooks._global_forward_pre_hooks
        or _hooks._global_forward_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
        or "_call_impl" in own
        or ("forward" in own and redirected(module))
        or ("_compiled_call_impl" in own and redirected(module))
    ):
        return False
    for parameter in own["_parameters"].values():
        if type(parameter) not in PLAIN_TENSORS:
            return False
    return True


def redirected(module: nn.Module) -> bool:
    """Whether a call of `module` does not end in its class's forward: an attribute of the instance is in its way."""
    own = module.__dict__
    if "forward" in own and getattr(own["forward"], "__func__", None) is not type(module).forward:
        return True  # Accelerate leaves a bound method behind when it removes its hooks, which changes nothing
    return "_call_impl" in own or own.get("_compiled_call_impl") is not None
