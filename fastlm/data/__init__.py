"""Text to token files: tokenizers, `prepare`, and the memory-mapped result."""

from .manifest import Manifest, load_manifest, load_tokens
from .prepare import PrepareConfig, prepare
from .tokenizer import END_OF_TEXT, Tokenizer, TokenStream

__all__ = [
    "END_OF_TEXT",
    "Manifest",
    "PrepareConfig",
    "TokenStream",
    "Tokenizer",
    "load_manifest",
    "load_tokens",
    "prepare",
]
