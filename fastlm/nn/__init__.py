"""Drop-in modules: subclasses of torch.nn's with the same parameters, on fastlm's ops."""

from .attention import MultiheadAttention
from .gelu import GELU
from .layer_norm import LayerNorm
from .transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = ["GELU", "LayerNorm", "MultiheadAttention", "TransformerDecoderLayer", "TransformerEncoderLayer"]
