"""The state of every random generator that training draws from, as tensors."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators (CPU and every GPU)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> dict[str, Tensor]:
    """The states of Python's and NumPy's generator, with the Gaussian each keeps back, and PyTorch's."""
    _, words, gaussian = random.getstate()
    numpy = np.random.get_state(legacy=False)
    words_numpy, position = numpy["state"]["key"].tolist(), numpy["state"]["pos"]
    states = {
        "python": torch.tensor([*words, gaussian is not None], dtype=torch.int64),
        "python_gaussian": torch.tensor(gaussian or 0.0, dtype=torch.float64),
        "numpy": torch.tensor([*words_numpy, position, numpy["has_gauss"]], dtype=torch.int64),
        "numpy_gaussian": torch.tensor(numpy["gauss"], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore(states: dict[str, Tensor]) -> None:
    """Undo everything drawn since `capture`.

    Raises:
        CheckpointError: if a generator's state is missing.
    """
    if missing := [name for name in capture() if name not in states and not name.startswith("cuda")]:
        raise CheckpointError(f"checkpoint: lacks the state of the random generator {missing[0]}")
    *words, has_gaussian = states["python"].tolist()
    random.setstate((3, tuple(words), states["python_gaussian"].item() if has_gaussian else None))
    *keys, position, has_gaussian = states["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gaussian, states["numpy_gaussian"].item())
    )
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in states:
                torch.cuda.set_rng_state(states[f"cuda{i}"], i)
