"""RMS normalization (Zhang and Sennrich 2019), as `torch.nn.RMSNorm`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rms_norm import rms_norm
from ._drop_in import DropIn


class RMSNorm(torch.nn.RMSNorm, metaclass=DropIn, stands_for=torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on `fastlm.rms_norm`: same constructor, parameters and state_dict."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` (..., *normalized_shape) over its last dimensions.

        Raises:
            ValueError: if x's shape does not end in normalized_shape, or it is on another device.
            TypeError: if x is not floating-point.
        """
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
