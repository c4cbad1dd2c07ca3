"""What the ops of a backend share: why it serves a request, or does not."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys

import torch

from .._core import dispatch, proofs
from .._core.architecture import oldest_served
from .._core.dispatch import Request
from . import cpu as _native


def cpu_unsupported(request: Request) -> str | None:
    """The CPU backend's conditions that every op shares."""
    if _native.missing_reason:
        return _native.missing_reason
    if request.device != "cpu":
        return f"the tensors are on {request.device}"
    if request.dtype not in _native.TYPE_CODE:
        return f"its kernels take float32, float64, bfloat16 and float16, not {str(request.dtype)[6:]}"
    return None


def _has_triton() -> bool:
    if "triton" in sys.modules:
        return sys.modules["triton"] is not None
    return importlib.util.find_spec("triton") is not None


def triton_unsupported(request: Request) -> str | None:
    """The Triton backend's conditions that every op shares."""
    if not _has_triton():
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and request.device == "cpu"
    if request.device != "cuda" and not interpreted:
        return f"the tensors are on {request.device}"
    if not interpreted and (arch := dispatch.oldest_architecture()) < (oldest := oldest_served(arch)):
        return f"its kernels need {oldest} or newer, this GPU is {arch}"
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels take float32, bfloat16 and float16, not {str(request.dtype)[6:]}"
    return None


def _cuda_sources() -> str:
    """A hash of what the CUDA kernels were compiled from and of what calls them; empty without them."""
    from . import cuda

    if cuda.missing_reason is not None:
        return ""
    return proofs.hash_of("fastlm.backends.cuda", cuda.sources(), *cuda.architectures())


proofs.cuda_kernel_sources = functools.cache(_cuda_sources)


def cuda_unsupported(request: Request) -> str | None:
    """The CUDA backend's conditions that every op shares."""
    from . import cuda  # loaded when first asked about

    if request.device != ("cpu" if cuda.emulated else "cuda"):
        return f"the tensors are on {request.device}"
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels take float32, bfloat16 and float16, not {str(request.dtype)[6:]}"
    return cuda.unusable() or (None if cuda.emulated else cuda.unserved(dispatch.oldest_architecture()))
