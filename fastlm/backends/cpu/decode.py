"""One step of GPT decoding in one call, and the memory that its weights lie in."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu


def huge_pages(size: int) -> Tensor:
    """(size,) uint8 of memory that begins at a huge page, and is backed by such pages where the system has them."""
    page = 2**21
    memory = torch.empty(size + page, dtype=torch.uint8)
    start = -memory.data_ptr() % page
    cpu._cpu.use_huge_pages(memory.data_ptr() + start, size // page * page)
    return memory[start : start + size]


def decode_step(model: int, position: int, eps: float) -> None:
    """Run the model that the table at this address describes; csrc/cpu/decode.h says how."""
    cpu._cpu.decode_step(model, position, eps)
