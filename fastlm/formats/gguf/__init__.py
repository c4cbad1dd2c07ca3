"""GGUF files: a model and its tokenizer."""
