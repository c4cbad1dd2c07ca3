"""Whole models, one readable file each."""

from .bert import BERT, BERTConfig
from .gpt import GPT, GPTConfig
from .llama import Llama, LlamaConfig
from .seq2seq import Seq2Seq, Seq2SeqConfig

__all__ = ["BERT", "GPT", "BERTConfig", "GPTConfig", "Llama", "LlamaConfig", "Seq2Seq", "Seq2SeqConfig"]
