"""What the Triton kernels of each op are launched with, one file an op, for ahead-of-time compilation (tools/aot.py).

Each has `cases()`, calls that together use every kernel in every configuration of the architecture in force, and
`calls(M, p, seed)`, by name, calls that should need no other kernels for another row count, probability or seed.
"""

from __future__ import annotations

import torch

BF16, FP32 = torch.bfloat16, torch.float32
# A batch whose tensors exceed 2 GiB: for AMD Triton makes other code of those, without buffer instructions. For NVIDIA
# it is the same, and compiled once.
MANY = 2**20


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
