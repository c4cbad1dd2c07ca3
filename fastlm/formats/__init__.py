"""What models are stored in: checkpoints, Hugging Face folders and GGUF files."""
