"""The linear layer, as `torch.nn.Linear`, on the op `linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.linear import eager_layer_linear, layer_linear
from ._drop_in import DropIn


class Linear(torch.nn.Linear, metaclass=DropIn, stands_for=torch.nn.Linear):
    """`torch.nn.Linear`, on a CPU by the kernel that suits its shape: same constructor, parameters and state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        held = self._parameters  # nn.Module's __getattr__ takes 0.4 us for each
        if torch.compiler.is_compiling() or "weight" not in held or "bias" not in held:
            return layer_linear(input, self.weight, self.bias)
        return eager_layer_linear(input, held["weight"], held["bias"])  # type: ignore[arg-type]
