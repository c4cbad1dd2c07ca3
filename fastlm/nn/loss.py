"""Cross-entropy losses, as `torch.nn.CrossEntropyLoss` and `torch.nn.LinearCrossEntropyLoss`."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .._core.dispatch import must_trace, needs_grad
from .._core.torch_private import WeightedLoss
from ..ops.cross_entropy import IGNORE_INDEX, cross_entropy
from ..ops.linear import layer_linear
from ..ops.linear_cross_entropy import linear_cross_entropy
from ._drop_in import DropIn


class CrossEntropyLoss(nn.CrossEntropyLoss, metaclass=DropIn, stands_for=nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on `fastlm.cross_entropy`: same constructor and results."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits `input` (C,), (N, C) or (N, C, d1, ...) against class indices or probabilities.

        Raises:
            ValueError: if shapes or devices disagree, or a target is outside [0, C) and not ignored.
            TypeError: if a dtype is wrong.
        """
        # PyTorch keeps the softmax for its backward pass, so the logits may be edited once the loss is there. Ours
        # keeps what it is given, which must then be a tensor that nothing else can see.
        if needs_grad(input) and not must_trace(input):
            input = input.clone()
        return cross_entropy(input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing)


class _LinearCrossEntropyLoss(WeightedLoss):
    """The constructor and state of torch's class, for a torch without it."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        super().__init__(weight, None, None, reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        self.linear = nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)


_Base: Any = getattr(nn, "LinearCrossEntropyLoss", _LinearCrossEntropyLoss)  # torch has it from 2.13 on


class LinearCrossEntropyLoss(_Base, metaclass=DropIn, stands_for=_Base):
    """`torch.nn.LinearCrossEntropyLoss` on `fastlm.linear_cross_entropy`: the full logits are never held.

    Constructor, parameters (linear.weight, linear.bias) and results are torch's, on an older torch too. `options`
    are torch's chunking choices; they are kept, and not read: the logits held are a tenth at most anyway.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of `input` (in_features,) or (N, in_features).

        Args:
            input: in the dtype of linear.weight.
            target: class indices (), (N,) or (N, *out_features); or probabilities (C,) or (N, C, *out_features).

        Raises:
            ValueError: if shapes or devices disagree, or a target is outside [0, C) and not ignored.
            TypeError: if a dtype is wrong.
        """
        ignore_index = IGNORE_INDEX if self.ignore_index is None else self.ignore_index
        options = (ignore_index, self.reduction, self.label_smoothing)
        if not self.out_features:
            return linear_cross_entropy(
                input, self.linear.weight, target, self.linear.bias, *options, class_weight=self.weight
            )
        logits = layer_linear(input, self.linear.weight, self.linear.bias)
        logits = logits.unflatten(-1, (self.num_classes, *self.out_features))
        return cross_entropy(logits, target, self.weight, *options)
