"""Position-wise feed-forward layers: linear-activation-linear (Vaswani et al. 2017) and SwiGLU (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.gelu import gelu
from ..ops.swiglu import swiglu
from ._fused import linear_gelu
from ._plain import plain
from .gelu import GELU
from .linear import Linear


class FeedForward(nn.Module):
    """linear2(dropout(activation(linear1(x)))), the feed-forward sublayer of `TransformerEncoderLayer`.

    Parameters are named as there: linear1.weight (dim_feedforward, d_model), linear1.bias, linear2.weight and
    linear2.bias. GELU runs in one pass with the bias before it and the dropout after it.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.linear1 = Linear(d_model, dim_feedforward, bias, device, dtype)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) to the same shape."""
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), the feed-forward sublayer of Llama and its parameters' names."""

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, dim_feedforward, bias, device, dtype)
        self.up_proj = Linear(d_model, dim_feedforward, bias, device, dtype)
        self.down_proj = Linear(dim_feedforward, d_model, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) to the same shape."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def feed_forward(
    x: Tensor,
    linear1: nn.Module,
    activation: Callable[[Tensor], Tensor],
    dropout: nn.Module | None,
    linear2: nn.Module,
) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), with linear1's bias, GELU and dropout in one pass."""
    form = gelu_form(activation)
    if form is not None and (dropout is None or plain(dropout, nn.Dropout)):
        rate = dropout.p if dropout is not None and dropout.training else 0.0
        return linear2(linear_gelu(x, linear1, form, rate))
    hidden = linear1(x)
    hidden = activation(hidden) if form is None else gelu(hidden, form)
    return linear2(hidden if dropout is None else dropout(hidden))


def gelu_form(activation: Callable[[Tensor], Tensor]) -> str | None:
    """GELU's `approximate`, or None for another activation."""
    if activation is F.gelu or activation is gelu:
        return "none"
    if isinstance(activation, nn.GELU) and plain(activation, nn.GELU, GELU):
        return activation.approximate
    return None
