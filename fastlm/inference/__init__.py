"""Generating text: the key/value cache, sampling, and the loop over them."""

from .generate import generate
from .kv_cache import KVCache
from .sampling import sample

__all__ = ["KVCache", "generate", "sample"]
