"""fastlm's attention behind PyTorch's scaled_dot_product_attention for the length of a test."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import attention

from fastlm.integrations import register_sdpa


@contextmanager
def activated() -> Iterator[None]:
    """Registered and active inside; torch 2.10, which has no way back, is led there by what it keeps private."""
    register_sdpa()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        attention.activate_flash_attention_impl("fastlm")
    try:
        yield
    finally:
        if hasattr(attention, "restore_flash_attention_impl"):
            attention.restore_flash_attention_impl()
        else:
            attention._registry._FLASH_ATTENTION_HANDLES.pop("fastlm").remove()
            attention._registry._FLASH_ATTENTION_ACTIVE = None
