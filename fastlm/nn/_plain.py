"""Whether a submodule may be fused with its neighbours instead of being called."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def plain(module: nn.Module, *types: type[Module]) -> TypeGuard[Module]:
    """Whether calling `module` is calling the forward of one of `types`, with no hook that would notice."""
    hooks = nn.modules.module
    return type(module) in types and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )
