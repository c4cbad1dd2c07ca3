"""fastlm: kernel-accelerated language models for PyTorch.

Importing this package imports torch and nothing heavier: Triton, the CUDA module and the training
extras are loaded when something needs them.
"""

from . import errors, nn
from ._core.dispatch import backend, explain
from .api import train
from .backends.cpu import cpu_isa, cpu_isas, set_cpu_isa
from .compression.quantization import quantize
from .errors import BackendError, CheckpointError, ConfigError, DataError, FastlmError
from .formats.load import load, load_with_tokenizer, save
from .integrations import (
    accelerate,
    attention_maps,
    attention_statistics,
    attention_telemetry,
    attention_weights,
    restore,
)
from .ops.attention import scaled_dot_product_attention
from .ops.attention_varlen import attention_varlen
from .ops.cross_entropy import cross_entropy
from .ops.gelu import bias_gelu, gelu
from .ops.layer_norm import add_layer_norm, layer_norm
from .ops.linear import linear
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.rotary import rotary
from .ops.swiglu import swiglu

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FastlmError",
    "accelerate",
    "add_layer_norm",
    "add_rms_norm",
    "attention_maps",
    "attention_statistics",
    "attention_telemetry",
    "attention_varlen",
    "attention_weights",
    "backend",
    "bias_gelu",
    "cpu_isa",
    "cpu_isas",
    "cross_entropy",
    "errors",
    "explain",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "load",
    "load_with_tokenizer",
    "nn",
    "quantize",
    "restore",
    "rms_norm",
    "rotary",
    "save",
    "scaled_dot_product_attention",
    "set_cpu_isa",
    "swiglu",
    "train",
]
