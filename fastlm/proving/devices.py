"""What kernels are proved on: a GPU, or without one what stands in for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .._core import proofs
from .._core.proofs import Key, Properties
from ..errors import ConfigError

DTYPES = ("bfloat16", "float16", "float32")  # those of the kernels for GPUs, the commonest first
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Device:
    """Where a worker runs its kernels.

    Attributes:
        name: as `--device` has it.
        key: what its proof is of.
        backends, dtypes: those that can be proved there.
        torch_device: of the tensors that are timed.
        index: of the GPU.
        environment: of its workers, beside the user's own.
        prepare: "module:function", a context manager in which the workers run; found in `path` too.
        largest: extents of the timed shapes are cut to this; None for shapes as they are.
        samples: random calls to check of each kernel at most, and at least.
        check_seconds: after this no more of them, if the least number is reached.
    """

    name: str
    key: Key
    backends: tuple[str, ...] = ("triton", "cuda")
    dtypes: tuple[str, ...] = DTYPES
    torch_device: str = "cuda"
    index: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    prepare: str = ""
    path: tuple[str, ...] = ()
    largest: int | None = None
    samples: tuple[int, int] = (48, 8)
    check_seconds: float = 10.0

    def to_dict(self) -> dict[str, Any]:
        """What a worker has to know."""
        names = ("torch_device", "index", "dtypes", "prepare", "path", "samples", "check_seconds")
        return {name: getattr(self, name) for name in names}


def stand_in(name: str, what: str, **more: Any) -> Device:
    """A device without a GPU, on whose times nothing depends: small shapes and few samples."""
    key = proofs.key_of(Properties(what, name, "none", "none"))
    given: dict[str, Any] = {"environment": NO_GPU, "torch_device": "cpu", "largest": 24, "samples": (3, 3)} | more
    return Device(name, key, **given)


def interpreter() -> Device:
    """Triton's interpreter; it truncates to bfloat16 instead of rounding, so that dtype is left out."""
    return stand_in(
        "interpreter", "Triton's interpreter", backends=("triton",), dtypes=("float32", "float16"),
        environment=NO_GPU | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip


STAND_INS = {"interpreter": interpreter}


def find(name: str) -> Device | None:
    """The device of a name; None where it is a GPU and there is none.

    Raises:
        ConfigError: for a name that is none.
    """
    if name in STAND_INS:
        return STAND_INS[name]()
    kind, _, number = name.partition(":")
    if name != "auto" and (kind != "cuda" or (name != "cuda" and not number.isdigit())):
        raise ConfigError(f"device is {name!r}, expected auto, cuda, cuda:N or {', '.join(STAND_INS)}")
    if not torch.cuda.is_available():
        return None
    index = int(number or 0)
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    key = proofs.device_key(index)
    assert key is not None
    return Device(f"cuda:{index}", key, index=index)
