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
        CheckpointError: if a generator's state is missing, or cannot be one.
    """
    for name, now in capture().items():
        if name not in states:
            if name.startswith("cuda"):
                continue
            raise CheckpointError(f"lacks the state of the random generator {name}")
        if states[name].dtype != now.dtype or states[name].shape != now.shape:
            raise CheckpointError(f"rng.{name} is not the state of a random generator")
    try:
        _restore(states)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"its state of the random generators is damaged: {error}") from None


def _restore(states: dict[str, Tensor]) -> None:
    *words, has_gaussian = states["python"].tolist()
    random.setstate((3, tuple(words), states["python_gaussian"].item() if has_gaussian else None))
    *keys, position, has_gaussian = states["numpy"].tolist()
    if not 0 <= position <= len(keys):  # NumPy would read past its words
        raise ValueError(f"numpy's position is {position}")
    np.random.set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gaussian, states["numpy_gaussian"].item())
    )
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in states:
                torch.cuda.set_rng_state(states[f"cuda{i}"], i)
