"""AdamW and gradient clipping over all parameters at once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._core.dispatch import PLAIN_TENSORS
from .._core.torch_private import version_of
from ..backends import cpu as _native
from ..backends.cpu import adamw as _kernels
from ..ops._shadow import copy_of

CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ adds to the norm
PLAIN = ("amsgrad", "capturable", "differentiable")  # options that only PyTorch's own step serves
GRAD_DTYPES = {torch.float32: (torch.float32, torch.bfloat16), torch.bfloat16: (torch.bfloat16,)}


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose step clips, updates and rounds to bf16 in one pass over the parameters.

    Arguments, parameter groups and state dicts are those of `torch.optim.AdamW`. On a CPU, parameters in float32
    (with gradients in float32 or bfloat16) or in bfloat16 take one kernel for all of them. Any other takes PyTorch's
    step, as those of tensor subclasses do: shards of FSDP2, quantized tensors. A bf16 copy that a parameter carries
    (`fastlm.ops._shadow.attach_copy`) is refreshed as it goes.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients together, the same bits for any number of threads; 0 without any."""
        fused, others = self._split()
        # In the parameter's dtype: PyTorch rounds the norm of a bf16 gradient to bf16.
        norms = [_total_norm([p.grad.to(p.dtype) for p in parameters]) for parameters in others]
        if fused:
            norms.append(math.sqrt(_kernels.gradient_square_sum([p.grad.contiguous() for _, p in fused])))
        return math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, max_norm: float | None = None, norm: float | None = None
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss, which the step then returns.
            max_norm: scale the gradients as if `torch.nn.utils.clip_grad_norm_` had been called with it; those of
                the kernel are scaled on their way into the update, and `grad` keeps its values.
            norm: `gradient_norm()`, where the caller has it already.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = 1.0
        if max_norm is not None:
            norm = self.gradient_norm() if norm is None else norm
            scale = min(1.0, max_norm / (norm + CLIP_EPS)) if not math.isnan(norm) else math.nan
        fused, others = self._split()
        if fused:
            self._fused_step(fused, scale)
        for parameters in others:
            with _cast_gradients(parameters):
                if max_norm is not None and norm is not None:
                    nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm, dtype=torch.float64))
                self._torch_step(parameters)
        return loss

    def _split(self) -> tuple[list[tuple[dict[str, Any], Any]], list[list[Any]]]:
        """((group, parameter) of the kernel, other parameters in lists of one kind); all of them with gradients."""
        kernel = _native.missing_reason is None and getattr(self, "found_inf", None) is None
        fused: list[tuple[dict[str, Any], Any]] = []
        others: dict[Any, list[Any]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if kernel and _fused_takes(group, p) and _lies_like(self.state.get(p), p):
                    fused.append((group, p))
                else:
                    others.setdefault(_kind(p), []).append(p)
        return fused, list(others.values())

    def _torch_step(self, parameters: list[Tensor]) -> None:
        """PyTorch's step of these parameters alone, without the hooks of a step, which are called around ours."""
        step: Any = torch.optim.AdamW.step
        while getattr(step, "hooked", False):
            step = step.__wrapped__
        self._served = {id(p) for p in parameters}
        try:
            step(self)
        finally:
            self._served = None

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        if self._served is not None:
            group = {**group, "params": [p for p in group["params"] if id(p) in self._served]}
        return super()._init_group(group, *lists)

    _served: set[int] | None = None  # ids of the parameters that PyTorch's step is called for

    def _fused_step(self, parameters: list[tuple[dict[str, Any], Any]], scale: float) -> None:
        rows = [self._row(group, p, scale) for group, p in parameters]
        _kernels.adamw_update(rows)
        for p, *_, copy, _ in rows:
            torch.autograd.graph.increment_version(p)
            if copy is not None:
                torch.autograd.graph.increment_version(copy)
                p.fastlm_copy.version = version_of(p)  # type: ignore[attr-defined]

    def _row(self, group: dict[str, Any], p: Tensor, scale: float) -> _kernels.AdamWRow:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        copy = copy_of(p)
        scalars = _scalars(group, float(state["step"]), scale)
        return p, p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], copy, scalars


@contextlib.contextmanager
def _cast_gradients(parameters: list[Tensor]) -> Iterator[None]:
    """Cast gradients to their parameters' dtypes for a while: PyTorch's step takes no bf16 gradient of an fp32 one."""
    cast = [(p, p.grad, p.grad_dtype) for p in parameters if p.grad is not None and p.grad.dtype != p.dtype]
    try:
        for p, grad, _ in cast:
            p.grad_dtype = None
            p.grad = grad.to(p.dtype)
        yield
    finally:
        for p, grad, dtype in cast:
            p.grad = grad
            p.grad_dtype = dtype


def _fused_takes(group: dict[str, Any], p: Tensor) -> bool:
    grad = p.grad
    return (
        grad is not None
        and type(p) in PLAIN_TENSORS
        and type(grad) in PLAIN_TENSORS
        and p.device.type == "cpu"
        and p.is_contiguous()
        and grad.layout == torch.strided
        and grad.dtype in GRAD_DTYPES.get(p.dtype, ())
        and not any(group[name] for name in PLAIN)
    )


def _lies_like(state: dict[str, Any] | None, p: Tensor) -> bool:
    """Whether the moments, if there are any, are laid out as the parameter is; a loaded state may be of another.

    So may that of a parameter whose `data` has been replaced since. PyTorch's step takes both, or raises.
    """
    if not state:
        return True
    m, v = state["exp_avg"], state["exp_avg_sq"]
    if not (m.is_contiguous() and v.is_contiguous() and m.is_cpu and v.is_cpu):
        return False
    return m.dtype is p.dtype is v.dtype and m.shape == p.shape == v.shape


def _kind(p: Tensor) -> tuple[Any, ...]:
    """Equal for parameters that one of PyTorch's operators over lists takes together."""
    if type(p) in PLAIN_TENSORS and type(p.grad) in PLAIN_TENSORS:
        return ()
    return type(p), type(p.grad), getattr(p, "device_mesh", None)


def _total_norm(grads: list[Tensor]) -> float:
    norm = nn.utils.get_total_norm(grads)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of shards: of all of them


def _scalars(group: dict[str, Any], step: float, scale: float) -> _kernels.AdamWScalars:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    return _kernels.AdamWScalars(
        grad_scale=-scale if group["maximize"] else scale,
        decay=1 - lr * group["weight_decay"],
        beta1=float(beta1),
        beta2=float(beta2),
        step_size=lr / (1 - beta1**step),
        sqrt_factor=1 / math.sqrt(1 - beta2**step),
        eps=group["eps"],
    )
