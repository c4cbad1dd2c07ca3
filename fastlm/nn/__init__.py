"""Drop-in modules: subclasses of torch.nn's with the same parameters, on fastlm's ops."""

from .attention import MultiheadAttention
from .embedding import Embedding, LearnedPositions, RotaryEmbedding, SinusoidalPositions
from .feed_forward import FeedForward, SwiGLU
from .gelu import GELU
from .layer_norm import LayerNorm
from .linear import Linear
from .loss import CrossEntropyLoss, LinearCrossEntropyLoss
from .rms_norm import RMSNorm
from .stack import Transformer, TransformerDecoder, TransformerEncoder
from .transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GELU",
    "CrossEntropyLoss",
    "Embedding",
    "FeedForward",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SinusoidalPositions",
    "SwiGLU",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
