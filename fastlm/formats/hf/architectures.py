"""The table of model families: those whose Hugging Face folders are loaded and saved, each with its class."""

from .bert import BERT_FOLDER, ROBERTA_FOLDER, XLM_ROBERTA_FOLDER
from .gpt2 import GPT2_FOLDER
from .llama import LLAMA_FOLDER, MISTRAL_FOLDER, QWEN2_FOLDER
from .marian import MARIAN_FOLDER
from .phi3 import PHI3_FOLDER
from .qwen3 import QWEN3_FOLDER

# Of relatives that share a class, a model that is of none in particular is written as the first that can express it.
ARCHITECTURES = (
    GPT2_FOLDER,
    BERT_FOLDER,
    ROBERTA_FOLDER,
    XLM_ROBERTA_FOLDER,
    LLAMA_FOLDER,
    MISTRAL_FOLDER,
    QWEN2_FOLDER,
    MARIAN_FOLDER,
    QWEN3_FOLDER,
    PHI3_FOLDER,
)
