"""What the normalizations share."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda
from . import call


def backward_workspace(z: Tensor, M: int, N: int, sums: int, wanted: bool) -> tuple[Tensor, int, int, Tensor | None]:
    """(a workspace, where (M, 2) row sums and partial sums lie in it or 0, `sums` sums of N each or None): all fp32.

    Addresses, since a view would take longer than the rest.
    """
    splits = call(cuda._cuda.norm_partials, z, M, N) if wanted else 0
    work = z.new_empty(splits * sums * N + 2 * M, dtype=torch.float32)
    partial = cuda.ptr(work)
    rows = partial + 4 * splits * sums * N
    if not wanted:
        return work, rows, 0, None
    return work, rows, partial, (z.new_zeros if M == 0 else z.new_empty)(sums, N, dtype=torch.float32)
