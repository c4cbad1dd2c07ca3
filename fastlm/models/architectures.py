"""The architectures whose Hugging Face folders are loaded and saved."""

from .folder_bert import BERT_FOLDER, ROBERTA_FOLDER
from .folder_gpt2 import GPT2_FOLDER
from .folder_llama import LLAMA_FOLDER
from .folder_marian import MARIAN_FOLDER

ARCHITECTURES = (GPT2_FOLDER, BERT_FOLDER, ROBERTA_FOLDER, LLAMA_FOLDER, MARIAN_FOLDER)
