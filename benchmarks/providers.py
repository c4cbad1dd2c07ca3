"""Who is measured: fastlm's backends, PyTorch, and the peers that are installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

import fastlm
from fastlm._core.torch_private import keep_compiled_buffers
from fastlm.errors import BackendError

from .case import Unavailable

BACKENDS = ("cpu", "triton", "cuda", "reference")
OURS = tuple(f"fastlm-{name}" for name in BACKENDS)
STOCK = ("torch", "compile")
SLOW = ("compile", "fastlm-reference")  # run on a case marked slow only, unless asked for by name

# Provider -> the module that has to be there.
PEERS = {
    "transformers": "transformers",
    "onnxruntime": "onnxruntime",
    "ctranslate2": "ctranslate2",
    "liger": "liger_kernel",
    "flash-attn": "flash_attn",
    "quack": "quack",
    "cce": "cut_cross_entropy",
}
SDPA = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex")
ALL = ("fastlm", *OURS, *STOCK, "torch-fused", *SDPA, *PEERS)


def is_ours(provider: str) -> bool:
    return provider.startswith("fastlm")


def require(provider: str) -> None:
    """Raise Unavailable if a peer's package is not installed."""
    module = PEERS.get(provider)
    if module is not None and importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed")


def need_cuda(device: str, what: str) -> None:
    if not device.startswith("cuda"):
        raise Unavailable(f"{what} needs a CUDA device")


def interpreted(device: str) -> bool:
    """Whether Triton kernels of a peer can run: True if interpreted on a CPU, False if on a GPU.

    Raises:
        Unavailable: on a CPU without the interpreter.
    """
    if device.startswith("cuda"):
        return False
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable("Triton kernels need a GPU, or TRITON_INTERPRET=1 to be checked (not timed) on a CPU")
    return True


def on_backend(provider: str, function: Callable[..., Any], arguments: tuple) -> Callable[..., Any]:
    """`function` with every op inside forced onto the backend that a fastlm provider names.

    Raises:
        Unavailable: if the backend cannot serve the call; the reason is the one that `explain` gives.
    """
    name = provider.removeprefix("fastlm-")
    try:
        with fastlm.backend(name):
            reason = fastlm.explain(function, *arguments).reasons[name]
    except BackendError as error:
        raise Unavailable("the op has no entry in the table of backends") from error
    if reason != "selected":
        raise Unavailable(reason)
    if fastlm.explain(function, *arguments).selected == name:
        return function  # as users call it

    def run(*args):
        with fastlm.backend(name):
            return function(*args)

    return run


def label(provider: str, device: str) -> str:
    """What a provider is in full, for tables."""
    if provider == "fastlm-cpu":
        return f"fastlm cpu ({fastlm.cpu_isa()})"
    return provider.replace("fastlm-", "fastlm ")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile, for the shapes that it is called with."""
    torch.compiler.reset()
    keep_compiled_buffers()  # one graph's backward pass is timed many times over
    return torch.compile(function, dynamic=False)
