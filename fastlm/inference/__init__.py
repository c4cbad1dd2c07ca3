"""Generating text: the key/value cache, sampling, the loop over them, and quantized weights."""

from .generate import generate
from .kv_cache import KVCache
from .quantize import QuantizedLinear, load_quantized, quantize, save_quantized
from .sampling import sample

__all__ = ["KVCache", "QuantizedLinear", "generate", "load_quantized", "quantize", "sample", "save_quantized"]
