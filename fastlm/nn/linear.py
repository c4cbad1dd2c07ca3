"""The linear layer, as `torch.nn.Linear`: the library's product, called in the way that suits its shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.dispatch import must_trace, needs_grad, products_are_watched
from .._core.torch_private import has_pointwise_linear, pointwise_linear
from ..ops import _products
from ..ops._thresholds import LONE_COLUMNS, LONE_ROWS, MANY_ROWS
from ..ops.linear import FASTER_ROWS, chosen
from ..ops.linear import linear as few_rows_linear
from ._drop_in import DropIn

FEWEST_ROWS = FASTER_ROWS[torch.float32].start


class Linear(torch.nn.Linear, metaclass=DropIn, stands_for=torch.nn.Linear):
    """`torch.nn.Linear`, on a CPU by the product that suits its shape: same constructor, parameters and state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        # Decoding in fp32 feels the call itself: what `linear` asks takes 2 us, a quarter of a product with 128 x 128,
        # and nn.Module's __getattr__ 0.4 us for a parameter that its dictionary has.
        if not torch.compiler.is_compiling() and input.dtype is torch.float32:
            held = self._parameters
            few = input.numel() < FEWEST_ROWS * self.in_features and "weight" in held and "bias" in held
            if few and not torch.is_autocast_enabled("cpu") and not products_are_watched():
                return F.linear(input, held["weight"], held["bias"])  # type: ignore[arg-type]
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, on a CPU by the product that suits its dtype and number of rows."""
    if products_are_watched():
        return chosen(x, weight, bias)
    if not _has_choice(x) or must_trace(x, weight, bias):
        if weight.shape[0] < _products.MANY_CLASSES or torch.compiler.is_compiling():
            return F.linear(x, weight, bias)
        return _products.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        small = x.numel() * weight.shape[0] <= _products.SMALL_IN_TRAINING
        if small or weight.dtype is not torch.float32 or not _products.serves(x, weight, bias):
            return F.linear(x, weight, bias)
        return _products.linear(x.to(torch.bfloat16), weight, bias)
    if _products.leads(x.dtype) and x.shape[:-1].numel() not in FASTER_ROWS[x.dtype]:
        return _products.linear(x, weight, bias)
    if not _is_layer(x, weight, bias):
        return F.linear(x, weight, bias)
    if needs_grad(x, weight, bias):
        return _products.linear(x, weight, bias)
    return _inference(x, weight, bias)


def _has_choice(x: Tensor) -> bool:
    """Whether PyTorch's own call may not be the best; where it is, decoding makes many short ones."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return False
    if x.dtype is torch.bfloat16 or torch.is_autocast_enabled("cpu"):
        return True
    if x.dtype is torch.float32 and _products.leads(x.dtype):
        return True
    return x.shape[:-1].numel() in FASTER_ROWS.get(x.dtype, ())


def _is_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the arguments fit each other; what does not is left to PyTorch, and its errors."""
    same = x.dtype is weight.dtype and (bias is None or (bias.dtype is x.dtype and bias.dim() == 1))
    return same and weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1] > 0


def _inference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer without gradients.

    1024 rows in bf16 on two threads with AMX: 768 columns of 3072 took PyTorch 5.8 ms, in halves with the bias added
    to them 3.1 ms; 2304 of 768 took 2.3 ms, with the bias inside oneDNN's product 1.8 ms.
    """
    columns, depth = weight.shape
    rows = x.shape[:-1].numel()
    if rows in FASTER_ROWS.get(x.dtype, ()):
        return few_rows_linear(x, weight, bias)
    if x.dtype is not torch.bfloat16 or rows < MANY_ROWS:
        return F.linear(x, weight, bias)
    if _products._has_tiles() and rows in LONE_ROWS and columns in LONE_COLUMNS:
        y = _products.multiply(x.reshape(rows, depth), weight.t())
        y = y if bias is None else y.add_(bias)
        return y.view(*x.shape[:-1], columns)
    if bias is None or not has_pointwise_linear():
        return F.linear(x, weight, bias)
    return pointwise_linear(x, weight, bias)
