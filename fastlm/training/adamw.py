"""AdamW and gradient clipping over all parameters at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import cpu as _native
from ..ops._products import copy_of

CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ adds to the norm
PLAIN = ("amsgrad", "capturable", "differentiable")  # options that only PyTorch's own step serves
GRAD_DTYPES = {torch.float32: (torch.float32, torch.bfloat16), torch.bfloat16: (torch.bfloat16,)}


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose step clips, updates and rounds to bf16 in one pass over the parameters.

    Arguments, parameter groups and state dicts are those of `torch.optim.AdamW`. On a CPU, parameters in float32
    (with gradients in float32 or bfloat16) or in bfloat16 take one kernel for all of them; anything else takes
    PyTorch's step. A bf16 copy that a parameter carries (`fastlm.ops._products.attach_copy`) is refreshed as it goes.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients together, the same bits for any number of threads; 0 without any."""
        grads = [p.grad for _, p in self._with_gradients() if p.grad is not None]
        if self._fused_serves():
            return math.sqrt(_native.gradient_square_sum([g.contiguous() for g in grads]))
        return float(nn.utils.get_total_norm(grads))

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
        if self._fused_serves():
            self._fused_step(scale)
        else:
            if max_norm is not None and norm is not None:
                parameters = [p for _, p in self._with_gradients()]
                nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm))
            super().step()
        return loss

    def _with_gradients(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """(group, parameter) of every parameter that has a gradient."""
        return ((group, p) for group in self.param_groups for p in group["params"] if p.grad is not None)

    def _fused_serves(self) -> bool:
        if _native.missing_reason is not None or getattr(self, "found_inf", None) is not None:
            return False
        return all(_fused_takes(group, p) for group, p in self._with_gradients())

    def _fused_step(self, scale: float) -> None:
        rows = [self._row(group, p, scale) for group, p in self._with_gradients()]
        _native.adamw_update(rows)
        for p, *_, copy, _ in rows:
            torch.autograd.graph.increment_version(p)
            if copy is not None:
                torch.autograd.graph.increment_version(copy)
                p.fastlm_copy.version = p._version  # type: ignore[attr-defined]

    def _row(self, group: dict[str, Any], p: Tensor, scale: float) -> _native.AdamWRow:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        copy = copy_of(p)
        scalars = _scalars(group, float(state["step"]), scale)
        return p, p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], copy, scalars


def _fused_takes(group: dict[str, Any], p: Tensor) -> bool:
    grad = p.grad
    return (
        grad is not None
        and p.device.type == "cpu"
        and p.is_contiguous()
        and grad.layout == torch.strided
        and grad.dtype in GRAD_DTYPES.get(p.dtype, ())
        and not any(group[name] for name in PLAIN)
    )


def _scalars(group: dict[str, Any], step: float, scale: float) -> _native.AdamWScalars:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    return _native.AdamWScalars(
        grad_scale=-scale if group["maximize"] else scale,
        decay=1 - lr * group["weight_decay"],
        beta1=float(beta1),
        beta2=float(beta2),
        step_size=lr / (1 - beta1**step),
        sqrt_factor=1 / math.sqrt(1 - beta2**step),
        eps=group["eps"],
    )
