"""Layer normalization (Ba et al. 2016), as `torch.nn.LayerNorm`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.layer_norm import layer_norm
from ._drop_in import DropIn


class LayerNorm(torch.nn.LayerNorm, metaclass=DropIn, stands_for=torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `fastlm.layer_norm`: same constructor, parameters and state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` (..., *normalized_shape) over its last dimensions.

        Raises:
            ValueError: if input's shape does not end in normalized_shape, or it is on another device.
            TypeError: if input is not floating-point.
        """
        held = self._parameters  # nn.Module's __getattr__ takes 0.4 us for each, which is felt on one row
        if not torch.compiler.is_compiling() and "weight" in held and "bias" in held:
            return layer_norm(input, self.normalized_shape, held["weight"], held["bias"], self.eps)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
