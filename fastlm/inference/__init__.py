"""Generating text: the key/value cache, sampling, the loop over them, beam search, and quantized weights."""

from ..compression.quantization import QuantizedLinear, load_quantized, quantize, save_quantized
from ..models.common.cache import KVCache
from .beam import Beams, beam_search, greedy_search
from .generate import generate
from .sampling import sample

__all__ = [
    "Beams",
    "KVCache",
    "QuantizedLinear",
    "beam_search",
    "generate",
    "greedy_search",
    "load_quantized",
    "quantize",
    "sample",
    "save_quantized",
]
