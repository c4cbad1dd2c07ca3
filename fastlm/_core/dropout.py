"""Dropout's counter-based generator: the masks that every backend regenerates instead of storing.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), with the key from a
64-bit seed drawn from torch's generator, so that `torch.manual_seed` governs it. Element (row, column) of a
(rows, columns) array is kept iff philox(seed, (column // 4, row low, row high, 0))[column % 4] >= p 2^32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BackendError

_LOW = 0xFFFFFFFF
_CPU = torch.device("cpu")


def check_probability(op: str, dropout_p: float) -> float:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, expected a probability between 0 and 1")
    return float(dropout_p)


class DeviceSeed(int):
    """A seed that lies in a GPU's memory; as a number, its address.

    A CUDA graph that draws one has another mask at each replay.

    Args:
        tensor: () int64, the seed.
    """

    tensor: Tensor

    def __new__(cls, tensor: Tensor) -> DeviceSeed:
        made = super().__new__(cls, tensor.data_ptr())
        made.tensor = tensor
        return made


def _random_seed(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device).random_(-(2**63), None)


def _captured(device: torch.device) -> bool:
    """Whether what runs on `device` becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def draw_seed(device: torch.device = _CPU) -> int:
    """A fresh 64-bit seed from torch's default CPU generator; while `device` captures a CUDA graph, from the GPU's.

    A host's number would be part of the graph, and every replay would drop the same.
    """
    return DeviceSeed(_random_seed(device)) if _captured(device) else int(_random_seed(_CPU).item())


def traced_seed(seed: Tensor | None, device: torch.device) -> int:
    """The seed that a compiled graph has drawn on the CPU, or 0 without one.

    Raises:
        BackendError: while `device` captures a CUDA graph, which would repeat it.
    """
    if seed is None:
        return 0
    if _captured(device):
        raise BackendError(
            "under torch.compile attention's dropout takes its seed from the host, so that a CUDA graph would repeat "
            "one mask at every replay: capture the model before it is compiled, or with dropout 0"
        )
    return int(seed.item())


def philox(seed: int | Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four uint32 words, in int64 tensors, for each counter; products wrap modulo 2^64 as in C."""
    x0, x1, x2, x3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (b >> 32) & _LOW ^ x1 ^ k0, b & _LOW, (a >> 32) & _LOW ^ x3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return x0, x1, x2, x3


def factors(rows: int, columns: int, p: float, seed: int, dtype: torch.dtype, device="cpu") -> Tensor:
    """(rows, columns): 0 where dropped, 1 / (1 - p) where kept."""
    groups = -(-columns // 4)
    row = torch.arange(rows, device=device)[:, None].expand(rows, groups)
    group = torch.arange(groups, device=device)[None, :].expand(rows, groups)
    key = seed.tensor if isinstance(seed, DeviceSeed) else seed
    words = philox(key, (group, row & _LOW, (row >> 32) & _LOW, torch.zeros_like(row)))
    word = torch.stack(words, dim=-1).reshape(rows, groups * 4)[:, :columns]
    kept = word >= min(round(p * 2**32), 2**32 - 1)
    return kept.to(dtype) * (1.0 / (1.0 - p) if p < 1 else 0.0)
