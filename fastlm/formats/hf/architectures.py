"""The architectures whose Hugging Face folders are loaded and saved."""

from .bert import BERT_FOLDER, ROBERTA_FOLDER
from .gpt2 import GPT2_FOLDER
from .llama import LLAMA_FOLDER
from .marian import MARIAN_FOLDER

ARCHITECTURES = (GPT2_FOLDER, BERT_FOLDER, ROBERTA_FOLDER, LLAMA_FOLDER, MARIAN_FOLDER)
