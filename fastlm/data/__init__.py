"""Text to token files: tokenizers, `prepare`, and the memory-mapped result."""

from .config import PrepareConfig
from .manifest import Manifest, load_manifest, load_tokens
from .prepare import prepare
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
