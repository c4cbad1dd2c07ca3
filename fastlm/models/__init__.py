"""Whole models, one readable file each."""

from .bert import BERT, BERTConfig
from .common.model import CausalLM
from .gpt import GPT, GPTConfig
from .llama import Llama, LlamaConfig
from .phi3 import Phi3, Phi3Config
from .qwen3 import Qwen3, Qwen3Config
from .seq2seq import Seq2Seq, Seq2SeqConfig

__all__ = [
    "BERT",
    "GPT",
    "BERTConfig",
    "CausalLM",
    "GPTConfig",
    "Llama",
    "LlamaConfig",
    "Phi3",
    "Phi3Config",
    "Qwen3",
    "Qwen3Config",
    "Seq2Seq",
    "Seq2SeqConfig",
]
