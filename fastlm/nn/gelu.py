"""The Gaussian error linear unit (Hendrycks and Gimpel 2016), as `torch.nn.GELU`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.gelu import gelu
from ._drop_in import DropIn


class GELU(torch.nn.GELU, metaclass=DropIn, stands_for=torch.nn.GELU):
    """`torch.nn.GELU` on `fastlm.gelu`: approximate is "none" (exact, by erf) or "tanh"."""

    def forward(self, input: Tensor) -> Tensor:
        """GELU of every element of `input`, of any shape and floating-point dtype."""
        return gelu(input, approximate=self.approximate)
